//! Random calls that make communicators, right and wrong.

use super::Tally;
use super::call::Pointer;
use super::memory::{Guarded, Random};
use super::mutate::Expected;
use super::objects::{Out, call, wrong};
use super::world::{Context, Failure, FakeRank, collectives, sized};
use forge::error::forge_status::*;
use forge::ffi::comm::*;
use forge::ffi::data_parallel::{forge_linear_gather_weight, forge_linear_reduce};
use forge::ffi::linear::*;
use forge::ffi::types::*;
use std::cell::Cell;
use std::ptr::null_mut;

/// A communicator of one rank, or of the caller's own collectives.
pub fn comm(context: &Context, random: &mut Random, tally: &mut Tally, spoilt: bool) {
    let mut out = Out::new::<*mut forge_comm>(null_mut());
    let (mut rank, mut size) = (random.below(4) as u32, 4);
    let mut host = collectives(null_mut(), random.percent(50));
    let mut pointer = Pointer::Good;
    let mut owner = context.0;
    let mut expected = None;
    if spoilt {
        expected = match random.below(6) {
            0 => out.spoil(random, "out_comm"),
            1 => {
                pointer = Pointer::Misaligned;
                wrong(FORGE_ERROR_MISALIGNED, "collectives")
            }
            2 => {
                host.struct_size -= 8;
                wrong(FORGE_ERROR_STRUCT_SIZE, "collectives")
            }
            3 => {
                (rank, size) = random.pick(&[(4, 4), (0, 0), (u32::MAX, 4)]);
                wrong(FORGE_ERROR_RANK, "rank")
            }
            4 => {
                match random.below(3) {
                    0 => host.all_gather = None,
                    1 => host.reduce_scatter = None,
                    _ => host.all_reduce = None,
                }
                wrong(FORGE_ERROR_NULL, "collectives")
            }
            _ => {
                owner = null_mut();
                wrong(FORGE_ERROR_NULL, "context")
            }
        };
    }
    let solo = matches!(expected, None | Some(Expected { status: FORGE_ERROR_NULL, .. }))
        && (owner.is_null() || expected.is_none())
        && random.percent(30);
    // SAFETY: as above.
    let status = call(tally, expected, &out, || unsafe {
        if solo {
            forge_comm_new_solo(owner, out.ptr())
        } else {
            forge_comm_new_host(owner, rank, size, pointer.of(&host), out.ptr())
        }
    });
    if status == FORGE_OK {
        // SAFETY: just made.
        unsafe { forge_comm_free(out.memory.read()) };
    }
}

