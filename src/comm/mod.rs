//! What is gathered, exchanged or reduced over ranks.
//!
//! One trait, implemented by `solo`, `host` and `nccl`. Each operation is *enqueued* and [`Comm::wait`] is where the
//! compute side needs the results: an event on a communication stream under NCCL, the caller's own wait
//! under `host`.

mod host;
pub mod nccl;
mod solo;

pub use host::{Collectives, Host};
pub use solo::Solo;

use crate::backend::Stream;
use crate::error::Result;
use crate::format::Dtype;

/// A communicator of ranks: those that share out one W, or those that have a copy of it. Operations come after
/// what `stream` has.
pub trait Comm: Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn size(&self) -> usize;

    /// `recv` = every rank's `send` (`count` elements each), in order of rank. `send` may be this rank's part of
    /// `recv`.
    ///
    /// # Safety
    /// `send` is valid for `count`, `recv` for `count · size` elements until [`Comm::wait`].
    unsafe fn all_gather(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: Dtype,
        stream: Stream,
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
        stream: Stream,
    ) -> Result<()>;

    /// `recv` = of every rank's `send`, in order of rank, the part (`count` elements) that is for this one; parts
    /// are in order of rank, too.
    ///
    /// # Safety
    /// Both are valid for `count · size` elements until [`Comm::wait`], and apart.
    unsafe fn all_to_all(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: Dtype,
        stream: Stream,
    ) -> Result<()>;

    /// Whether it copies by itself, in the host's memory alone.
    fn is_of_host_memory(&self) -> bool {
        false
    }

    /// Refuses a communicator that has not every operation of the trait.
    fn check_complete(&self) -> Result<()> {
        Ok(())
    }

    /// `buffer` = the sum of every rank's.
    ///
    /// # Safety
    /// `buffer` is valid for `count` elements until [`Comm::wait`].
    unsafe fn all_reduce(
        &self,
        buffer: *mut u8,
        count: usize,
        dtype: Dtype,
        stream: Stream,
    ) -> Result<()>;

    /// Everything enqueued before is complete for what `stream` gets next.
    fn wait(&self, stream: Stream) -> Result<()>;

    /// Whether all is well, as far as can be told without waiting.
    fn check(&self) -> Result<()> {
        Ok(())
    }
}
