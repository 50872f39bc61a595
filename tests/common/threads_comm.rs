//! A communicator between threads: each waits for all others, twice, so an operation is done when it returns.

use forge::backend::Stream;
use forge::comm::Comm;
use forge::error::Result;
use forge::format::{Dtype, bf16};
use std::sync::{Arc, Barrier, Mutex};

/// Where the ranks of one communicator meet.
pub struct Meeting {
    barrier: Barrier,
    sent: Mutex<Vec<usize>>,
}

/// A rank of it.
pub struct ThreadComm {
    meeting: Arc<Meeting>,
    rank: usize,
    size: usize,
}

impl ThreadComm {
    /// All ranks of a new one.
    pub fn group(size: usize) -> Vec<Arc<Self>> {
        let (barrier, sent) = (Barrier::new(size), Mutex::new(vec![0; size]));
        let meeting = Arc::new(Meeting { barrier, sent });
        (0..size).map(|rank| Arc::new(Self { meeting: meeting.clone(), rank, size })).collect()
    }

    /// Tells all ranks where this one's data are; calls `read` with those of all, and returns when all have read.
    fn meet<T>(&self, send: *const u8, read: impl FnOnce(&[usize]) -> T) -> T {
        self.meeting.sent.lock().unwrap()[self.rank] = send as usize;
        self.meeting.barrier.wait();
        let sent = self.meeting.sent.lock().unwrap().clone();
        let out = read(&sent);
        self.meeting.barrier.wait();
        out
    }

    /// The sum of `count` elements from `first` on, in order of rank.
    unsafe fn sum(&self, send: *const u8, first: usize, count: usize, dtype: Dtype) -> Vec<u8> {
        self.meet(send, |sent| {
            let mut out = Vec::new();
            for i in first..first + count {
                // SAFETY: every rank has sent as many elements.
                let values = sent.iter().map(|at| unsafe {
                    match dtype {
                        Dtype::F32 => *(*at as *const f32).add(i),
                        _ => bf16::join(*(*at as *const u16).add(i), 0),
                    }
                });
                let total: f32 = values.sum();
                match dtype {
                    Dtype::F32 => out.extend(total.to_ne_bytes()),
                    _ => out.extend(bf16::nearest(total).to_ne_bytes()),
                }
            }
            out
        })
    }
}

impl Comm for ThreadComm {
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
        let bytes = count * dtype.bytes();
        self.meet(send, |sent| {
            for (rank, at) in sent.iter().enumerate() {
                // SAFETY: as promised by the caller; what is sent may be a part of what is received.
                unsafe { std::ptr::copy(*at as *const u8, recv.add(rank * bytes), bytes) };
            }
        });
        Ok(())
    }

    unsafe fn reduce_scatter(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: Dtype,
        _stream: Stream,
    ) -> Result<()> {
        // SAFETY: as promised by the caller.
        unsafe {
            let sum = self.sum(send, self.rank * count, count, dtype);
            recv.copy_from(sum.as_ptr(), sum.len());
        }
        Ok(())
    }

    unsafe fn all_to_all(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: Dtype,
        _stream: Stream,
    ) -> Result<()> {
        let bytes = count * dtype.bytes();
        self.meet(send, |sent| {
            for (rank, at) in sent.iter().enumerate() {
                let from = (*at + self.rank * bytes) as *const u8;
                // SAFETY: as promised by the caller.
                unsafe { recv.add(rank * bytes).copy_from_nonoverlapping(from, bytes) };
            }
        });
        Ok(())
    }

    unsafe fn all_reduce(
        &self,
        buffer: *mut u8,
        count: usize,
        dtype: Dtype,
        _stream: Stream,
    ) -> Result<()> {
        // SAFETY: as promised by the caller.
        unsafe {
            let sum = self.sum(buffer, 0, count, dtype);
            buffer.copy_from(sum.as_ptr(), sum.len());
        }
        Ok(())
    }

    fn wait(&self, _stream: Stream) -> Result<()> {
        Ok(())
    }
}
