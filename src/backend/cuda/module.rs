//! From (source, defines, kernel) to a loaded function: in memory, from disk, or compiled.

use super::cache::Cache;
use super::compile::{Nvrtc, architecture};
use super::driver::{Device, Function, check};
use super::images::Images;
pub use super::images::image_key;
use super::sources::Source;
use crate::error::Result;
use cudarc::driver::sys::{self, CUfunction_attribute, CUmodule};
use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Dynamic shared memory that a kernel may have without asking.
const SHARED_WITHOUT_ASKING: u32 = 48 << 10;

/// A loaded image and the kernels that were asked of it.
struct Loaded {
    module: CUmodule,
    functions: HashMap<(String, u32), Function>,
}

// SAFETY: handles of the driver, which may be used from any thread.
unsafe impl Send for Loaded {}

type Slot = Arc<Mutex<Option<Loaded>>>;

/// Every specialisation that this context has used.
pub struct Modules {
    device: Arc<Device>,
    /// What images come from.
    pub images: Images,
    slots: Mutex<HashMap<(&'static str, Vec<String>), Slot>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while the lock was held cannot leave a map or an option half-written.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Modules {
    /// No module yet.
    pub fn new(device: Arc<Device>, nvrtc: Result<Nvrtc>, cache: Cache) -> Result<Self> {
        let architecture = architecture(device.properties.capability);
        let images = Images::new(nvrtc, cache, architecture)?;
        Ok(Self { device, images, slots: Mutex::default() })
    }

    /// The kernel `name` of a source compiled with these defines (`NAME=value`), which may use
    /// `shared_bytes` of dynamic shared memory. Compiled once, whichever thread comes first; others
    /// wait. `what` names the specialisation in errors.
    pub fn get(
        &self,
        source: Source,
        defines: &[String],
        name: &str,
        shared_bytes: u32,
        what: &str,
    ) -> Result<Function> {
        let slot = {
            let mut slots = lock(&self.slots);
            slots.entry((source.name, defines.to_vec())).or_default().clone()
        };
        let mut slot = lock(&slot);
        let loaded = match &mut *slot {
            Some(loaded) => loaded,
            empty => empty.insert(self.load(source, defines, what)?),
        };
        let key = (name.to_string(), shared_bytes);
        if let Some(function) = loaded.functions.get(&key) {
            return Ok(*function);
        }
        let function = function(loaded.module, name, shared_bytes)?;
        loaded.functions.insert(key, function);
        Ok(function)
    }

    fn load(&self, source: Source, defines: &[String], what: &str) -> Result<Loaded> {
        let begin = Instant::now();
        let _entered = self.device.enter()?;
        if let Some(image) = self.images.find(source, defines) {
            match load_image(&image) {
                Ok(module) => {
                    tracing::debug!(target: "forge", "{what}: loaded in {:?}", begin.elapsed());
                    return Ok(Loaded { module, functions: HashMap::new() });
                }
                // Made for this very version and architecture, and yet refused: make it again.
                Err(e) => tracing::debug!(target: "forge", "{what}: cached image: {e}"),
            }
        }
        let image = self.images.compile(source, defines, what)?;
        let module = load_image(&image)?;
        self.images.keep_quietly(source, defines, &image);
        let time = begin.elapsed();
        tracing::info!(target: "forge", "{what}: kernels/{} compiled in {time:?}", source.name);
        Ok(Loaded { module, functions: HashMap::new() })
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        let Ok(_entered) = self.device.enter() else { return };
        // Kernels may still run. When the process ends the driver may be gone; then nothing matters.
        // SAFETY: the context is current; the modules were loaded in it and are unloaded once.
        unsafe {
            if sys::cuCtxSynchronize() != sys::CUresult::CUDA_SUCCESS {
                return;
            }
            for slot in lock(&self.slots).values() {
                if let Some(loaded) = lock(slot).take() {
                    let _ = sys::cuModuleUnload(loaded.module);
                }
            }
        }
    }
}

fn load_image(image: &[u8]) -> Result<CUmodule> {
    let mut module = std::ptr::null_mut();
    // SAFETY: a whole cubin; the driver copies what it needs.
    let result = unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
    check("cuModuleLoadData", result)?;
    Ok(module)
}

fn function(module: CUmodule, name: &str, shared_bytes: u32) -> Result<Function> {
    let name = CString::new(name).unwrap_or_default();
    let mut function = std::ptr::null_mut();
    // SAFETY: the module is live, the name NUL-terminated.
    unsafe {
        let found = sys::cuModuleGetFunction(&mut function, module, name.as_ptr());
        check("cuModuleGetFunction", found)?;
        if shared_bytes > SHARED_WITHOUT_ASKING {
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let set = sys::cuFuncSetAttribute(function, most, shared_bytes as i32);
            check("cuFuncSetAttribute", set)?;
        }
    }
    Ok(Function(function))
}
