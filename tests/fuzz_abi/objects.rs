//! Random calls that make and describe objects, right and wrong.

use super::Tally;
use super::call::Pointer;
use super::communicators;
use super::memory::{Guarded, Random};
use super::mutate::Expected;
use super::world::{Context, World, random_config, sized};
use forge::error::forge_status::{self, *};
use forge::ffi::context::*;
use forge::ffi::enums::forge_schedule;
use forge::ffi::error::*;
use forge::ffi::linear::*;
use forge::ffi::rule::*;
use forge::ffi::types::*;
use forge::ffi::{FORGE_ABI_VERSION, forge_abi_version, forge_version};
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::{null, null_mut};

pub fn wrong(status: forge_status, naming: &str) -> Option<Expected> {
    Some(Expected { status, naming: naming.to_string() })
}

/// An `out_` argument in guarded memory, or a pointer that must be refused.
pub struct Out {
    pub memory: Guarded,
    pub offset: Option<usize>,
}

impl Out {
    pub fn new<T: Copy>(value: T) -> Self {
        Self { memory: Guarded::holding(value), offset: Some(0) }
    }

    pub fn spoil(&mut self, random: &mut Random, name: &str) -> Option<Expected> {
        if random.percent(50) {
            self.offset = None;
            return wrong(FORGE_ERROR_NULL, name);
        }
        self.offset = Some(1);
        wrong(FORGE_ERROR_MISALIGNED, name)
    }

    pub fn ptr<T>(&self) -> *mut T {
        self.offset.map_or(null_mut(), |at| self.memory.ptr().wrapping_add(at).cast())
    }
}

/// Makes one call that writes nothing but `out`, and checks what it did.
pub fn call(
    tally: &mut Tally,
    expected: Option<Expected>,
    out: &Out,
    make: impl FnOnce() -> forge_status,
) -> forge_status {
    let before = out.memory.snapshot();
    let status = make();
    assert!(out.memory.guards_are_intact());
    if status != FORGE_OK {
        assert_eq!(out.memory.snapshot(), before, "an out argument changed");
    }
    tally.count(status, expected.as_slice());
    status
}

/// One random call.
pub fn random_call(contexts: &[Context], world: &World, random: &mut Random, tally: &mut Tally) {
    let spoilt = random.percent(60);
    match random.below(14) {
        13 => communicators::data_parallel(&contexts[0], random, tally, spoilt),
        12 => communicators::nccl(&contexts[0], random, tally),
        10 => workspace(&contexts[0], random, tally, spoilt),
        11 => texts(random),
        0 => context(random, tally, spoilt),
        1 => communicators::comm(&contexts[0], random, tally, spoilt),
        2..=4 => linear(&contexts[0], world, random, tally, spoilt),
        5 => layout_and_workspace(world, random, tally, spoilt),
        6 | 7 => plan(world, random, tally, spoilt),
        8 => rules(random, tally, spoilt),
        _ => scalars(random, tally, spoilt),
    }
}

fn context(random: &mut Random, tally: &mut Tally, spoilt: bool) {
    let mut out = Out::new::<*mut forge_context>(null_mut());
    let mut config = sized::<forge_context_config>();
    config.threads = 1;
    let mut pointer = Pointer::Good;
    let expected = if !spoilt {
        None
    } else {
        match random.below(7) {
            0 => out.spoil(random, "out_context"),
            1 => {
                pointer = Pointer::Null;
                wrong(FORGE_ERROR_NULL, "config")
            }
            2 => {
                config.struct_size = random.pick(&[0, 16, 23, 25, u32::MAX]);
                wrong(FORGE_ERROR_STRUCT_SIZE, "config")
            }
            3 => {
                config.backend = 1;
                wrong(FORGE_ERROR_NO_BACKEND, "backend")
            }
            4 => {
                config.backend = random.pick(&[2, u32::MAX]);
                wrong(FORGE_ERROR_ENUM, "backend")
            }
            5 => {
                config.device = random.pick(&[1, -1, i32::MIN]);
                wrong(FORGE_ERROR_SHAPE, "device")
            }
            _ => {
                config.threads = random.pick(&[4097, u32::MAX]);
                wrong(FORGE_ERROR_SHAPE, "threads")
            }
        }
    };
    // SAFETY: as in `Call::make`: right, or wrong in a way that must be noticed.
    let status = call(tally, expected, &out, || unsafe {
        forge_context_new(pointer.of(&config), out.ptr())
    });
    if status == FORGE_OK {
        drop(Context(out.memory.read()));
    }
}

