//! Collectives over NCCL, on a stream of their own beside the caller's.
//!
//! An operation comes after what the caller's stream has when it is enqueued; [`Comm::wait`] makes the caller's
//! stream come after it. The host waits for neither, but for a communicator to be made. So a rank that is lost
//! is found when somebody looks: at the next operation, and at [`Comm::check`].

mod library;

pub use library::{ID_BYTES, Nccl, UniqueId};

use super::Comm;
use crate::backend::Stream;
use crate::backend::cuda::driver::Device;
use crate::backend::cuda::side_stream::SideStream;
use crate::error::{Error, Result, bail};
use crate::format::Dtype;
use library::{Handle, IN_PROGRESS, SUM};
use std::ffi::c_int;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What may change while others look.
struct State {
    /// Null once it has been aborted.
    handle: Handle,
    /// Why it was.
    broken: Option<Error>,
    /// Whether there is work that no stream of the caller's comes after yet.
    unordered: bool,
    /// Since when there has been work that is not known to be done.
    busy_since: Option<Instant>,
}

// SAFETY: NCCL's communicators may be used from any thread, one at a time.
unsafe impl Send for State {}

/// A rank among those of an NCCL communicator.
pub struct NcclComm {
    nccl: Arc<Nccl>,
    device: Arc<Device>,
    side: SideStream,
    rank: usize,
    size: usize,
    /// Whether it was made here, and ends here.
    owned: bool,
    timeout: Duration,
    state: Mutex<State>,
}

impl NcclComm {
    /// Rank `rank` of `size`, all of which call this with the same id; waits for all of them.
    pub fn new(
        device: Arc<Device>,
        id: UniqueId,
        rank: usize,
        size: usize,
        timeout: Duration,
    ) -> Result<Self> {
        if size == 0 || rank >= size || size > c_int::MAX as usize {
            bail!(FORGE_ERROR_RANK, "rank: {rank} is not below size {size}");
        }
        let nccl = Nccl::get()?;
        let side = SideStream::new(device.clone())?;
        let _entered = device.enter()?;
        // SAFETY: the context is current.
        let (result, handle) = unsafe { nccl.init(size as c_int, id, rank as c_int) };
        let out = Self::of(nccl, device.clone(), side, (rank, size), handle, true, timeout);
        out.accept("ncclCommInitRankConfig", result, &mut out.lock())?;
        Ok(out)
    }

    /// A communicator that somebody else made and ends; it is used until then.
    ///
    /// # Safety
    /// `handle` is a live `ncclComm_t` of the device, used by no other thread during a call.
    pub unsafe fn borrowed(device: Arc<Device>, handle: Handle, timeout: Duration) -> Result<Self> {
        let nccl = Nccl::get()?;
        let side = SideStream::new(device.clone())?;
        // SAFETY: as promised by the caller.
        let place = unsafe { nccl.place(handle)? };
        Ok(Self::of(nccl, device, side, place, handle, false, timeout))
    }

