//! Rules of the caller's own, and kernels ahead of time, with anything in their structs.

use super::memory::Random;
use super::world::{Context, random_config, sized};
use forge::error::forge_status;
use forge::ffi::rule::forge_rule_register;
use forge::ffi::types::*;
use forge::ffi::warm::{forge_context_warm, forge_warm};
use std::ffi::{CStr, c_char, c_void};
use std::ptr::{null, null_mut};

/// Few names, since a rule that was registered stays.
const NAMES: &[&CStr] =
    &[c"fuzz_a", c"fuzz_b", c"adamw", c"1st", c"", c"\xff", c"a b", c"while", c"forge_c", c"x__y"];
const WORDS: &[&CStr] = &[
    c"lr",
    c"weight_decay",
    c"beta",
    c"m",
    c"v",
    c"w",
    c"g",
    c"step",
    c"int",
    c"",
    c"\xff\xfe",
    c"a-b",
];
const TEXTS: &[&CStr] = &[
    c"m = g; w -= lr * m;",
    c"w -= lr * g; // v",
    c"for (int i = 0; i < 8; ++i) { m += v; w -= m; }",
    c"for (int i = 0; i < 8; ++i) i",
    c"for",
    c"for (int i = 0; i < 99999999999999999999; ++i) w = m;",
    c"for (int i = -9223372036854775808; i <= 9223372036854775807; ++i) w = m;",
    c"/*/ w",
    c"/* w */ // m",
    c"}{",
    c"((((w",
    c"\xc3\xa4\xe2\x82\xac w m",
    c"\xff",
    c"",
    c"1.0 - pow(beta, step)",
    c"w = \"m\"",
];

unsafe extern "C" fn function(_user: *mut c_void, _tile: *const forge_rule_tile) -> i32 {
    0
}

fn string(random: &mut Random, from: &[&'static CStr]) -> *const c_char {
    if random.percent(5) { null() } else { random.pick(from).as_ptr() }
}

/// A definition whose parts fit each other by chance.
pub fn register(random: &mut Random) -> forge_status {
    let mut d = sized::<forge_rule_definition>();
    d.name = string(random, NAMES);
    d.hyper_names[0] = c"lr".as_ptr();
    d.hyper_names[1] = c"weight_decay".as_ptr();
    d.n_hyper = 2 + random.below(3) as u32;
    d.n_states = random.below(4) as u32;
    d.n_per_step = random.below(3) as u32;
    for name in &mut d.hyper_names[2..] {
        *name = string(random, WORDS);
    }
    d.hyper_most = [1.0; 16];
    d.state_names = [(); 3].map(|()| string(random, WORDS));
    for i in 0..16 {
        d.per_step_names[i] = string(random, WORDS);
        d.per_step_expressions[i] = string(random, TEXTS);
    }
    d.cuda_source = if random.percent(30) { null() } else { string(random, TEXTS) };
    d.cpu_function = random.percent(50).then_some(function as _);
    for _ in 0..random.below(3) {
        let number = random.any();
        match random.below(9) {
            0 => d.struct_size = number as u32,
            1 => d.n_hyper = number as u32,
            2 => d.n_states = number as u32,
            3 => d.n_per_step = number as u32,
            4 => d.state_kinds[random.below(3)] = number as u32,
            5 => d.reserved = number as u32,
            6 => d.hyper_defaults[random.below(16)] = f64::from_bits(number),
            7 => d.hyper_least[random.below(16)] = f64::from_bits(number),
            _ => d.hyper_most[random.below(16)] = f64::from_bits(number),
        }
    }
    let d = if random.percent(2) { null() } else { &raw const d };
    // SAFETY: all strings end in NUL, arrays have their sizes, the function touches nothing.
    unsafe { forge_rule_register(d) }
}

/// A cache that cannot be written, so that nothing is compiled.
pub fn warm(context: &Context, random: &mut Random) -> forge_status {
    let (linear, _name) = random_config(random, 1);
    let mut config = sized::<forge_warm_config>();
    config.architecture =
        string(random, &[c"sm_80", c"sm_90a", c"sm_", c"", c"\xff", c"compute_90"]);
    config.cache_dir = string(random, &[c"/dev/null/forge", c"", c"/proc/forge"]);
    config.linear = if random.percent(10) { null() } else { &linear };
    config.sm_count = random.any() as u32;
    config.ranks = random.any() as u32;
    config.micro_batches = random.any() as u32;
    config.tokens = random.any();
    config.device_scalars = random.any() as u32;
    config.threads = 1;
    if random.percent(20) {
        config.struct_size = random.any() as u32;
    }
    let mut report = sized::<forge_warm_report>();
    let out = if random.percent(10) { null_mut() } else { &raw mut report };
    // SAFETY: all pointers are NULL or to live values.
    unsafe {
        if random.percent(50) {
            forge_context_warm(context.0, &config, out)
        } else if config.cache_dir.is_null() {
            // The user's own cache is not a test's to fill.
            forge_warm(null(), out)
        } else {
            forge_warm(&config, out)
        }
    }
}
