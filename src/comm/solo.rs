//! One rank: every collective is a copy or nothing.

use super::Comm;
use crate::backend::Stream;
use crate::error::Result;
use crate::format::Dtype;

/// The communicator of a rank that shares its weights with nobody.
pub struct Solo;

impl Comm for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn is_of_host_memory(&self) -> bool {
        true
    }

    unsafe fn all_gather(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: Dtype,
        _stream: Stream,
    ) -> Result<()> {
        // SAFETY: both are valid for `count` elements when there is one rank.
        unsafe { std::ptr::copy(send, recv, count * dtype.bytes()) };
        Ok(())
    }

    unsafe fn all_to_all(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: Dtype,
        stream: Stream,
    ) -> Result<()> {
        // SAFETY: as promised by the caller; with one rank both operations are the same copy.
        unsafe { self.all_gather(send, recv, count, dtype, stream) }
    }

    unsafe fn reduce_scatter(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: Dtype,
        stream: Stream,
    ) -> Result<()> {
        // SAFETY: as promised by the caller; with one rank both operations are the same copy.
        unsafe { self.all_gather(send, recv, count, dtype, stream) }
    }

    unsafe fn all_reduce(
        &self,
        _buffer: *mut u8,
        _count: usize,
        _dtype: Dtype,
        _stream: Stream,
    ) -> Result<()> {
        Ok(())
    }

    fn wait(&self, _stream: Stream) -> Result<()> {
        Ok(())
    }
}