    fn of(
        nccl: Arc<Nccl>,
        device: Arc<Device>,
        side: SideStream,
        (rank, size): (usize, usize),
        handle: Handle,
        owned: bool,
        timeout: Duration,
    ) -> Self {
        let state = Mutex::new(State { handle, broken: None, unordered: false, busy_since: None });
        Self { nccl, device, side, rank, size, owned, timeout, state }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing is left half-written by a panic while it was held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes NCCL's result: waits while it is in progress, and gives up on the communicator if it is a failure or
    /// takes too long.
    fn accept(&self, what: &str, mut result: c_int, state: &mut State) -> Result<()> {
        let begin = Instant::now();
        while result == IN_PROGRESS {
            if begin.elapsed() > self.timeout {
                let seconds = self.timeout.as_secs_f64();
                return self.give_up(state, &format!(
                    "{what}: not done after {seconds:.1} s; a rank is missing, stuck or in another collective"
                ));
            }
            std::thread::sleep(Duration::from_micros(50));
            // SAFETY: the communicator is live: nobody has given it up.
            result = unsafe { self.nccl.async_error(state.handle) };
        }
        if result != 0 {
            // SAFETY: the communicator is live: nobody has given it up.
            let words = unsafe { self.nccl.words(result, state.handle) };
            return self.give_up(state, &format!("{what}: {words}"));
        }
        Ok(())
    }

    /// Aborts the communicator, so that what waits for lost ranks ends; the error that says so.
    fn give_up<T>(&self, state: &mut State, why: &str) -> Result<T> {
        if self.owned && !state.handle.is_null() {
            // SAFETY: it was made here, and is not used again.
            unsafe { self.nccl.abort(state.handle) };
        }
        state.handle = std::ptr::null_mut();
        let (rank, size) = (self.rank, self.size);
        let error = Error::new(
            crate::error::forge_status::FORGE_ERROR_COLLECTIVE,
            format!(
                "rank {rank} of {size}: {why}; weights may differ between ranks: resume from a checkpoint"
            ),
        );
        state.broken = Some(error.clone());
        Err(error)
    }

    /// Whether all is well so far.
    fn look(&self, state: &mut State) -> Result<()> {
        if let Some(error) = &state.broken {
            return Err(error.clone());
        }
        // SAFETY: the communicator is live: nobody has given it up.
        let result = unsafe { self.nccl.async_error(state.handle) };
        if result != 0 && result != IN_PROGRESS {
            return self.accept("a collective", result, state);
        }
        match state.busy_since {
            Some(_) if !state.unordered && self.side.idle() => state.busy_since = None,
            Some(since) if since.elapsed() > self.timeout => {
                let seconds = self.timeout.as_secs_f64();
                return self.give_up(state, &format!(
                    "a collective is not done after {seconds:.1} s; a rank is missing, stuck or in another one"
                ));
            }
            _ => {}
        }
        Ok(())
    }

    /// Enqueues an operation behind what `stream` has.
    fn enqueue(
        &self,
        what: &str,
        stream: Stream,
        operation: impl FnOnce(&Nccl, Handle) -> c_int,
    ) -> Result<()> {
        let mut state = self.lock();
        let _entered = self.device.enter()?;
        self.look(&mut state)?;
        self.side.follow(stream)?;
        let result = operation(&self.nccl, state.handle);
        self.accept(what, result, &mut state)?;
        state.busy_since.get_or_insert_with(Instant::now);
        state.unordered = true;
        Ok(())
    }
}

/// `ncclDataType_t`.
fn number(dtype: Dtype) -> Result<c_int> {
    Ok(match dtype {
        Dtype::U8 => 1,
        Dtype::F16 => 6,
        Dtype::F32 => 7,
        Dtype::Bf16 => 9,
        Dtype::U16 => bail!(FORGE_ERROR_UNSUPPORTED, "dtype: {dtype:?} is none of NCCL's"),
    })
}

impl Comm for NcclComm {
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
        stream: Stream,
    ) -> Result<()> {
        let (dtype, on) = (number(dtype)?, self.side.handle());
        // SAFETY: buffers as promised by the caller; the stream is of the communicator's device.
        self.enqueue("ncclAllGather", stream, |nccl, comm| unsafe {
            (nccl.all_gather)(send.cast(), recv.cast(), count, dtype, comm, on)
        })
    }

    unsafe fn reduce_scatter(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: Dtype,
        stream: Stream,
    ) -> Result<()> {
        let (dtype, on) = (number(dtype)?, self.side.handle());
        // SAFETY: as above.
        self.enqueue("ncclReduceScatter", stream, |nccl, comm| unsafe {
            (nccl.reduce_scatter)(send.cast(), recv.cast(), count, dtype, SUM, comm, on)
        })
    }

    unsafe fn all_to_all(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: Dtype,
        stream: Stream,
    ) -> Result<()> {
        let (on, size, bytes) = (self.side.handle(), self.size, count * dtype.bytes());
        let dtype = number(dtype)?;
        // SAFETY: as above; a group of sends and receives is one operation.
        self.enqueue("ncclSend and ncclRecv", stream, |nccl, comm| unsafe {
            let mut first = (nccl.group_start)();
            for peer in 0..size {
                let (from, to) = (send.add(peer * bytes).cast(), recv.add(peer * bytes).cast());
                for result in [
                    (nccl.send)(from, count, dtype, peer as c_int, comm, on),
                    (nccl.recv)(to, count, dtype, peer as c_int, comm, on),
                ] {
                    if first == 0 || first == IN_PROGRESS {
                        first = result;
                    }
                }
            }
            let end = (nccl.group_end)();
            if first == 0 || first == IN_PROGRESS { end } else { first }
        })
    }

    unsafe fn all_reduce(
        &self,
        buffer: *mut u8,
        count: usize,
        dtype: Dtype,
        stream: Stream,
    ) -> Result<()> {
        let (dtype, on) = (number(dtype)?, self.side.handle());
        // SAFETY: as above.
        self.enqueue("ncclAllReduce", stream, |nccl, comm| unsafe {
            (nccl.all_reduce)(buffer.cast(), buffer.cast(), count, dtype, SUM, comm, on)
        })
    }

    fn wait(&self, stream: Stream) -> Result<()> {
        let mut state = self.lock();
        if state.unordered {
            let _entered = self.device.enter()?;
            self.side.lead(stream)?;
            state.unordered = false;
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let mut state = self.lock();
        let _entered = self.device.enter()?;
        self.look(&mut state)
    }
}

impl Drop for NcclComm {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !self.owned || state.handle.is_null() {
            return;
        }
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: made here, and not used again.
        unsafe {
            if !self.nccl.destroy(state.handle, self.timeout) {
                self.nccl.abort(state.handle);
            }
        }
    }
}
