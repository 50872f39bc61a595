//! `forge_context`: a backend and its resources.

use super::boundary::{boundary, check_pointer, read_struct};
use super::enums::{self, forge_backend};
use super::types::forge_context_config;
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::error::{bail, forge_status};
use std::sync::Arc;

/// Threads that a context may ask for.
const MOST_THREADS: u32 = 4096;

/// A backend and its resources. Opaque.
pub struct forge_context {
    pub(super) backend: Arc<dyn Backend>,
}

/// Makes a context.
///
/// # Safety
/// `config` points to a struct of its `struct_size`, `out_context` to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_context_new(
    config: *const forge_context_config,
    out_context: *mut *mut forge_context,
) -> forge_status {
    boundary(|| {
        check_pointer("out_context", out_context)?;
        // SAFETY: as promised by the caller.
        let config = unsafe { read_struct("config", config)? };
        match enums::backend("backend", config.backend)? {
            forge_backend::FORGE_BACKEND_CPU => {}
            forge_backend::FORGE_BACKEND_CUDA => bail!(
                FORGE_ERROR_NO_BACKEND,
                "backend: FORGE_BACKEND_CUDA is not in this build; use FORGE_BACKEND_CPU"
            ),
        }
        if config.device != 0 {
            bail!(
                FORGE_ERROR_SHAPE,
                "device: {}; the CPU backend has device 0 only",
                config.device
            );
        }
        if config.threads > MOST_THREADS {
            bail!(FORGE_ERROR_SHAPE, "threads: {} is above {MOST_THREADS}", config.threads);
        }
        let backend = Arc::new(Cpu::new(config.threads as usize)?);
        // SAFETY: checked above.
        unsafe { *out_context = Box::into_raw(Box::new(forge_context { backend })) };
        Ok(())
    })
}

/// Frees a context; NULL is allowed. Communicators and linears made with it stay valid.
///
/// # Safety
/// `context` is NULL or was made by forge_context_new and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_context_free(context: *mut forge_context) {
    if !context.is_null() {
        boundary(|| {
            // SAFETY: as promised by the caller.
            drop(unsafe { Box::from_raw(context) });
            Ok(())
        });
    }
}
