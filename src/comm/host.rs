//! The caller's own collectives (gloo, MPI, …) as C callbacks.

use super::Comm;
use crate::backend::Stream;
use crate::error::{Result, bail};
use crate::format::Dtype;
use std::ffi::c_void;

type Gather = unsafe extern "C" fn(*mut c_void, *const c_void, *mut c_void, u64, u32) -> i32;
type Reduce = unsafe extern "C" fn(*mut c_void, *mut c_void, u64, u32) -> i32;
type Wait = unsafe extern "C" fn(*mut c_void) -> i32;

/// The callbacks, and what they are called with.
#[derive(Clone, Copy)]
pub struct Collectives {
    /// First argument of every callback.
    pub user: *mut c_void,
    /// `(user, send, recv, send_count, dtype)`.
    pub all_gather: Gather,
    /// `(user, send, recv, recv_count, dtype)`.
    pub reduce_scatter: Gather,
    /// `(user, buffer, count, dtype)`.
    pub all_reduce: Reduce,
    /// `(user)`; None where the callbacks return only when they are complete.
    pub wait: Option<Wait>,
    /// `(user, send, recv, count for each rank, dtype)`; None where nobody needs it.
    pub all_to_all: Option<Gather>,
}

/// A rank among several.
pub struct Host {
    rank: usize,
    size: usize,
    collectives: Collectives,
}

// SAFETY: the C ABI's contract says that the callbacks may be called from the thread that calls
// FORGE, whichever that is; `user` is only handed back to them.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

impl Host {
    /// Rank `rank` of `size`.
    pub fn new(rank: usize, size: usize, collectives: Collectives) -> Result<Self> {
        if size == 0 || rank >= size {
            bail!(FORGE_ERROR_RANK, "rank: {rank} is not below size {size}");
        }
        Ok(Self { rank, size, collectives })
    }

    fn check(&self, what: &str, code: i32) -> Result<()> {
        if code != 0 {
            let (rank, size) = (self.rank, self.size);
            bail!(
                FORGE_ERROR_COLLECTIVE,
                "{what}: the caller's collective returned {code} on rank {rank} of {size}"
            );
        }
        Ok(())
    }
}

/// The number of `dtype` at the C ABI.
fn code(dtype: Dtype) -> u32 {
    crate::ffi::dtype_code(dtype)
}

impl Comm for Host {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    unsafe fn all_gather(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: Dtype,
        _stream: Stream,
    ) -> Result<()> {
        let c = &self.collectives;
        // SAFETY: buffers as promised by the caller; the callback as promised by the C ABI's.
        let status =
            unsafe { (c.all_gather)(c.user, send.cast(), recv.cast(), count as u64, code(dtype)) };
        self.check("all_gather", status)
    }

    unsafe fn reduce_scatter(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: Dtype,
        _stream: Stream,
    ) -> Result<()> {
        let c = &self.collectives;
        // SAFETY: as above.
        let status = unsafe {
            (c.reduce_scatter)(c.user, send.cast(), recv.cast(), count as u64, code(dtype))
        };
        self.check("reduce_scatter", status)
    }

    unsafe fn all_to_all(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: Dtype,
        _stream: Stream,
    ) -> Result<()> {
        self.check_complete()?;
        let Some(all_to_all) = self.collectives.all_to_all else { return Ok(()) };
        let user = self.collectives.user;
        // SAFETY: as above.
        let status =
            unsafe { all_to_all(user, send.cast(), recv.cast(), count as u64, code(dtype)) };
        self.check("all_to_all", status)
    }

    fn check_complete(&self) -> Result<()> {
        if self.collectives.all_to_all.is_none() {
            bail!(
                FORGE_ERROR_NULL,
                "all_to_all: the caller's collectives have none, and data parallelism needs it"
            );
        }
        Ok(())
    }

    unsafe fn all_reduce(
        &self,
        buffer: *mut u8,
        count: usize,
        dtype: Dtype,
        _stream: Stream,
    ) -> Result<()> {
        let c = &self.collectives;
        // SAFETY: as above.
        let status = unsafe { (c.all_reduce)(c.user, buffer.cast(), count as u64, code(dtype)) };
        self.check("all_reduce", status)
    }

    fn wait(&self, _stream: Stream) -> Result<()> {
        let Some(wait) = self.collectives.wait else { return Ok(()) };
        // SAFETY: the callback is as promised by the C ABI's contract.
        self.check("wait", unsafe { wait(self.collectives.user) })
    }
}
