//! Kernels compiled for the host: kernels/ as the library embeds them, with the files of tests/emulated in
//! place of those that are PTX.

use forge::backend::cuda::cache;
use forge::backend::cuda::sources::{HEADERS, Source};
use libloading::{Library, Symbol};
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::{env, fs};

const SHIM: [Source; 4] = [
    Source { name: "device.h", text: include_str!("device.h") },
    Source { name: "instructions.cuh", text: include_str!("instructions.cuh") },
    Source { name: "mma.cuh", text: include_str!("mma.cuh") },
    Source { name: "emulator.cpp", text: include_str!("emulator.cpp") },
];
/// Strict, but for what CUDA C++ has and C++ has not. NVRTC knows no rule of aliasing, nor do floats here
/// get closer than `__fmaf_rn` says. The fibers' jumps are no overflow of a stack.
const FLAGS: &[&str] = &[
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
];

/// In which order blocks, warps and lanes run until they wait. A result that depends on it is a race.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Ascending = 0,
    Descending = 1,
}

type Emulate =
    unsafe extern "C" fn(*const c_char, u32, u32, u32, *mut *mut c_void, u32) -> *const c_char;

/// A translation unit, loaded.
pub struct Kernel(Library);

/// Where the sources lie, written once.
fn directory() -> &'static Path {
    static WRITTEN: OnceLock<PathBuf> = OnceLock::new();
    WRITTEN.get_or_init(|| {
        let to = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated");
        if to.exists() {
            fs::remove_dir_all(&to).unwrap();
        }
        fs::create_dir_all(to.join("rules")).unwrap();
        for source in HEADERS.iter().chain(&SHIM) {
            fs::write(to.join(source.name), source.text).unwrap();
        }
        to
    })
}

impl Kernel {
    /// Compiles sources for some defines, as one translation unit: their headers are read once.
    pub fn new(units: &[Source], kernels: &[&str], defines: &[String]) -> Self {
        let directory = directory();
        let defined = defines.iter().map(String::as_str);
        let key = cache::key(defined.chain(units.iter().map(|source| source.name)));
        let library = directory.join(format!("{key}.so"));
        let unit = directory.join(format!("{key}.cpp"));
        fs::write(&unit, units.iter().map(|source| source.text).collect::<String>()).unwrap();
        let names: String = kernels.iter().map(|name| format!("X({name})")).collect();
        let compiler = env::var("CXX").unwrap_or_else(|_| "c++".into());
        let output = Command::new(compiler)
            .args(FLAGS)
            .args(defines.iter().map(|define| format!("-D{define}")))
            .arg(format!("-DFORGE_EMULATED_SOURCE=\"{key}.cpp\""))
            .arg(format!("-DFORGE_EMULATED_KERNELS={names}"))
            .arg("-I")
            .arg(directory)
            .arg(directory.join("emulator.cpp"))
            .arg("-o")
            .arg(&library)
            .output()
            .unwrap();
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{kernels:?} {defines:?}\n{log}");
        // SAFETY: a library without constructors, of the sources above.
        Self(unsafe { Library::new(&library) }.unwrap())
    }

    /// Runs a grid, as `cuLaunchKernel` would.
    ///
    /// # Safety
    /// The parameters are those that the kernel declares, and what they point to is there.
    pub unsafe fn launch(
        &self,
        name: &str,
        size: (u64, u32, u32),
        parameters: &mut [*mut c_void],
        order: Order,
    ) {
        // SAFETY: as promised by the caller.
        if let Some(why) = unsafe { self.try_launch(name, size, parameters, order) } {
            panic!("{name}, {order:?}: {why}");
        }
    }

    /// The same; what went wrong. Blocks, threads of each, bytes of dynamic shared memory.
    ///
    /// # Safety
    /// As [`Kernel::launch`].
    pub unsafe fn try_launch(
        &self,
        name: &str,
        (blocks, threads, shared_bytes): (u64, u32, u32),
        parameters: &mut [*mut c_void],
        order: Order,
    ) -> Option<String> {
        let (name, blocks) = (CString::new(name).unwrap(), blocks.try_into().unwrap());
        let (parameters, order) = (parameters.as_mut_ptr(), order as u32);
        // SAFETY: the function has this type (emulator.cpp); parameters as promised.
        let wrong = unsafe {
            let emulate: Symbol<Emulate> = self.0.get(b"forge_emulate\0").unwrap();
            emulate(name.as_ptr(), blocks, threads, shared_bytes, parameters, order)
        };
        // SAFETY: null, or a string that lives as long as the library.
        let why = (!wrong.is_null()).then(|| unsafe { CStr::from_ptr(wrong) });
        why.map(|why| why.to_string_lossy().into_owned())
    }
}

/// The addresses of a launch's parameters.
macro_rules! parameters {
    ($($value:ident),+ $(,)?) => {
        [$((&raw mut $value).cast::<std::ffi::c_void>()),+]
    };
}
pub(crate) use parameters;