/// What a context wants of a workspace, and lending it one: nothing on the CPU, and any is taken.
fn workspace(context: &Context, random: &mut Random, tally: &mut Tally, spoilt: bool) {
    let mut out = Out::new(u64::MAX);
    let spoilt_context = spoilt && random.percent(50);
    let owner = if spoilt_context { null_mut() } else { context.0 };
    let expected = match (spoilt_context, spoilt) {
        (true, _) => wrong(FORGE_ERROR_NULL, "context"),
        (_, true) => out.spoil(random, "out_bytes"),
        _ => None,
    };
    // SAFETY: as above.
    let make = || unsafe { forge_context_workspace_bytes(owner, out.ptr()) };
    if call(tally, expected, &out, make) == FORGE_OK {
        assert_eq!(out.memory.read::<u64>(), 0);
    }
    let lent = Guarded::new(random.pick(&[0, 1, 256]));
    let data = random.pick(&[null_mut(), lent.ptr(), lent.ptr().wrapping_add(1)]);
    let bytes = if data == lent.ptr() { lent.bytes() as u64 } else { 0 };
    let expected = spoilt_context.then(|| wrong(FORGE_ERROR_NULL, "context")).flatten();
    let workspace = forge_buffer { data: data.cast(), bytes };
    // SAFETY: as above.
    let make = || unsafe { forge_context_set_workspace(owner, workspace) };
    call(tally, expected, &Out { memory: lent, offset: Some(0) }, make);
}

/// Strings that the library has for any number.
fn texts(random: &mut Random) {
    let number = random.any() as u32;
    // SAFETY: both are never NULL and NUL-terminated.
    let (name, version) =
        unsafe { (CStr::from_ptr(forge_status_name(number)), CStr::from_ptr(forge_version())) };
    let known = forge_status::ALL.iter().any(|s| *s as u32 == number);
    assert_eq!(known, name != c"FORGE_UNKNOWN_STATUS");
    assert_eq!(version.to_bytes().split(|b| *b == b'.').count(), 3, "{version:?}");
    assert_eq!(forge_abi_version(), FORGE_ABI_VERSION);
}