/// Communicators of NCCL, which the CPU has none of, and what may be asked of any.
pub fn nccl(context: &Context, random: &mut Random, tally: &mut Tally) {
    let mut out = Out::new::<*mut forge_comm>(null_mut());
    let mut owner = context.0;
    let expected = match random.below(4) {
        0 => out.spoil(random, "out_comm"),
        1 => {
            owner = null_mut();
            wrong(FORGE_ERROR_NULL, "context")
        }
        _ => wrong(FORGE_ERROR_UNSUPPORTED, "context"),
    };
    let mut config = sized::<forge_nccl_config>();
    (config.rank, config.size) = (random.any() as u32, random.any() as u32);
    config.struct_size = random.pick(&[config.struct_size, 0, u32::MAX]);
    // Nothing looks at it before the context.
    let handle = Guarded::new(8);
    let borrows = random.percent(50);
    // SAFETY: as above.
    call(tally, expected, &out, || unsafe {
        if borrows {
            forge_comm_borrow_nccl(owner, handle.ptr().cast(), 1, out.ptr())
        } else {
            forge_comm_new_nccl(owner, &config, out.ptr())
        }
    });
    if !borrows {
        let mut out = Out::new::<*mut forge_comm>(null_mut());
        let expected = wrong(FORGE_ERROR_NULL, "nccl_comm");
        // SAFETY: as above.
        call(tally, expected, &out, || unsafe {
            forge_comm_borrow_nccl(context.0, null_mut(), 1, out.ptr())
        });
        out.offset = None;
        // SAFETY: as above.
        let status = unsafe { forge_nccl_unique_id(out.ptr()) };
        tally.count(status, wrong(FORGE_ERROR_NULL, "out_id").as_slice());
    }
    // Where a machine has NCCL there are a version and ids.
    let mut out = Out::new(u32::MAX);
    if random.percent(50) {
        let expected = out.spoil(random, "out_version");
        // SAFETY: as above.
        call(tally, expected, &out, || unsafe { forge_nccl_version(out.ptr()) });
    } else {
        let (mut version, mut id) = (0, [0; 128]);
        // SAFETY: live memory.
        let status =
            unsafe { [forge_nccl_version(&mut version), forge_nccl_unique_id(id.as_mut_ptr())] };
        let here = status[0] == FORGE_OK;
        assert!(here || status == [FORGE_ERROR_NO_NCCL; 2], "{status:?}");
        assert_eq!(here, version > 0);
    }
    let mut solo = null_mut();
    // SAFETY: handles are live.
    unsafe {
        assert_eq!(forge_comm_new_solo(context.0, &mut solo), FORGE_OK);
        tally.count(forge_comm_check(solo), &[]);
        forge_comm_free(solo);
        let none = wrong(FORGE_ERROR_NULL, "comm");
        tally.count(forge_comm_check(null_mut()), none.as_slice());
    }
}

/// Linears of which other ranks have W as well, and what is theirs alone.
pub fn data_parallel(context: &Context, random: &mut Random, tally: &mut Tally, spoilt: bool) {
    let size = 1 + random.below(4);
    let (fail_after, failed) = (Cell::new(None), Cell::new(Failure::None));
    let rank = FakeRank { rank: random.below(size), size, fail_after, failed };
    let user = (&raw const rank).cast_mut().cast();
    let mut host = collectives(user, random.percent(50));
    let mut config = sized::<forge_linear_config>();
    config.factor_dtype = 1;
    (config.out_features, config.in_features) = (4 * size as u64, 3);
    config.rule = c"adamw".as_ptr();
    let mut reduction = random.below(3) as u32;
    let mut out = Out::new::<*mut forge_linear>(null_mut());
    let (mut solo, mut others) = (null_mut(), null_mut());
    let (mut lacks, mut steps) = (false, 1 + random.below(3) as u32);
    let expected = if !spoilt {
        None
    } else {
        match random.below(6) {
            4 => {
                steps = 0;
                wrong(FORGE_ERROR_SHAPE, "micro_batches")
            }
            0 => out.spoil(random, "out_linear"),
            1 => {
                reduction = random.pick(&[3, u32::MAX]);
                wrong(FORGE_ERROR_ENUM, "reduction")
            }
            2 if size > 1 => {
                config.out_features += 1;
                wrong(FORGE_ERROR_SHARD, "out_features")
            }
            3 => {
                host.all_to_all = None;
                wrong(FORGE_ERROR_NULL, "all_to_all")
            }
            _ => {
                lacks = true;
                wrong(FORGE_ERROR_NULL, "data_parallel")
            }
        }
    };
    // SAFETY: structs and handles are live; the rank outlives the communicator.
    unsafe {
        assert_eq!(forge_comm_new_solo(context.0, &mut solo), FORGE_OK);
        let (at, of) = (rank.rank as u32, size as u32);
        assert_eq!(forge_comm_new_host(context.0, at, of, &host, &mut others), FORGE_OK);
    }
    let given = if lacks { null_mut() } else { others };
    // SAFETY: as above.
    let status = call(tally, expected, &out, || unsafe {
        forge_linear_new_data_parallel(context.0, solo, given, reduction, steps, &config, out.ptr())
    });
    if status == FORGE_OK {
        let linear: *mut forge_linear = out.memory.read();
        gather(linear, size, random, tally);
        // SAFETY: just made.
        unsafe { forge_linear_free(linear) };
    }
    // SAFETY: live handles, freed once.
    unsafe {
        tally.count(forge_comm_wait(others, null_mut()), &[]);
        let none = wrong(FORGE_ERROR_NULL, "comm");
        tally.count(forge_comm_wait(null_mut(), null_mut()), none.as_slice());
        forge_comm_free(others);
        forge_comm_free(solo);
    }
}

