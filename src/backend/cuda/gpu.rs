//! What the parts of the CUDA backend share: the device, its modules, its workspace.

use super::super::Stream;
use super::blas::Blas;
use super::cache::Cache;
use super::compile::Nvrtc;
use super::driver::{Device, Properties, launch};
use super::module::Modules;
use super::sources::Source;
use super::workspace::Lent;
use crate::error::Result;
use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::Arc;

/// A GPU and what runs on it.
pub struct Gpu {
    /// Its context.
    pub device: Arc<Device>,
    /// Compiled kernels.
    pub modules: Modules,
    /// cuBLASLt.
    pub blas: Blas,
    /// What the caller lent.
    pub workspace: Lent,
}

/// A kernel to launch: from where, specialised how, with what shape.
pub struct Kernel<'a> {
    /// Its source.
    pub source: Source,
    /// `NAME=value`, for the compiler.
    pub defines: &'a [String],
    /// Its name: an `extern "C"` function of the source.
    pub name: &'a str,
    /// Names the specialisation in errors.
    pub what: &'a str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory.
    pub shared_bytes: u32,
}

impl Gpu {
    /// The GPU of this ordinal; compiled kernels are kept in `cache_dir`.
    pub fn new(ordinal: i32, cache_dir: Option<PathBuf>) -> Result<Self> {
        let device = Arc::new(Device::new(ordinal)?);
        let nvrtc = Nvrtc::load(device.properties.driver_version / 1000);
        let modules = Modules::new(device.clone(), nvrtc, Cache::new(cache_dir))?;
        Ok(Self { device, modules, blas: Blas::default(), workspace: Lent::default() })
    }

    /// What the device is.
    pub fn properties(&self) -> &Properties {
        &self.device.properties
    }

    /// Compiles or finds a kernel and enqueues it.
    ///
    /// # Safety
    /// The context is current; `parameters` are those that the kernel declares (see
    /// [`super::driver::launch`]).
    pub unsafe fn run(
        &self,
        kernel: Kernel,
        parameters: &mut [*mut c_void],
        stream: Stream,
    ) -> Result<()> {
        let Kernel { source, defines, name, what, grid, block, shared_bytes } = kernel;
        let function = self.modules.get(source, defines, name, shared_bytes, what)?;
        // SAFETY: as promised by the caller.
        unsafe { launch(function, grid, block, shared_bytes, parameters, stream) }
    }
}
