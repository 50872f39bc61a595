//! Random calls that make communicators, right and wrong.

use super::Tally;
use super::call::Pointer;
use super::memory::{Guarded, Random};
use super::mutate::Expected;
use super::objects::{Out, call, wrong};
use super::world::{Context, collectives, sized};
use forge::error::forge_status::*;
use forge::ffi::comm::*;
use forge::ffi::types::*;
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
