//! What is gathered or reduced over the tensor-parallel ranks.
//!
//! One trait; `solo` and `host` implement it here. An NCCL implementation belongs beside them: each
//! operation is *enqueued* and [`Comm::wait`] is where the compute side needs the results, which is
//! an event on a communication stream there and the caller's own wait here.

mod host;
mod solo;

pub use host::{Collectives, Host};
pub use solo::Solo;

use crate::error::Result;
use crate::format::Dtype;

/// A communicator of the ranks that share one W.
pub trait Comm: Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn size(&self) -> usize;

    /// `recv` = every rank's `send` (`count` elements each), in order of rank.
    ///
    /// # Safety
    /// `send` is valid for `count`, `recv` for `count · size` elements until [`Comm::wait`].
    unsafe fn all_gather(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: Dtype,
    ) -> Result<()>;

    /// `recv` = this rank's part (`count` elements) of the sum of every rank's `send`.
    ///
    /// # Safety
    /// `send` is valid for `count · size`, `recv` for `count` elements until [`Comm::wait`].
    unsafe fn reduce_scatter(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: Dtype,
    ) -> Result<()>;

    /// `buffer` = the sum of every rank's.
    ///
    /// # Safety
    /// `buffer` is valid for `count` elements until [`Comm::wait`].
    unsafe fn all_reduce(&self, buffer: *mut u8, count: usize, dtype: Dtype) -> Result<()>;

    /// Everything enqueued before is complete for what runs next.
    fn wait(&self) -> Result<()>;
}
