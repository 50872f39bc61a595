//! NVRTC: from a source and its defines to a device image. Loaded at run time, by name or from where a
//! Python environment keeps CUDA's libraries.

use super::sources::{self, Source};
use crate::error::{Result, bail};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};
use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;

type Program = *mut std::ffi::c_void;
type Strings = *const *const c_char;

/// The table of NVRTC's functions that are used.
pub struct Nvrtc {
    /// `(major, minor)`.
    pub version: (i32, i32),
    create: Symbol<
        unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            Strings,
            Strings,
        ) -> c_int,
    >,
    compile: Symbol<unsafe extern "C" fn(Program, c_int, Strings) -> c_int>,
    log_size: Symbol<unsafe extern "C" fn(Program, *mut usize) -> c_int>,
    log: Symbol<unsafe extern "C" fn(Program, *mut c_char) -> c_int>,
    image_size: Symbol<unsafe extern "C" fn(Program, *mut usize) -> c_int>,
    image: Symbol<unsafe extern "C" fn(Program, *mut c_char) -> c_int>,
    destroy: Symbol<unsafe extern "C" fn(*mut Program) -> c_int>,
    error: Symbol<unsafe extern "C" fn(c_int) -> *const c_char>,
    /// Keep the symbols valid; the second one is found by NVRTC itself, by name.
    _libraries: Vec<Library>,
}

/// What NVRTC made of a source.
pub struct Image {
    /// A cubin.
    pub bytes: Vec<u8>,
    /// Warnings, and what ptxas has to say.
    pub log: String,
}

impl Nvrtc {
    /// Loads NVRTC: `$FORGE_NVRTC` if set, else the library that the process has loaded or that the
    /// loader finds, else the one beside CUDA libraries that the process has loaded, as pip's wheels
    /// keep them. `driver_major` is tried first, since a driver loads images of its own version.
    pub fn load(driver_major: i32) -> Result<Self> {
        let mut tried = Vec::new();
        if let Some(path) = std::env::var_os("FORGE_NVRTC") {
            return Self::open(Path::new(&path)).or_else(|why| {
                bail!(
                    FORGE_ERROR_COMPILE,
                    "FORGE_NVRTC: NVRTC cannot be loaded from there: {why}; name libnvrtc.so.13 or \
                     libnvrtc.so.12 with its path, or unset it to have NVRTC looked for"
                )
            });
        }
        let mut majors = vec![driver_major, 13, 12];
        majors.dedup();
        let names = majors.iter().map(|m| format!("libnvrtc.so.{m}"));
        let names: Vec<String> = names.chain(["libnvrtc.so".to_string()]).collect();
        let directories = super::libraries::directories("cuda_nvrtc");
        let beside = names.iter().flat_map(|n| directories.iter().map(move |d| d.join(n)));
        for path in names.iter().map(PathBuf::from).chain(beside.filter(|p| p.exists())) {
            match Self::open(&path) {
                Ok(nvrtc) => return Ok(nvrtc),
                Err(why) => tried.push(format!("{}: {why}", path.display())),
            }
        }
        tracing::debug!(target: "forge", "NVRTC: {}", tried.join("; "));
        bail!(
            FORGE_ERROR_COMPILE,
            "NVRTC: {} cannot be loaded; `pip install nvidia-cuda-nvrtc` (a CUDA build of torch brings \
             it), or name the library in FORGE_NVRTC",
            names[0]
        )
    }

    /// Loads the library of this path or name.
    pub fn open(path: &Path) -> std::result::Result<Self, String> {
        let text = super::libraries::why;
        let mut libraries = Vec::new();
        // NVRTC opens its builtins by name when it compiles, which finds a loaded one.
        if let Some(builtins) = builtins_beside(path) {
            // SAFETY: NVIDIA's libraries have no initialisers that need care.
            libraries.push(
                unsafe { Library::open(Some(&builtins), RTLD_NOW | RTLD_GLOBAL) }.map_err(text)?,
            );
        }
        // SAFETY: as above; the signatures are those of nvrtc.h, which have not changed since CUDA 11.1.
        unsafe {
            let library = Library::open(Some(path), RTLD_NOW).map_err(text)?;
            let version: Symbol<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int> =
                library.get(b"nvrtcVersion\0").map_err(text)?;
            let (mut major, mut minor) = (0, 0);
            version(&mut major, &mut minor);
            // The first that takes more than 4 KiB of kernel parameters.
            if (major, minor) < (12, 1) {
                return Err(format!("NVRTC {major}.{minor}; 12.1 or newer is needed"));
            }
            let nvrtc = Self {
                version: (major, minor),
                create: library.get(b"nvrtcCreateProgram\0").map_err(text)?,
                compile: library.get(b"nvrtcCompileProgram\0").map_err(text)?,
                log_size: library.get(b"nvrtcGetProgramLogSize\0").map_err(text)?,
                log: library.get(b"nvrtcGetProgramLog\0").map_err(text)?,
                image_size: library.get(b"nvrtcGetCUBINSize\0").map_err(text)?,
                image: library.get(b"nvrtcGetCUBIN\0").map_err(text)?,
                destroy: library.get(b"nvrtcDestroyProgram\0").map_err(text)?,
                error: library.get(b"nvrtcGetErrorString\0").map_err(text)?,
                _libraries: libraries,
            };
            let mut nvrtc = nvrtc;
            nvrtc._libraries.push(library);
            Ok(nvrtc)
        }
    }