fn linear(context: &Context, world: &World, random: &mut Random, tally: &mut Tally, spoilt: bool) {
    if world.comm.is_null() {
        return;
    }
    let mut out = Out::new::<*mut forge_linear>(null_mut());
    let (mut c, name) = random_config(random, world.rank.size);
    c.rule = name.as_ptr();
    let mut pointer = Pointer::Good;
    let (mut owner, mut comm) = (context.0, world.comm);
    let unknown = random.pick(&[9, 1000, u32::MAX]);
    let huge = random.pick(&[u64::MAX, 1 << 62, 1 << 63, (1 << 61) + 1]);
    let strange = random_name(random);
    let expected = if !spoilt {
        None
    } else {
        match random.below(19) {
            0 => out.spoil(random, "out_linear"),
            1 => {
                pointer = Pointer::Null;
                wrong(FORGE_ERROR_NULL, "config")
            }
            2 => {
                pointer = Pointer::Misaligned;
                wrong(FORGE_ERROR_MISALIGNED, "config")
            }
            3 => {
                c.struct_size = random.pick(&[0, c.struct_size - 8, c.struct_size + 8]);
                wrong(FORGE_ERROR_STRUCT_SIZE, "config")
            }
            4 => {
                owner = null_mut();
                wrong(FORGE_ERROR_NULL, "context")
            }
            5 => {
                comm = random.pick(&[null_mut(), comm.wrapping_byte_add(1)]);
                let null = comm.is_null();
                wrong(if null { FORGE_ERROR_NULL } else { FORGE_ERROR_MISALIGNED }, "comm")
            }
            6 => {
                c.rule = null();
                wrong(FORGE_ERROR_NULL, "rule")
            }
            7 => {
                c.rule = strange.as_ptr();
                wrong(FORGE_ERROR_RULE, "rule")
            }
            8 => {
                // A bit that no rule knows, or Nesterov without a buffer.
                c.rule_flags = random.pick(&[64, 1 << 31, 2, 3]);
                wrong(FORGE_ERROR_RULE, "rule_flags")
            }
            9 => {
                c.factor_dtype = unknown;
                wrong(FORGE_ERROR_ENUM, "factor_dtype")
            }
            10 => {
                c.factor_dtype = random.pick(&[0, 4, 5]);
                wrong(FORGE_ERROR_UNSUPPORTED, "factor_dtype")
            }
            11 => {
                let (name, field) = random.pick(&[("weight_format", 0), ("weight_rounding", 1)]);
                *[&mut c.weight_format, &mut c.weight_rounding][field] = unknown;
                wrong(FORGE_ERROR_ENUM, name)
            }
            12 => {
                c.state_rounding = unknown;
                wrong(FORGE_ERROR_ENUM, "state_rounding")
            }
            13 if c.rule_flags & 4 != 0 || name != c"sgd" => {
                c.state_formats[0] = unknown;
                wrong(FORGE_ERROR_ENUM, "state_formats[0]")
            }
            14 => {
                c.parallel = unknown;
                wrong(FORGE_ERROR_ENUM, "parallel")
            }
            15 => {
                c.reduce_dgrad = unknown;
                wrong(FORGE_ERROR_ENUM, "reduce_dgrad")
            }
            16 => {
                (c.parallel, c.sequence_parallel) = (0, 1);
                wrong(FORGE_ERROR_UNSUPPORTED, "sequence_parallel")
            }
            17 if world.rank.size > 1 => {
                let column = random.percent(50);
                let one_more = |n: u64| n * world.rank.size as u64 + 1;
                if column {
                    c.out_features = one_more(c.out_features);
                } else {
                    c.in_features = one_more(c.in_features);
                }
                c.parallel = if column { 1 } else { 2 };
                wrong(FORGE_ERROR_SHARD, if column { "out_features" } else { "in_features" })
            }
            _ => {
                let features =
                    if random.percent(50) { &mut c.out_features } else { &mut c.in_features };
                *features = random.pick(&[0, huge]);
                let zero = *features == 0;
                wrong(if zero { FORGE_ERROR_SHAPE } else { FORGE_ERROR_OVERFLOW }, "features")
            }
        }
    };
    // SAFETY: as above.
    let status = call(tally, expected, &out, || unsafe {
        forge_linear_new(owner, comm, pointer.of(&c), out.ptr())
    });
    if status == FORGE_OK {
        // SAFETY: just made.
        unsafe { forge_linear_free(out.memory.read()) };
    }
}

/// A name that is no rule's: any bytes, perhaps not UTF-8, perhaps long.
fn random_name(random: &mut Random) -> CString {
    let length = random.pick(&[0, 1, 5, 4000]);
    let bytes = (0..length).map(|_| 1 + random.below(255) as u8).chain(*b"!").collect::<Vec<_>>();
    CString::new(bytes).expect("no zero among 1..=255")
}

