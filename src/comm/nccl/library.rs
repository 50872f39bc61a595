//! A table over NCCL's library, loaded at run time: `libnccl.so.2` has no crate that finds it under the name
//! that pip's wheel and the distributions give it.

use crate::backend::cuda::libraries::{directories, why};
use crate::error::{Result, bail};
use libloading::os::unix::{Library, RTLD_LAZY, RTLD_LOCAL, RTLD_NOW, Symbol};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// `ncclComm_t`.
pub type Handle = *mut c_void;

/// Bytes of an `ncclUniqueId`.
pub const ID_BYTES: usize = 128;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; ID_BYTES]);

/// The oldest version that will do: 2.14 made communicators that do not block.
const OLDEST: c_int = 21400;

/// `ncclInProgress`: a communicator that does not block is still at it.
pub const IN_PROGRESS: c_int = 7;
/// `ncclSum`.
pub const SUM: c_int = 0;

/// `ncclConfig_t` as of 2.14, by which newer versions know what is not in it.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

const NAME: &str = "libnccl.so.2";

type Gather =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, *mut c_void) -> c_int;
/// `(send, recv, count of what is received, type, operation, communicator, stream)`.
pub type Reduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    c_int,
    c_int,
    Handle,
    *mut c_void,
) -> c_int;
/// `(send, count, type, peer, communicator, stream)`.
pub type SendTo =
    unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
/// `(recv, count, type, peer, communicator, stream)`.
pub type ReceiveFrom =
    unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
type OfComm = unsafe extern "C" fn(Handle) -> c_int;
type IntOfComm = unsafe extern "C" fn(Handle, *mut c_int) -> c_int;

/// The functions.
pub struct Nccl {
    /// As `ncclGetVersion` counts: 22703 is 2.27.3.
    pub version: c_int,
    /// Where it was found.
    pub path: String,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    init: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int,
    finalize: OfComm,
    destroy: OfComm,
    abort: OfComm,
    async_error: IntOfComm,
    count: IntOfComm,
    user_rank: IntOfComm,
    /// `ncclAllGather`.
    pub all_gather: Gather,
    /// `ncclReduceScatter`.
    pub reduce_scatter: Reduce,
    /// `ncclAllReduce`.
    pub all_reduce: Reduce,
    /// `ncclSend`.
    pub send: SendTo,
    /// `ncclRecv`.
    pub recv: ReceiveFrom,
    /// `ncclGroupStart`.
    pub group_start: unsafe extern "C" fn() -> c_int,
    /// `ncclGroupEnd`.
    pub group_end: unsafe extern "C" fn() -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    last_error: unsafe extern "C" fn(Handle) -> *const c_char,
    _library: Library,
}

/// Where it may be, in this order, and how it is named to people.
fn candidates() -> Vec<(PathBuf, c_int)> {
    if let Some(path) = std::env::var_os("FORGE_NCCL").filter(|p| !p.is_empty()) {
        return vec![(path.into(), RTLD_NOW)];
    }
    // One that is loaded already, as torch's: RTLD_NOLOAD. Then the loader's own search; then beside CUDA's.
    const RTLD_NOLOAD: c_int = 4;
    let mut out = vec![(NAME.into(), RTLD_LAZY | RTLD_NOLOAD), (NAME.into(), RTLD_NOW)];
    out.extend(directories("nccl").into_iter().map(|d| (d.join(NAME), RTLD_NOW)));
    out
}

impl Nccl {
    /// The library, loaded once; where that failed, every call tries again.
    pub fn get() -> Result<Arc<Self>> {
        static LOADED: Mutex<Option<Arc<Nccl>>> = Mutex::new(None);
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(library) = &*loaded {
            return Ok(library.clone());
        }
        let library = Arc::new(Self::load()?);
        tracing::info!(target: "forge", "NCCL {} of {}", library.version_text(), library.path);
        Ok(loaded.insert(library).clone())
    }

