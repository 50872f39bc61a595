//! A stream beside the caller's, for communication: the two are ordered by events, and no host waits.

use super::super::Stream;
use super::driver::{Device, check};
use crate::error::Result;
use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUresult, CUstream, CUstream_flags};
use std::ffi::c_void;
use std::sync::Arc;

/// The stream and its events.
pub struct SideStream {
    device: Arc<Device>,
    stream: CUstream,
    /// The caller's stream has come to where its results are needed here.
    ready: CUevent,
    /// This stream's work is done.
    done: CUevent,
}

// SAFETY: handles of the driver, which may be used from any thread.
unsafe impl Send for SideStream {}
// SAFETY: as above; whoever shares it takes turns, or events would be recorded over.
unsafe impl Sync for SideStream {}

impl SideStream {
    /// Of the highest priority: what it does is short, and others wait for it.
    pub fn new(device: Arc<Device>) -> Result<Self> {
        let none = std::ptr::null_mut();
        let mut out =
            Self { device: device.clone(), stream: none, ready: none.cast(), done: none.cast() };
        let _entered = device.enter()?;
        let (mut least, mut greatest) = (0, 0);
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the context is current, the results are live. What fails in between is dropped with `out`.
        unsafe {
            check(
                "cuCtxGetStreamPriorityRange",
                sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest),
            )?;
            let unordered = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            let made = sys::cuStreamCreateWithPriority(&mut out.stream, unordered, greatest);
            check("cuStreamCreateWithPriority", made)?;
            check("cuEventCreate", sys::cuEventCreate(&mut out.ready, flags))?;
            check("cuEventCreate", sys::cuEventCreate(&mut out.done, flags))?;
        }
        Ok(out)
    }

    /// As C names it.
    pub fn handle(&self) -> *mut c_void {
        self.stream.cast()
    }

    /// What is enqueued here from now on comes after what `stream` has now.
    pub fn follow(&self, stream: Stream) -> Result<()> {
        // SAFETY: live handles; the caller's stream is of this context.
        unsafe { order(stream.0.cast(), self.ready, self.stream) }
    }

    /// What `stream` gets from now on comes after what is enqueued here now.
    pub fn lead(&self, stream: Stream) -> Result<()> {
        // SAFETY: as above.
        unsafe { order(self.stream, self.done, stream.0.cast()) }
    }

    /// Whether all is done that was enqueued before the last [`SideStream::lead`]. Of what was captured in a
    /// graph nobody can tell.
    pub fn idle(&self) -> bool {
        // SAFETY: a live handle.
        unsafe { sys::cuEventQuery(self.done) != CUresult::CUDA_ERROR_NOT_READY }
    }
}

/// Work of `later` from now on comes after work of `earlier` so far.
///
/// # Safety
/// Live handles of the current context.
unsafe fn order(earlier: CUstream, event: CUevent, later: CUstream) -> Result<()> {
    // SAFETY: as promised by the caller.
    unsafe {
        check("cuEventRecord", sys::cuEventRecord(event, earlier))?;
        check("cuStreamWaitEvent", sys::cuStreamWaitEvent(later, event, 0))
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: live handles, or null where making them failed; the driver keeps them until their work is
        // done.
        unsafe {
            for event in [self.ready, self.done] {
                if !event.is_null() {
                    let _ = sys::cuEventDestroy_v2(event);
                }
            }
            if !self.stream.is_null() {
                let _ = sys::cuStreamDestroy_v2(self.stream);
            }
        }
    }
}