fn layout_and_workspace(world: &World, random: &mut Random, tally: &mut Tally, spoilt: bool) {
    if random.percent(50) {
        let mut value = sized::<forge_layout>();
        let short = spoilt && random.percent(50);
        if short {
            value.struct_size = random.pick(&[0, value.struct_size - 32, u32::MAX]);
        }
        let mut out = Out::new(value);
        let expected = match (spoilt, short) {
            (false, _) => None,
            (_, true) => wrong(FORGE_ERROR_STRUCT_SIZE, "out"),
            _ => out.spoil(random, "out"),
        };
        let linear = world.linear;
        // SAFETY: as above.
        let make = || unsafe { forge_linear_layout(linear, out.ptr()) };
        call(tally, expected, &out, make);
        return;
    }
    let mut out = Out::new(0u64);
    let ranks = world.ranks() as u64;
    let splits = world.config.sequence_parallel == 1 && ranks > 1;
    let mut tokens = ranks * random.below(1 << 20) as u64;
    let mut mode = random.below(3) as u32;
    let mut expected = None;
    if spoilt {
        expected = match random.below(4) {
            0 => out.spoil(random, "out_bytes"),
            3 => {
                mode = random.pick(&[3, u32::MAX]);
                wrong(FORGE_ERROR_ENUM, "mode")
            }
            1 if splits => {
                tokens += 1;
                wrong(FORGE_ERROR_SHARD, "tokens")
            }
            _ => {
                tokens = random.pick(&[u64::MAX, 1 << 60]);
                wrong(FORGE_ERROR_OVERFLOW, "tokens")
            }
        };
    }
    // SAFETY: as above.
    let make = || unsafe { forge_linear_workspace(world.linear, mode, tokens, out.ptr()) };
    let status = call(tally, expected, &out, make);
    if status == FORGE_OK && !splits {
        let gathered: u64 = out.memory.read();
        assert_eq!(gathered > 0, world.config.sequence_parallel == 1 && tokens > 0);
    }
}

fn plan(world: &World, random: &mut Random, tally: &mut Tally, spoilt: bool) {
    let mut value = sized::<forge_plan>();
    let ranks = world.ranks() as u64;
    let mut request = sized::<forge_plan_request>();
    request.schedule = random.pick(&[0, 2, 3]);
    request.tokens_per_micro_batch = ranks * random.below(1 << 20) as u64;
    request.micro_batches = random.pick(&[1, 4, u32::MAX]);
    request.needs_norm = random.pick(&[0, 1]);
    let mut expected = None;
    if spoilt {
        expected = match random.below(7) {
            0 => {
                value.struct_size = random.pick(&[0, 8]);
                wrong(FORGE_ERROR_STRUCT_SIZE, "out")
            }
            1 => {
                request.struct_size = random.pick(&[0, u32::MAX]);
                wrong(FORGE_ERROR_STRUCT_SIZE, "request")
            }
            2 => {
                request.schedule = random.pick(&[4, u32::MAX]);
                wrong(FORGE_ERROR_ENUM, "schedule")
            }
            3 => {
                request.needs_norm = 2;
                wrong(FORGE_ERROR_ENUM, "needs_norm")
            }
            4 => {
                request.micro_batches = 0;
                request.schedule = 0;
                wrong(FORGE_ERROR_SHAPE, "micro_batches")
            }
            5 => {
                request.tokens_per_micro_batch = u64::MAX;
                wrong(FORGE_ERROR_OVERFLOW, "tokens")
            }
            _ => {
                request.schedule = forge_schedule::FORGE_SCHEDULE_IMMEDIATE as u32;
                request.needs_norm = 1;
                wrong(FORGE_ERROR_UNSUPPORTED, "schedule")
            }
        };
    }
    let out = Out::new(value);
    // SAFETY: as above.
    let make = || unsafe { forge_linear_plan(world.linear, &request, out.ptr()) };
    if call(tally, expected, &out, make) == FORGE_OK {
        let plan: forge_plan = out.memory.read();
        assert!((1..=3).contains(&plan.schedule), "a plan is never AUTO");
        assert_eq!(plan.gradient_bytes, world.layout.accumulator.bytes);
        assert!(plan.reason[0] != 0 && plan.reason.contains(&0));
    }
}