    fn load() -> Result<Self> {
        let mut tried = Vec::new();
        for (path, flags) in candidates() {
            // SAFETY: NCCL's library, whose initialisers have no conditions.
            match unsafe { Library::open(Some(&path), flags | RTLD_LOCAL) } {
                Ok(library) => return Self::of(library, path.display().to_string()),
                Err(_) if flags & RTLD_NOW == 0 => {} // it was not loaded before, and need not have been
                Err(error) => tried.push(why(error)),
            }
        }
        bail!(
            FORGE_ERROR_NO_NCCL,
            "NCCL: {NAME} cannot be loaded ({}); `pip install nvidia-nccl-cu13` (a CUDA build of torch brings \
             it), or name the library in FORGE_NCCL",
            tried.join("; ")
        )
    }

    fn of(library: Library, path: String) -> Result<Self> {
        // SAFETY: the types are those of nccl.h, and the library lives as long as the table.
        unsafe {
            let get_version: unsafe extern "C" fn(*mut c_int) -> c_int =
                symbol(&library, &path, "ncclGetVersion")?;
            let mut version = 0;
            if get_version(&mut version) != 0 || version < OLDEST {
                bail!(
                    FORGE_ERROR_NO_NCCL,
                    "NCCL: {path} is version {}; {} or newer is needed: pip install -U nvidia-nccl-cu13, or \
                     name another library in FORGE_NCCL",
                    text(version),
                    text(OLDEST)
                );
            }
            Ok(Self {
                version,
                get_unique_id: symbol(&library, &path, "ncclGetUniqueId")?,
                init: symbol(&library, &path, "ncclCommInitRankConfig")?,
                finalize: symbol(&library, &path, "ncclCommFinalize")?,
                destroy: symbol(&library, &path, "ncclCommDestroy")?,
                abort: symbol(&library, &path, "ncclCommAbort")?,
                async_error: symbol(&library, &path, "ncclCommGetAsyncError")?,
                count: symbol(&library, &path, "ncclCommCount")?,
                user_rank: symbol(&library, &path, "ncclCommUserRank")?,
                all_gather: symbol(&library, &path, "ncclAllGather")?,
                reduce_scatter: symbol(&library, &path, "ncclReduceScatter")?,
                all_reduce: symbol(&library, &path, "ncclAllReduce")?,
                send: symbol(&library, &path, "ncclSend")?,
                recv: symbol(&library, &path, "ncclRecv")?,
                group_start: symbol(&library, &path, "ncclGroupStart")?,
                group_end: symbol(&library, &path, "ncclGroupEnd")?,
                error_string: symbol(&library, &path, "ncclGetErrorString")?,
                last_error: symbol(&library, &path, "ncclGetLastError")?,
                path,
                _library: library,
            })
        }
    }

    /// `2.27.3`.
    pub fn version_text(&self) -> String {
        text(self.version)
    }

    /// What a result says, with NCCL's last words about this communicator.
    ///
    /// # Safety
    /// The communicator is live, or null.
    pub unsafe fn words(&self, result: c_int, comm: Handle) -> String {
        // SAFETY: as promised by the caller; both return strings that live as long as the library.
        let [meaning, last] = unsafe {
            [(self.error_string)(result), (self.last_error)(comm)].map(|text| {
                if text.is_null() {
                    String::new()
                } else {
                    CStr::from_ptr(text).to_string_lossy().trim().to_string()
                }
            })
        };
        if last.is_empty() { meaning } else { format!("{meaning}: {last}") }
    }

    /// A new id, for one communicator of all ranks.
    pub fn unique_id(&self) -> Result<UniqueId> {
        let mut id = UniqueId([0; ID_BYTES]);
        // SAFETY: the result is a live struct of this size.
        let result = unsafe { (self.get_unique_id)(&mut id) };
        if result != 0 {
            // SAFETY: no communicator.
            let words = unsafe { self.words(result, std::ptr::null_mut()) };
            bail!(FORGE_ERROR_COLLECTIVE, "ncclGetUniqueId: {words}");
        }
        Ok(id)
    }

