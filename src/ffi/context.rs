//! `forge_context`: a backend and its resources.

use super::boundary::{boundary, check_pointer, handle, read_struct};
use super::buffers::Checker;
use super::enums::{self, forge_backend};
use super::types::{forge_buffer, forge_context_config};
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::error::{Result, bail, forge_status};
use crate::format::Dtype;
use std::ffi::{CStr, c_char};
use std::path::PathBuf;
use std::sync::Arc;

/// Threads that a context may ask for.
const MOST_THREADS: u32 = 4096;

/// Of a lent workspace's first byte.
const WORKSPACE_ALIGNMENT: usize = 256;

/// A backend and its resources. Opaque. Threads may share it.
///
/// After a fork the child may go on to use, and must free as usual, what it inherited: a CPU context
/// starts threads of its own there. A CUDA context does not work in a fork, as CUDA itself does not:
/// calls give FORGE_ERROR_DEVICE. Arrays that the parent's threads were writing at the fork are in an
/// unknown state in the child.
///
/// The shared library stays loaded after dlclose; a library that libforge.a is linked into should be
/// linked with `-z nodelete` as well.
pub struct forge_context {
    pub(super) backend: Arc<dyn Backend>,
}

fn cpu(config: &forge_context_config) -> Result<Cpu> {
    if config.device != 0 {
        bail!(FORGE_ERROR_SHAPE, "device: {}; the CPU backend has device 0 only", config.device);
    }
    if config.threads > MOST_THREADS {
        bail!(FORGE_ERROR_SHAPE, "threads: {} is above {MOST_THREADS}", config.threads);
    }
    Cpu::new(config.threads as usize)
}

/// # Safety
/// `text` is NULL or NUL-terminated.
pub(super) unsafe fn path(name: &str, text: *const c_char) -> Result<Option<PathBuf>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: as promised by the caller.
    match unsafe { CStr::from_ptr(text) }.to_str() {
        Ok(text) => Ok(Some(text.into())),
        Err(_) => bail!(FORGE_ERROR_UNSUPPORTED, "{name}: not UTF-8"),
    }
}

/// Makes a context. For CUDA it takes the device's primary context, which frameworks use as well. It
/// starts the CPU's threads or loads the driver and NVRTC; no device memory is allocated.
///
/// Errors: FORGE_ERROR_NO_BACKEND (no driver, no GPU, one too old), FORGE_ERROR_COMPILE (no NVRTC, and
/// no cache that forge_warm has filled),
/// FORGE_ERROR_THREADS, FORGE_ERROR_SHAPE (no device of this ordinal, more than 4096 threads). A cache
/// directory that is refused is no error; a log line of level 2 says why.
///
/// # Safety
/// `config` points to a struct of its `struct_size` whose `cache_dir` is NULL or NUL-terminated,
/// `out_context` to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_context_new(
    config: *const forge_context_config,
    out_context: *mut *mut forge_context,
) -> forge_status {
    boundary(|| {
        check_pointer("out_context", out_context)?;
        // SAFETY: as promised by the caller.
        let config = unsafe { read_struct("config", config)? };
        let backend: Arc<dyn Backend> = match enums::backend("backend", config.backend)? {
            forge_backend::FORGE_BACKEND_CPU => Arc::new(cpu(&config)?),
            forge_backend::FORGE_BACKEND_CUDA => {
                // SAFETY: as promised by the caller.
                let cache_dir = unsafe { path("cache_dir", config.cache_dir)? };
                Arc::new(Cuda::new(config.device, cache_dir)?)
            }
        };
        // SAFETY: checked above.
        unsafe { *out_context = Box::into_raw(Box::new(forge_context { backend })) };
        Ok(())
    })
}

/// Frees a context; NULL is allowed. Communicators and linears made with it stay valid. When the last
/// of the context and its linears is freed, its threads have ended. Not to be called from a callback.
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

/// Bytes of device memory that forge_context_set_workspace wants: 0 on the CPU, below 60 MiB on CUDA.
///
/// # Safety
/// `context` is live, `out_bytes` points to a u64.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_context_workspace_bytes(
    context: *const forge_context,
    out_bytes: *mut u64,
) -> forge_status {
    boundary(|| {
        check_pointer("out_bytes", out_bytes)?;
        // SAFETY: as promised by the caller.
        unsafe { *out_bytes = handle("context", context)?.backend.workspace_bytes() };
        Ok(())
    })
}

/// Lends the context device memory for its life and that of its linears, or until the next call of
/// this function. It is scratch of the work on a stream, so only one stream at a time may have work of
/// this context in it; what is enqueued already goes on to use the old one. CUDA calls that need it
/// fail without. On the CPU nothing is needed and nothing happens. `workspace` is aligned to 256 bytes and
/// has at least forge_context_workspace_bytes; some counters in it are cleared at once.
///
/// Errors: FORGE_ERROR_BUFFER_SIZE, FORGE_ERROR_MISALIGNED, FORGE_ERROR_MEMORY (the host's).
///
/// # Safety
/// `context` is live; the memory has `workspace.bytes` bytes and nothing else uses it, work that is
/// still enqueued included.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_context_set_workspace(
    context: *mut forge_context,
    workspace: forge_buffer,
) -> forge_status {
    boundary(|| {
        // SAFETY: as promised by the caller.
        let backend = unsafe { &*handle("context", context)?.backend };
        let needed = backend.workspace_bytes();
        if workspace.bytes < needed {
            bail!(
                FORGE_ERROR_BUFFER_SIZE,
                "workspace: {} bytes, {needed} needed; see forge_context_workspace_bytes",
                workspace.bytes
            );
        }
        if needed > 0 {
            let data = workspace.data.cast_const().cast();
            Checker::new(backend).buffer("workspace", data, needed, Dtype::U8, true)?;
            if !(data as usize).is_multiple_of(WORKSPACE_ALIGNMENT) {
                bail!(
                    FORGE_ERROR_MISALIGNED,
                    "workspace: {data:p} is not aligned to {WORKSPACE_ALIGNMENT} bytes"
                );
            }
        }
        // SAFETY: as promised by the caller.
        unsafe { backend.set_workspace(workspace.data.cast(), workspace.bytes) }
    })
}
