//! `forge_comm`: the ranks that share a W.

use super::boundary::{boundary, check_pointer, check_reserved, handle, read_struct};
use super::context::forge_context;
use super::types::{forge_host_collectives, forge_nccl_config};
use crate::backend::Stream;
use crate::backend::cuda::driver::Device;
use crate::comm::nccl::{ID_BYTES, Nccl, NcclComm, UniqueId};
use crate::comm::{Collectives, Comm, Host, Solo};
use crate::error::{Result, bail, forge_status};
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

/// A communicator. Opaque.
pub struct forge_comm {
    pub(super) comm: Arc<dyn Comm>,
}

fn publish(comm: impl Comm + 'static, out_comm: *mut *mut forge_comm) -> Result<()> {
    let comm = Box::into_raw(Box::new(forge_comm { comm: Arc::new(comm) }));
    // SAFETY: the callers below have checked it.
    unsafe { *out_comm = comm };
    Ok(())
}

/// The communicator of a single rank, for linears that are not shared out.
///
/// # Safety
/// `context` is a live context, `out_comm` points to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_comm_new_solo(
    context: *mut forge_context,
    out_comm: *mut *mut forge_comm,
) -> forge_status {
    boundary(|| {
        check_pointer("out_comm", out_comm)?;
        // SAFETY: as promised by the caller.
        unsafe { handle("context", context)? };
        publish(Solo, out_comm)
    })
}

/// Rank `rank` of `size`, with the caller's own collectives. The callbacks are copied and must stay
/// callable until the communicator and all linears made with it are freed. They are
/// given memory of the context's backend.
///
/// Errors: FORGE_ERROR_RANK (`rank` is not below `size`), FORGE_ERROR_NULL (a callback other than `wait`).
///
/// # Safety
/// `context` is a live context, `collectives` points to a struct of its `struct_size` whose callbacks
/// do what their comments say, `out_comm` points to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_comm_new_host(
    context: *mut forge_context,
    rank: u32,
    size: u32,
    collectives: *const forge_host_collectives,
    out_comm: *mut *mut forge_comm,
) -> forge_status {
    boundary(|| {
        check_pointer("out_comm", out_comm)?;
        // SAFETY: as promised by the caller.
        let c = unsafe {
            handle("context", context)?;
            read_struct("collectives", collectives)?
        };
        check_reserved("collectives", c.reserved)?;
        let (Some(all_gather), Some(reduce_scatter), Some(all_reduce)) =
            (c.all_gather, c.reduce_scatter, c.all_reduce)
        else {
            bail!(
                FORGE_ERROR_NULL,
                "collectives: all_gather, reduce_scatter and all_reduce must not be NULL"
            );
        };
        let (wait, all_to_all) = (c.wait, c.all_to_all);
        let collectives =
            Collectives { user: c.user, all_gather, reduce_scatter, all_reduce, wait, all_to_all };
        publish(Host::new(rank as usize, size as usize, collectives)?, out_comm)
    })
}

/// NCCL's version, as it counts itself: 22703 is 2.27.3. The library is that of the environment variable FORGE_NCCL,
/// else the one that the process has loaded, as torch has, else the system's `libnccl.so.2`.
///
/// Errors: FORGE_ERROR_NO_NCCL.
///
/// # Safety
/// `out_version` points to a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_nccl_version(out_version: *mut u32) -> forge_status {
    boundary(|| {
        check_pointer("out_version", out_version)?;
        let version = Nccl::get()?.version as u32;
        // SAFETY: as promised by the caller.
        unsafe { *out_version = version };
        Ok(())
    })
}

/// A new id for forge_comm_new_nccl: one rank calls this and sends the 128 bytes to the others.
///
/// Errors: FORGE_ERROR_NO_NCCL, FORGE_ERROR_COLLECTIVE.
///
/// # Safety
/// `out_id` points to 128 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_nccl_unique_id(out_id: *mut u8) -> forge_status {
    boundary(|| {
        check_pointer("out_id", out_id)?;
        let UniqueId(id) = Nccl::get()?.unique_id()?;
        // SAFETY: as promised by the caller.
        unsafe { out_id.cast::<[u8; ID_BYTES]>().write_unaligned(id) };
        Ok(())
    })
}

/// What NCCL waits for at most, where the caller does not say: as torch.
const DEFAULT_TIMEOUT_MS: u32 = 600_000;

fn timeout(milliseconds: u32) -> Duration {
    let given = if milliseconds == 0 { DEFAULT_TIMEOUT_MS } else { milliseconds };
    Duration::from_millis(u64::from(given))
}

