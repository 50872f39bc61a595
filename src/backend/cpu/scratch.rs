//! Memory of a thread that works on a tile: bounded by the tile, never by the weight.

use std::sync::Mutex;

/// The buffers of one tile in flight.
#[derive(Default)]
pub struct Scratch {
    /// The tile itself.
    pub tile: Vec<f32>,
    /// The left factor's chunk in fp32, unless it is fp32 already.
    pub left: Vec<f32>,
    /// The right factor's chunk.
    pub right: Vec<f32>,
}

/// Scratch that goes from one tile to the next; at most one for each thread.
#[derive(Default)]
pub struct ScratchPool(Mutex<Vec<Scratch>>);

impl ScratchPool {
    /// Runs `work` with a scratch of its own.
    pub fn with<T>(&self, work: impl FnOnce(&mut Scratch) -> T) -> T {
        let mut scratch = self.lock().pop().unwrap_or_default();
        let result = work(&mut scratch);
        self.lock().push(scratch);
        result
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Scratch>> {
        // A panic while the lock was held cannot leave the vector broken.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