    /// Begins to make a communicator that does not block; NCCL's result, and the handle.
    ///
    /// # Safety
    /// The GPU's context is current.
    pub unsafe fn init(&self, size: c_int, id: UniqueId, rank: c_int) -> (c_int, Handle) {
        let mut handle = std::ptr::null_mut();
        let bytes = size_of::<Config>();
        let mut config =
            Config { size: bytes, magic: 0xCAFE_BEEF, version: OLDEST as u32, blocking: 0 };
        // SAFETY: as promised by the caller; the structs are live.
        let result = unsafe { (self.init)(&mut handle, size, id, rank, &mut config) };
        (result, handle)
    }

    /// What became of the work so far.
    ///
    /// # Safety
    /// The communicator is live.
    pub unsafe fn async_error(&self, comm: Handle) -> c_int {
        let mut state = 0;
        // SAFETY: as promised by the caller.
        let result = unsafe { (self.async_error)(comm, &mut state) };
        if result != 0 { result } else { state }
    }

    /// Rank and number of ranks of a communicator.
    ///
    /// # Safety
    /// The communicator is live.
    pub unsafe fn place(&self, comm: Handle) -> Result<(usize, usize)> {
        let (mut rank, mut count) = (0, 0);
        // SAFETY: as promised by the caller.
        let results =
            unsafe { [(self.user_rank)(comm, &mut rank), (self.count)(comm, &mut count)] };
        if let Some(result) = results.into_iter().find(|r| *r != 0) {
            // SAFETY: as promised by the caller.
            let words = unsafe { self.words(result, comm) };
            bail!(FORGE_ERROR_COLLECTIVE, "ncclCommCount: {words}");
        }
        Ok((rank as usize, count as usize))
    }

    /// Lets go of a communicator when its work is done. Returns whether it was in time; else it is still live.
    ///
    /// # Safety
    /// The communicator is live, and not used again.
    pub unsafe fn destroy(&self, comm: Handle, timeout: Duration) -> bool {
        let begin = Instant::now();
        // SAFETY: as promised by the caller. One that does not block is to be finalised first.
        unsafe {
            let mut state = (self.finalize)(comm);
            while state == IN_PROGRESS {
                if begin.elapsed() > timeout {
                    return false;
                }
                std::thread::sleep(Duration::from_micros(50));
                state = self.async_error(comm);
            }
            state == 0 && (self.destroy)(comm) == 0
        }
    }

    /// Stops the work of a communicator and lets go of it.
    ///
    /// # Safety
    /// The communicator is live, and not used again.
    pub unsafe fn abort(&self, comm: Handle) {
        // SAFETY: as promised by the caller.
        unsafe { (self.abort)(comm) };
    }
}

// SAFETY: functions of a library that stays loaded; any thread may call them.
unsafe impl Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

/// # Safety
/// `T` is the type of that function.
unsafe fn symbol<T: Copy>(library: &Library, path: &str, name: &str) -> Result<T> {
    // SAFETY: as promised by the caller.
    let found: std::result::Result<Symbol<T>, _> = unsafe { library.get(name.as_bytes()) };
    match found {
        Ok(function) => Ok(*function),
        Err(_) => bail!(
            FORGE_ERROR_NO_NCCL,
            "NCCL: {path} has no {name}; it is another library, or broken: reinstall nvidia-nccl-cu13, or name \
             another library in FORGE_NCCL"
        ),
    }
}

fn text(version: c_int) -> String {
    // Before 2.9 the numbers were 1000·major + 100·minor + patch.
    let (major, minor) = if version < 10000 {
        (version / 1000, version % 1000 / 100)
    } else {
        (version / 10000, version % 10000 / 100)
    };
    format!("{major}.{minor}.{}", version % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_nccl_writes_them() {
        assert_eq!(text(22703), "2.27.3");
        assert_eq!(text(2804), "2.8.4");
        assert_eq!(text(OLDEST), "2.14.0");
    }
}
