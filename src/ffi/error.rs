//! Statuses as text, the last error of a thread, and the log callback.

use crate::error::forge_status;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};

use super::boundary::boundary;
use crate::error::bail;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

pub(super) fn set_last_error(message: &str) {
    // Messages quote the caller's own strings, which may hold anything.
    let clean: Vec<u8> = message.bytes().filter(|b| *b != 0).collect();
    LAST_ERROR.with(|last| *last.borrow_mut() = CString::new(clean).unwrap_or_default());
}

/// The sentence of this thread's last failed call; "" when none failed. Never NULL; valid until the
/// next failure on this thread.
#[unsafe(no_mangle)]
pub extern "C" fn forge_last_error() -> *const c_char {
    LAST_ERROR.with(|last| last.borrow().as_ptr())
}

/// The enumerator's name, or "FORGE_UNKNOWN_STATUS". Static.
#[unsafe(no_mangle)]
pub extern "C" fn forge_status_name(status: u32) -> *const c_char {
    let known = forge_status::ALL.iter().find(|s| **s as u32 == status);
    known.map_or(c"FORGE_UNKNOWN_STATUS", |s| s.name()).as_ptr()
}

/// Receives log lines: level 1 error, 2 warning, 3 information, 4 debugging, 5 trace. The strings
/// are valid during the call. May be called from several threads at once.
pub type forge_log_callback = Option<
    unsafe extern "C" fn(
        user: *mut c_void,
        level: u32,
        target: *const c_char,
        message: *const c_char,
    ),
>;

/// Sends log lines up to `max_level` to `callback`; NULL turns them off. Replaces an earlier one;
/// a call already under way on another thread may still end after this returns. `max_level` is 1 (errors)
/// to 5 (traces), or 0: none.
///
/// Errors: FORGE_ERROR_ENUM (a level above 5).
#[unsafe(no_mangle)]
pub extern "C" fn forge_set_log_callback(
    callback: forge_log_callback,
    user: *mut c_void,
    max_level: u32,
) -> forge_status {
    boundary(|| {
        if max_level > 5 {
            bail!(FORGE_ERROR_ENUM, "max_level: {max_level} is not in 0..=5");
        }
        let sink = callback.map(|callback| {
            let user = User(user);
            std::sync::Arc::new(move |level: u32, target: &CStr, message: &CStr| {
                // SAFETY: the caller promises a callback that may be called from any thread until it
                // is replaced; the strings live during the call.
                unsafe { callback(user.get(), level, target.as_ptr(), message.as_ptr()) }
            }) as crate::log::Sink
        });
        crate::log::set_sink(sink, max_level);
        Ok(())
    })
}

struct User(*mut c_void);

impl User {
    fn get(&self) -> *mut c_void {
        self.0
    }
}

// SAFETY: only handed back to the caller's own callback.
unsafe impl Send for User {}
// SAFETY: as above.
unsafe impl Sync for User {}
