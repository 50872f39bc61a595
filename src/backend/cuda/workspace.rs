//! The device memory that the caller lends, and what lies where in it. All of it is scratch of the work
//! on one stream.

use super::driver::DevicePtr;
use crate::error::{Result, bail};
use std::sync::Mutex;

/// fp32 panel of dW, small enough to stay in a large L2.
pub const PANEL_BYTES: u64 = 32 << 20;
/// What cuBLASLt may use.
pub const BLAS_BYTES: u64 = 16 << 20;
/// One `TilePartial` (16 bytes) for each tile of an update.
pub const PARTIALS_BYTES: u64 = 8 << 20;
/// Scalars of a step, results on their way to the host, and a kernel's own counters.
pub const CONTROL_BYTES: u64 = 64 << 10;
/// All of it.
pub const TOTAL_BYTES: u64 = PANEL_BYTES + BLAS_BYTES + PARTIALS_BYTES + CONTROL_BYTES;
const _: () = assert!(TOTAL_BYTES < 60 << 20);

/// `TilePartial`s that fit.
pub const MOST_PARTIALS: u64 = PARTIALS_BYTES / 16;

/// Where the regions begin; all 256-byte aligned.
#[derive(Clone, Copy, Debug)]
pub struct Workspace {
    /// [`PANEL_BYTES`].
    pub panel: DevicePtr,
    /// [`BLAS_BYTES`].
    pub blas: DevicePtr,
    /// [`PARTIALS_BYTES`].
    pub partials: DevicePtr,
    /// A `forge::StepScalars`, written by the prologue: the first 256 bytes of the control block.
    pub scalars: DevicePtr,
    /// A `forge_report` or `forge_norm` on its way to the host: the next 256 bytes.
    pub result: DevicePtr,
    /// The rest of the control block, [`Workspace::COUNTERS_BYTES`], for a kernel's own use.
    pub counters: DevicePtr,
}

impl Workspace {
    /// Bytes at [`Workspace::counters`].
    pub const COUNTERS_BYTES: u64 = CONTROL_BYTES - 512;

    /// Cuts up memory that starts here.
    pub fn at(base: DevicePtr) -> Self {
        let blas = base + PANEL_BYTES;
        let partials = blas + BLAS_BYTES;
        let control = partials + PARTIALS_BYTES;
        Self {
            panel: base,
            blas,
            partials,
            scalars: control,
            result: control + 256,
            counters: control + 512,
        }
    }
}

/// The workspace lent to a context.
#[derive(Default)]
pub struct Lent(Mutex<Option<Workspace>>);

impl Lent {
    /// Takes another one.
    pub fn set(&self, base: DevicePtr) {
        *self.lock() = Some(Workspace::at(base));
    }

    /// The one in use.
    pub fn get(&self) -> Result<Workspace> {
        let Some(workspace) = *self.lock() else {
            bail!(
                FORGE_ERROR_WORKSPACE,
                "workspace: the context was lent none; allocate forge_context_workspace_bytes \
                 ({TOTAL_BYTES}) of device memory and call forge_context_set_workspace"
            );
        };
        Ok(workspace)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Workspace>> {
        // A panic while the lock was held cannot leave the option broken.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