/// The GPU of a context.
///
/// # Safety
/// `context` is NULL or a live context.
unsafe fn device(context: *mut forge_context) -> Result<Arc<Device>> {
    // SAFETY: as promised by the caller.
    match unsafe { handle("context", context)? }.backend.device() {
        Some(device) => Ok(device),
        None => bail!(
            FORGE_ERROR_UNSUPPORTED,
            "context: NCCL is between GPUs, and this is a context of FORGE_BACKEND_CPU; use \
             forge_comm_new_host, or a context of FORGE_BACKEND_CUDA"
        ),
    }
}

/// A communicator of NCCL, between GPUs. All ranks call this at the same time; it returns when they have. Its
/// collectives run on a stream of their own, which the backward's streams are ordered with; no call waits for
/// them on the host. A rank that is lost is noticed by the next collective, or by forge_comm_check.
///
/// Errors: FORGE_ERROR_NO_NCCL, FORGE_ERROR_RANK, FORGE_ERROR_COLLECTIVE (a rank did not come within the
/// timeout, or NCCL's own words), FORGE_ERROR_DEVICE, FORGE_ERROR_UNSUPPORTED (the CPU's context).
///
/// # Safety
/// `context` is a live context, `config` points to a struct of its `struct_size`, `out_comm` to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_comm_new_nccl(
    context: *mut forge_context,
    config: *const forge_nccl_config,
    out_comm: *mut *mut forge_comm,
) -> forge_status {
    boundary(|| {
        check_pointer("out_comm", out_comm)?;
        // SAFETY: as promised by the caller.
        let (device, c) = unsafe { (device(context)?, read_struct("config", config)?) };
        let (rank, size) = (c.rank as usize, c.size as usize);
        let comm = NcclComm::new(device, UniqueId(c.id), rank, size, timeout(c.timeout_ms))?;
        publish(comm, out_comm)
    })
}

/// A communicator over an `ncclComm_t` that somebody else made, such as a framework's: no memory of its own, but
/// the owner must not use it during a call, and must keep it until this one and all linears made with it are
/// freed. `timeout_ms` as in forge_nccl_config.
///
/// Errors: as forge_comm_new_nccl; FORGE_ERROR_NULL.
///
/// # Safety
/// `context` is a live context, `nccl_comm` a live communicator of its GPU, `out_comm` points to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_comm_borrow_nccl(
    context: *mut forge_context,
    nccl_comm: *mut c_void,
    timeout_ms: u32,
    out_comm: *mut *mut forge_comm,
) -> forge_status {
    boundary(|| {
        check_pointer("out_comm", out_comm)?;
        if nccl_comm.is_null() {
            bail!(FORGE_ERROR_NULL, "nccl_comm: must not be NULL");
        }
        // SAFETY: as promised by the caller.
        let comm = unsafe { NcclComm::borrowed(device(context)?, nccl_comm, timeout(timeout_ms))? };
        publish(comm, out_comm)
    })
}

/// Whether all is well with a communicator, without waiting: NCCL's failures so far, and collectives that have
/// not ended within the timeout. After a failure every call that needs it fails in the same words.
///
/// Errors: FORGE_ERROR_COLLECTIVE.
///
/// # Safety
/// `comm` is a live communicator.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_comm_check(comm: *const forge_comm) -> forge_status {
    // SAFETY: as promised by the caller.
    boundary(|| unsafe { handle("comm", comm)? }.comm.check())
}

/// What `stream` gets from now on comes after all collectives so far; on the CPU this returns when they are done.
/// Before W of a data-parallel linear is read.
///
/// Errors: FORGE_ERROR_COLLECTIVE, FORGE_ERROR_DEVICE.
///
/// # Safety
/// `comm` is a live communicator, `stream` a stream of its context's device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_comm_wait(
    comm: *const forge_comm,
    stream: *mut c_void,
) -> forge_status {
    // SAFETY: as promised by the caller.
    boundary(|| unsafe { handle("comm", comm)? }.comm.wait(Stream(stream)))
}

/// Frees a communicator; NULL is allowed. Linears made with it stay valid.
///
/// # Safety
/// `comm` is NULL or was made by a forge_comm_new_… function and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_comm_free(comm: *mut forge_comm) {
    if !comm.is_null() {
        boundary(|| {
            // SAFETY: as promised by the caller.
            drop(unsafe { Box::from_raw(comm) });
            Ok(())
        });
    }
}
