//! The whole C ABI and nothing else: one file for each C object, one boundary for panics and errors.
//!
//! Conventions: `_new` makes, `_free` frees and accepts NULL, results go through `out_` pointers,
//! every function that can fail returns a [`forge_status`](crate::error::forge_status), and the
//! sentence behind the last failure of this thread is in [`error::forge_last_error`]. A failed call
//! of the 1xx band wrote nothing.

#![allow(non_camel_case_types, clippy::missing_safety_doc)]

mod boundary;
mod buffers;
pub mod comm;
pub mod context;
pub mod data_parallel;
pub mod enums;
pub mod error;
pub mod linear;
pub mod rule;
pub mod run;
pub mod types;
pub mod update_group;
pub mod warm;

pub(crate) use enums::dtype_code;

/// The ABI of this library. A header of another number does not fit it.
pub const FORGE_ABI_VERSION: u32 = 1;
/// States that a rule may have at most.
pub const FORGE_MAX_STATES: usize = 3;
/// Hyper-parameters that a rule may have at most.
pub const FORGE_MAX_HYPER: usize = 16;
/// Index of the learning rate in every rule's hyper-parameters.
pub const FORGE_HYPER_LR: usize = 0;
/// Index of the weight decay in every rule's hyper-parameters.
pub const FORGE_HYPER_WEIGHT_DECAY: usize = 1;
/// `rule_flags`: ascend instead of descend.
pub const FORGE_RULE_MAXIMIZE: u32 = 1;
/// `rule_flags`: Nesterov momentum.
pub const FORGE_RULE_NESTEROV: u32 = 2;
/// `rule_flags`: keep a momentum buffer.
pub const FORGE_RULE_MOMENTUM: u32 = 4;
/// `rule_flags`: keep the largest second moment so far, and divide by it.
pub const FORGE_RULE_AMSGRAD: u32 = 8;
/// `rule_flags`: keep an average of the gradient, and divide by its deviation.
pub const FORGE_RULE_CENTERED: u32 = 16;
/// `rule_flags`: apply weight decay to the weight instead of adding it to the gradient.
pub const FORGE_RULE_DECOUPLED: u32 = 32;

const _: () = {
    use crate::rule;
    assert!(FORGE_MAX_STATES == rule::MAX_STATES && FORGE_MAX_HYPER == rule::MAX_HYPER);
    assert!(FORGE_HYPER_LR == rule::LR && FORGE_HYPER_WEIGHT_DECAY == rule::WEIGHT_DECAY);
    assert!(FORGE_RULE_MAXIMIZE == rule::MAXIMIZE && FORGE_RULE_NESTEROV == rule::NESTEROV);
    assert!(FORGE_RULE_MOMENTUM == rule::MOMENTUM && FORGE_RULE_AMSGRAD == rule::AMSGRAD);
    assert!(FORGE_RULE_CENTERED == rule::CENTERED && FORGE_RULE_DECOUPLED == rule::DECOUPLED);
};

/// The ABI version of the library that is loaded; compare it with `FORGE_ABI_VERSION`.
#[unsafe(no_mangle)]
pub extern "C" fn forge_abi_version() -> u32 {
    FORGE_ABI_VERSION
}

/// The library's version, as `major.minor.patch`. Static.
#[unsafe(no_mangle)]
pub extern "C" fn forge_version() -> *const std::ffi::c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}
