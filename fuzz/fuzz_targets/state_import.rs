//! Checkpoints through import and export; see `tests/fuzz_abi/images.rs`.
#![no_main]

#[allow(dead_code)]
#[path = "../../tests/fuzz_abi/mod.rs"]
mod fuzz_abi;

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz_abi::images::run(input));