/// W of `4 · size` rows of 3 is gathered: the fake peers have what this rank has.
fn gather(linear: *mut forge_linear, size: usize, random: &mut Random, tally: &mut Tally) {
    let mut layout = sized::<forge_layout>();
    // SAFETY: live.
    assert_eq!(unsafe { forge_linear_layout(linear, &mut layout) }, FORGE_OK);
    assert_eq!((layout.out_local, layout.out_owned), (4 * size as u64, 4));
    assert_eq!(layout.states[0].rows, 4);
    reduce(linear, &layout, size, random, tally);
    let weight = Guarded::new(layout.weight.bytes as usize);
    let mut buffer = forge_buffer { data: weight.ptr().cast(), bytes: layout.weight.bytes };
    let expected = match random.below(4) {
        0 => {
            buffer.data = null_mut();
            wrong(FORGE_ERROR_NULL, "weight")
        }
        1 => {
            buffer.bytes -= 4;
            wrong(FORGE_ERROR_BUFFER_SIZE, "weight")
        }
        _ => None,
    };
    // SAFETY: the buffer has the size that it says.
    let status = unsafe { forge_linear_gather_weight(linear, buffer, null_mut()) };
    tally.count(status, expected.as_slice());
    assert!(weight.guards_are_intact());
}

/// dW of two tokens, reduced in panels: every fake peer has this rank's.
fn reduce(
    linear: *mut forge_linear,
    layout: &forge_layout,
    size: usize,
    random: &mut Random,
    tally: &mut Tally,
) {
    const TOKENS: usize = 2;
    let (rows, cols) = (layout.out_local as usize, layout.in_local as usize);
    let (dy, x) = (vec![1f32; TOKENS * rows], vec![2f32; TOKENS * cols]);
    let constant = |values: &[f32]| forge_const_buffer {
        data: values.as_ptr().cast(),
        bytes: 4 * values.len() as u64,
    };
    let mut segment = forge_segment {
        dy: constant(&dy),
        x: constant(&x),
        tokens: TOKENS as u64,
        dy_stride: 0,
        x_stride: 0,
    };
    let sum = Guarded::new(layout.accumulator.bytes as usize);
    // More than any panels of a layer this small take.
    let scratch = Guarded::new(1 << 14);
    let mut accumulator = forge_buffer { data: sum.ptr().cast(), bytes: layout.accumulator.bytes };
    let mut workspace = forge_buffer { data: scratch.ptr().cast(), bytes: 1 << 14 };
    let expected = match random.below(6) {
        0 => {
            workspace.bytes = 8;
            wrong(FORGE_ERROR_BUFFER_SIZE, "workspace")
        }
        1 => {
            accumulator.data = null_mut();
            wrong(FORGE_ERROR_NULL, "accumulator")
        }
        2 if size > 1 => {
            // As if it were of the owned rows.
            segment.dy.bytes /= size as u64;
            wrong(FORGE_ERROR_BUFFER_SIZE, "segments[0].dy")
        }
        3 => {
            accumulator.data = workspace.data;
            wrong(FORGE_ERROR_OVERLAP, "accumulator")
        }
        _ => None,
    };
    // SAFETY: buffers have the sizes that they say.
    let status =
        unsafe { forge_linear_reduce(linear, &segment, 1, accumulator, workspace, null_mut()) };
    tally.count(status, expected.as_slice());
    assert!(sum.guards_are_intact() && scratch.guards_are_intact());
}
