//! What every C function goes through: panics stop here, errors become a status and a sentence.

use super::error::set_last_error;
use crate::error::{Error, Result, bail, forge_status};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs the body of a C function.
pub fn boundary(body: impl FnOnce() -> Result<()>) -> forge_status {
    // Whatever a panic may have left half-done is unreachable afterwards: objects are immutable and
    // buffers are the caller's.
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        let what = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| payload.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(Error::new(
            forge_status::FORGE_ERROR_PANIC,
            format!("internal error, please report it: {what}"),
        ))
    });
    match result {
        Ok(()) => forge_status::FORGE_OK,
        Err(error) => {
            tracing::debug!(target: "forge", "{}", error.message);
            set_last_error(&error.message);
            error.status
        }
    }
}

/// Refuses NULL and misaligned pointers to structs and results.
pub fn check_pointer<T>(name: &str, pointer: *const T) -> Result<()> {
    if pointer.is_null() {
        bail!(FORGE_ERROR_NULL, "{name}: NULL");
    }
    if !pointer.is_aligned() {
        bail!(
            FORGE_ERROR_MISALIGNED,
            "{name}: {pointer:p} is not aligned to {} bytes",
            align_of::<T>()
        );
    }
    Ok(())
}

/// A struct that starts with its own size.
///
/// # Safety
/// `repr(C)`, first field a `u32` holding the size that the caller compiled.
pub unsafe trait Sized32: Copy {}

/// Reads a size-versioned struct.
///
/// # Safety
/// `pointer` is NULL, misaligned, or valid for reads of `struct_size` bytes.
pub unsafe fn read_struct<T: Sized32>(name: &str, pointer: *const T) -> Result<T> {
    check_pointer(name, pointer)?;
    // SAFETY: not NULL and aligned; the first field is the size, by the trait's contract. Fields are
    // only ever appended, and this is the first version, so only its own size is known.
    unsafe {
        check_struct_size::<T>(name, *pointer.cast::<u32>())?;
        Ok(*pointer)
    }
}

/// Checks a size-versioned struct that will be written.
///
/// # Safety
/// As [`read_struct`].
pub unsafe fn check_out_struct<T: Sized32>(name: &str, pointer: *mut T) -> Result<()> {
    // SAFETY: as promised by the caller.
    unsafe { read_struct(name, pointer.cast_const()).map(|_| ()) }
}

fn check_struct_size<T>(name: &str, size: u32) -> Result<()> {
    if size as usize != size_of::<T>() {
        bail!(
            FORGE_ERROR_STRUCT_SIZE,
            "{name}: struct_size is {size}, this library knows {}; set it to sizeof and build \
             against this library's header",
            size_of::<T>()
        );
    }
    Ok(())
}

/// Borrows an object behind a handle.
///
/// # Safety
/// `pointer` is NULL or a live handle of this library.
pub unsafe fn handle<'a, T>(name: &str, pointer: *const T) -> Result<&'a T> {
    check_pointer(name, pointer)?;
    // SAFETY: a live handle, as promised by the caller.
    Ok(unsafe { &*pointer })
}

/// Refuses a reserved field that is not 0, so that a later version may give it a meaning.
pub fn check_reserved(name: &str, value: u32) -> Result<()> {
    if value != 0 {
        bail!(FORGE_ERROR_UNSUPPORTED, "{name}.reserved: {value}; set it to 0");
    }
    Ok(())
}
