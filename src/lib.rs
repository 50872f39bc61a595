//! FORGE trains linear layers without a weight gradient: each tile of `dW = dYᵀX` is consumed by the
//! optimizer's rule where it was produced and never becomes a tensor.
//!
//! The way through the code, top to bottom (nothing flows back up):
//!
//! | module | what it is |
//! |---|---|
//! | [`ffi`] | the whole C ABI and nothing else |
//! | [`linear`] | one sharded linear layer: shapes, formats, and the order of events of a backward |
//! | [`comm`] | what is gathered or reduced over tensor-parallel ranks |
//! | [`backend`] | tiles on a device; here the CPU's thread pool |
//! | [`rule`] | element-wise optimizer rules, one file each |
//! | [`format`](mod@format) | how weights and states are stored |
//! | [`philox`] | the random numbers of stochastic rounding |

pub mod backend;
pub mod comm;
pub mod error;
pub mod ffi;
pub mod format;
pub mod linear;
mod log;
pub mod philox;
mod process;
pub mod rule;
