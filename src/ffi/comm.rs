//! `forge_comm`: the ranks that share a W.

use super::boundary::{boundary, check_pointer, check_reserved, handle, read_struct};
use super::context::forge_context;
use super::types::forge_host_collectives;
use crate::comm::{Collectives, Comm, Host, Solo};
use crate::error::{Result, bail, forge_status};
use std::sync::Arc;

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
        let collectives =
            Collectives { user: c.user, all_gather, reduce_scatter, all_reduce, wait: c.wait };
        publish(Host::new(rank as usize, size as usize, collectives)?, out_comm)
    })
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
