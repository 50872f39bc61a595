//! What to have ready before a run: the calls of a linear, described without their buffers.

use super::{Scheme, Shard};
use std::path::Path;

/// The calls that will be made of a linear.
#[derive(Clone)]
pub struct Work {
    /// How its parameter is stored and updated.
    pub scheme: Scheme,
    /// The shards that the ranks own; none: any shape.
    pub shards: Vec<Shard>,
    /// Tokens of a micro-batch; None: any number.
    pub tokens: Option<u64>,
    /// Segments that one call sums; None: any number.
    pub micro_batches: Option<u32>,
    /// Whether the scalars of a step will be in device memory as well.
    pub device_scalars: bool,
}

/// What warming did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Warmed {
    /// Images that were compiled.
    pub compiled: u64,
    /// Images that were there.
    pub present: u64,
    /// The compiler, 1000 · major + 10 · minor; 0 where nothing is ever compiled.
    pub compiler: u32,
}

/// One image, while it is made ready.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// What it is.
    pub what: &'a str,
    /// Its file.
    pub path: &'a Path,
    /// Whether it had to be compiled.
    pub compiled: bool,
    /// How long that took.
    pub seconds: f64,
}

/// Is told of each image, by one thread at a time.
pub type Tell<'a> = dyn FnMut(Progress) + Send + 'a;
