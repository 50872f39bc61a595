//! Whether the driver's library is there, whole, new enough, and finds a GPU; else which of these it is not.
//! The rest of the backend calls it through cudarc, which panics where a function is missing.

use super::driver::check;
use crate::error::{Result, bail};
use cudarc::driver::sys::{self, CUresult};
use libloading::Library;

/// The oldest driver that will do, as `cuDriverGetVersion` counts: 12.1 is the first that knows Hopper's
/// tensor maps and takes more than 4 KiB of kernel parameters.
const OLDEST: i32 = 12010;

/// The functions that the version of a driver is asked by.
const FIRST: [&str; 4] = ["cuDriverGetVersion", "cuInit", "cuGetErrorName", "cuGetErrorString"];

/// All others that this backend calls, itself or through cudarc's context.
const OTHERS: [&str; 31] = [
    "cuCtxGetCurrent",
    "cuCtxGetStreamPriorityRange",
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
    "cuMemcpy2DAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuPointerGetAttribute",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuTensorMapEncodeTiled",
];

/// Loads and initialises the driver; its CUDA version.
pub fn start() -> Result<i32> {
    // SAFETY: tries to load the library, no more.
    if !unsafe { sys::is_culib_present() } {
        return absent();
    }
    // SAFETY: the library is present, so that this does not panic.
    let library = unsafe { sys::culib() };
    all_there(library, &FIRST)?;
    let mut version = 0;
    // SAFETY: the function is there; the result is a live i32.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    if version < OLDEST {
        bail!(
            FORGE_ERROR_NO_BACKEND,
            "backend: FORGE_BACKEND_CUDA needs a driver of CUDA {} or newer, this one is of CUDA {}; \
             update the driver, or use FORGE_BACKEND_CPU",
            text(OLDEST),
            text(version)
        );
    }
    all_there(library, &OTHERS)?;
    // SAFETY: the function is there.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_SUCCESS => Ok(version),
        result => {
            let why = check("cuInit", result).err().map_or(String::new(), |e| e.message);
            bail!(
                FORGE_ERROR_NO_BACKEND,
                "backend: FORGE_BACKEND_CUDA finds no usable GPU: {why}; {}",
                way_out(result)
            )
        }
    }
}

/// The driver is not there, or is no library.
fn absent() -> Result<i32> {
    // SAFETY: as NVIDIA's driver, or not loaded at all.
    let why = match unsafe { Library::new("libcuda.so.1") } {
        Err(error) => super::libraries::why(error),
        Ok(_) => "it went away".into(), // and came back
    };
    if why.contains("No such file") {
        bail!(
            FORGE_ERROR_NO_BACKEND,
            "backend: FORGE_BACKEND_CUDA needs NVIDIA's driver, and there is no libcuda.so.1; install \
             the driver (in a container: start it with the GPUs), or use FORGE_BACKEND_CPU"
        );
    }
    bail!(
        FORGE_ERROR_NO_BACKEND,
        "backend: FORGE_BACKEND_CUDA: NVIDIA's driver cannot be loaded: {why}; install the driver \
         anew, or use FORGE_BACKEND_CPU"
    )
}

fn all_there(library: &Library, names: &[&str]) -> Result<()> {
    for name in names {
        // SAFETY: the symbol is looked for and not used.
        if unsafe { library.get::<*const ()>(name.as_bytes()) }.is_err() {
            bail!(
                FORGE_ERROR_NO_BACKEND,
                "backend: FORGE_BACKEND_CUDA: the driver's library has no {name}, so it is broken or is \
                 not NVIDIA's; see which libcuda.so LD_LIBRARY_PATH leads to, or use FORGE_BACKEND_CPU"
            );
        }
    }
    Ok(())
}

/// What to do where cuInit fails.
fn way_out(result: CUresult) -> &'static str {
    match result {
        CUresult::CUDA_ERROR_NO_DEVICE => {
            "see whether CUDA_VISIBLE_DEVICES hides it and what nvidia-smi says, or use \
             FORGE_BACKEND_CPU"
        }
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "the driver was updated while it ran: reboot, or use FORGE_BACKEND_CPU"
        }
        CUresult::CUDA_ERROR_STUB_LIBRARY => {
            "LD_LIBRARY_PATH leads to the CUDA toolkit's stub: take it out, or use FORGE_BACKEND_CPU"
        }
        _ => "see what nvidia-smi says, or use FORGE_BACKEND_CPU",
    }
}

/// `major.minor` of a CUDA version number.
fn text(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}