fn rules(random: &mut Random, tally: &mut Tally, spoilt: bool) {
    let mut value = sized::<forge_rule_info>();
    let name = random_name(random);
    let mut index = random.below(forge_rule_count() as usize) as u32;
    let by_name = random.percent(50);
    let mut pointer: *const c_char = c"adamw".as_ptr();
    let mut flags = 1;
    let mut expected = None;
    if spoilt {
        expected = match random.below(3) {
            0 => {
                value.struct_size = 0;
                wrong(FORGE_ERROR_STRUCT_SIZE, "out")
            }
            1 if by_name => {
                pointer = random.pick(&[null(), name.as_ptr()]);
                let null = pointer.is_null();
                wrong(if null { FORGE_ERROR_NULL } else { FORGE_ERROR_RULE }, "rule")
            }
            _ if by_name => {
                flags = random.pick(&[2, 4, u32::MAX]);
                wrong(FORGE_ERROR_RULE, "rule_flags")
            }
            _ => {
                index = random.pick(&[forge_rule_count(), u32::MAX]);
                wrong(FORGE_ERROR_RULE, "index")
            }
        };
    }
    let out = Out::new(value);
    // SAFETY: as above.
    call(tally, expected, &out, || unsafe {
        if by_name {
            forge_rule_find(pointer, flags, out.ptr())
        } else {
            forge_rule_get(index, out.ptr())
        }
    });
}

/// A log callback that looks at all it is given.
unsafe extern "C" fn read_line(
    _: *mut c_void,
    level: u32,
    target: *const c_char,
    message: *const c_char,
) {
    // SAFETY: both live during the call and end in NUL, as the header says.
    let (target, message) = unsafe { (CStr::from_ptr(target), CStr::from_ptr(message)) };
    assert!((1..=5).contains(&level) && !target.is_empty());
    assert!(message.to_str().is_ok());
}

fn scalars(random: &mut Random, tally: &mut Tally, spoilt: bool) {
    if random.percent(20) {
        let level = if spoilt { 6 + random.below(100) as u32 } else { random.below(6) as u32 };
        let expected = spoilt.then(|| wrong(FORGE_ERROR_ENUM, "max_level")).flatten();
        let out = Out::new(0u64);
        let callback: forge_log_callback = if random.percent(50) { Some(read_line) } else { None };
        call(tally, expected, &out, || forge_set_log_callback(callback, null_mut(), level));
        return;
    }
    let mut norm = Out::new(0.0f64);
    let coefficient = Out::new(0.0f64);
    let mut arguments = [
        random.pick(&[0.0, 4.0, 1e300, f64::INFINITY, f64::NAN]),
        random.pick(&[1.0, -2.0, 1e-30]),
        random.pick(&[0.0, -1.0, 1.0, f64::INFINITY]),
    ];
    let [sum, scale, most] = arguments;
    let mut expected = None;
    if spoilt {
        expected = match random.below(4) {
            0 => norm.spoil(random, "out_norm"),
            1 => {
                arguments[0] = random.pick(&[-1.0, f64::NEG_INFINITY]);
                wrong(FORGE_ERROR_SCALAR, "sum_of_squares")
            }
            2 => {
                arguments[1] = random.pick(&[f64::NAN, f64::INFINITY]);
                wrong(FORGE_ERROR_SCALAR, "grad_scale")
            }
            _ => {
                arguments[2] = f64::NAN;
                wrong(FORGE_ERROR_SCALAR, "max_norm")
            }
        };
    }
    let [a, b, c] = arguments;
    // SAFETY: as above.
    let make = || unsafe { forge_clip_coefficient(a, b, c, norm.ptr(), coefficient.ptr()) };
    if call(tally, expected, &norm, make) == FORGE_OK {
        let (got_norm, got): (f64, f64) = (norm.memory.read(), coefficient.memory.read());
        let wanted = scale.abs() * sum.sqrt();
        assert!(got_norm == wanted || (got_norm.is_nan() && wanted.is_nan()));
        if !wanted.is_finite() {
            assert_eq!(got, 0.0);
        } else if most > 0.0 && most < wanted {
            assert!((got.abs() * sum.sqrt() / most - 1.0).abs() < 1e-5);
        } else if most <= 0.0 {
            assert_eq!(got, scale);
        }
        assert!(coefficient.memory.guards_are_intact());
    }
}