    /// Compiles a source; `what` names it in errors. Thread-safe.
    pub fn compile(&self, source: Source, options: &[String], what: &str) -> Result<Image> {
        let c = |text: &str| CString::new(text).unwrap_or_default();
        let (text, name) = (c(source.text), c(source.name));
        let headers = sources::headers(options);
        let texts: Vec<CString> = headers.iter().map(|h| c(h.text)).collect();
        // `rules/` includes its headers by the path from there.
        let names: Vec<CString> = headers.iter().map(|h| c(h.name)).collect();
        let options: Vec<CString> = options.iter().map(|o| c(o)).collect();
        let pointers = |v: &[CString]| v.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (texts, names) = (pointers(&texts), pointers(&names));
        let option_pointers = pointers(&options);
        let mut program = Owned { program: null_mut(), nvrtc: self };
        // SAFETY: all strings outlive the calls, counts are theirs, buffers have the sizes asked for.
        unsafe {
            let count = texts.len() as c_int;
            let made = (self.create)(
                &mut program.program,
                text.as_ptr(),
                name.as_ptr(),
                count,
                texts.as_ptr(),
                names.as_ptr(),
            );
            self.check("nvrtcCreateProgram", made)?;
            let count = option_pointers.len() as c_int;
            let compiled = (self.compile)(program.program, count, option_pointers.as_ptr());
            let log = self.log_of(program.program)?;
            if compiled != 0 {
                bail!(
                    FORGE_ERROR_COMPILE,
                    "{what}: NVRTC {}.{} cannot compile kernels/{} ({}): {}",
                    self.version.0,
                    self.version.1,
                    source.name,
                    CStr::from_ptr((self.error)(compiled)).to_string_lossy(),
                    log.trim()
                );
            }
            let mut size = 0;
            self.check("nvrtcGetCUBINSize", (self.image_size)(program.program, &mut size))?;
            let mut bytes = vec![0u8; size];
            self.check("nvrtcGetCUBIN", (self.image)(program.program, bytes.as_mut_ptr().cast()))?;
            Ok(Image { bytes, log })
        }
    }

    /// # Safety
    /// `program` is live.
    unsafe fn log_of(&self, program: Program) -> Result<String> {
        // SAFETY: as promised by the caller; the buffer has the size asked for.
        unsafe {
            let mut size = 0;
            self.check("nvrtcGetProgramLogSize", (self.log_size)(program, &mut size))?;
            let mut bytes = vec![0u8; size.max(1)];
            self.check("nvrtcGetProgramLog", (self.log)(program, bytes.as_mut_ptr().cast()))?;
            bytes.retain(|b| *b != 0);
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        }
    }

    fn check(&self, call: &str, result: c_int) -> Result<()> {
        if result == 0 {
            return Ok(());
        }
        // SAFETY: the function returns a static string for every number.
        let text = unsafe { CStr::from_ptr((self.error)(result)) };
        bail!(FORGE_ERROR_COMPILE, "NVRTC: {call}: {}", text.to_string_lossy())
    }
}

struct Owned<'a> {
    program: Program,
    nvrtc: &'a Nvrtc,
}

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: made by nvrtcCreateProgram, destroyed once.
            unsafe { (self.nvrtc.destroy)(&mut self.program) };
        }
    }
}

/// `libnvrtc-builtins.so.X.Y` in the directory of `path`.
fn builtins_beside(path: &Path) -> Option<PathBuf> {
    let directory = path.parent().filter(|d| !d.as_os_str().is_empty())?;
    let entries = std::fs::read_dir(directory).ok()?.flatten();
    let is_builtins = |p: &PathBuf| {
        let name = p.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("libnvrtc-builtins.so.")
    };
    entries.map(|e| e.path()).find(is_builtins)
}

/// The options for an architecture: those that every source is compiled with, then the defines.
pub fn options(architecture: &str, defines: &[String]) -> Vec<String> {
    let common = ["-std=c++17", "-default-device", "-DNDEBUG", "--fmad=false"];
    let mut options = vec![format!("--gpu-architecture={architecture}")];
    options.extend(common.iter().map(|o| o.to_string()));
    options.extend(defines.iter().map(|d| format!("-D{d}")));
    options
}

/// `sm_90a` and its like: where a capability has instructions of its own, images use them.
pub fn architecture((major, minor): (i32, i32)) -> String {
    let own = if major >= 9 { "a" } else { "" };
    format!("sm_{major}{minor}{own}")
}
