//! Streams beside the caller's, for launches that share the GPU with each other.

use super::super::Stream;
use super::driver::{Device, check};
use crate::error::Result;
use cudarc::driver::sys::{self, CUevent, CUstream};
use std::ptr::null_mut;
use std::sync::{Arc, OnceLock};

/// Half as many again as blocks of small weights find room for, so that the next ones wait for theirs while
/// the last ones end.
const STREAMS: usize = 24;

/// Streams that begin where a stream of the caller's is, and that it waits for. In a captured graph they are
/// branches.
pub struct SideStreams {
    device: Arc<Device>,
    made: OnceLock<Made>,
}

struct Made {
    forked: CUevent,
    streams: Vec<(CUstream, CUevent)>,
}

// SAFETY: handles of the driver, which may be used from any thread.
unsafe impl Send for Made {}
// SAFETY: as above.
unsafe impl Sync for Made {}

impl Made {
    /// The context is current.
    fn new() -> Result<Self> {
        let mut made = Self { forked: event()?, streams: Vec::new() };
        for _ in 0..STREAMS {
            let mut stream = null_mut();
            let flag = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            // SAFETY: the context is current; the result is a live pointer.
            check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut stream, flag) })?;
            made.streams.push((stream, event()?));
        }
        Ok(made)
    }
}

fn event() -> Result<CUevent> {
    let mut event = null_mut();
    let flag = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
    // SAFETY: the context is current; the result is a live pointer.
    check("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, flag) })?;
    Ok(event)
}

impl SideStreams {
    /// None yet.
    pub fn new(device: Arc<Device>) -> Self {
        Self { device, made: OnceLock::new() }
    }

    /// Makes them, once. Not while a graph is captured.
    ///
    /// # Safety
    /// The context is current.
    pub unsafe fn prepare(&self) -> Result<()> {
        if self.made.get().is_none() {
            // Who comes second wastes some.
            let _ = self.made.set(Made::new()?);
        }
        Ok(())
    }

    /// Calls `enqueue(stream)` for each of the `items` in turn, on as many streams as there are; none where
    /// nobody prepared them. The caller's stream goes on behind all of them, also after an error.
    ///
    /// # Safety
    /// The context is current; one thread at a time.
    pub unsafe fn spread<T>(
        &self,
        items: &[T],
        stream: Stream,
        mut enqueue: impl FnMut(&T, Stream) -> Result<()>,
    ) -> Result<bool> {
        let Some(made) = self.made.get() else { return Ok(false) };
        let used = &made.streams[..items.len().min(STREAMS)];
        let main: CUstream = stream.0.cast();
        // SAFETY: as promised by the caller; handles of this context.
        unsafe {
            check("cuEventRecord", sys::cuEventRecord(made.forked, main))?;
            for (side, _) in used {
                check("cuStreamWaitEvent", sys::cuStreamWaitEvent(*side, made.forked, 0))?;
            }
            let sides = used.iter().map(|(side, _)| Stream(side.cast())).cycle();
            let done = items.iter().zip(sides).try_for_each(|(item, side)| enqueue(item, side));
            for (side, event) in used {
                check("cuEventRecord", sys::cuEventRecord(*event, *side))?;
                check("cuStreamWaitEvent", sys::cuStreamWaitEvent(main, *event, 0))?;
            }
            done.map(|()| true)
        }
    }
}

impl Drop for SideStreams {
    fn drop(&mut self) {
        let Some(made) = self.made.take() else { return };
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: the context is current; what was enqueued runs to its end.
        unsafe {
            for (stream, event) in made.streams {
                let _ = sys::cuStreamDestroy_v2(stream);
                let _ = sys::cuEventDestroy_v2(event);
            }
            let _ = sys::cuEventDestroy_v2(made.forked);
        }
    }
}
