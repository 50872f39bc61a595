//! The CUDA driver: loading it, its errors as sentences, a device's primary context, and the handful
//! of calls that the backend makes. Everything is enqueued on the caller's stream.

use super::super::Stream;
use super::driver_library;
use crate::error::{Error, Result, bail, forge_status};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use cudarc::driver::{CudaContext, DriverError};
use std::ffi::{CStr, c_void};
use std::mem::ManuallyDrop;
use std::sync::Arc;

/// An address in device memory.
pub type DevicePtr = sys::CUdeviceptr;

/// Turns a driver call's result into an error with the call's name and CUDA's own text.
pub fn check(call: &str, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let error = DriverError(result);
    let text = |s: std::result::Result<&CStr, DriverError>| {
        s.map_or_else(|_| "?".to_string(), |s| s.to_string_lossy().into_owned())
    };
    let (name, meaning) = (text(error.error_name()), text(error.error_string()));
    bail!(FORGE_ERROR_DEVICE, "CUDA: {call}: {name} ({}): {meaning}", result as u32)
}

fn check_cudarc<T>(call: &str, result: std::result::Result<T, DriverError>) -> Result<T> {
    result.map_err(|e| match check(call, e.0) {
        Err(error) => error,
        Ok(()) => Error::new(forge_status::FORGE_ERROR_DEVICE, format!("CUDA: {call} failed")),
    })
}

/// What a GPU is.
#[derive(Clone, Debug)]
pub struct Properties {
    /// Its ordinal.
    pub ordinal: i32,
    /// As NVIDIA calls it.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Largest dynamic shared memory of a block that opts in, in bytes.
    pub shared_memory_per_block: u32,
    /// Bytes of the L2 cache.
    pub l2_bytes: u32,
    /// Whether its kernels can read any memory of the host, by way of the operating system's page tables.
    pub reads_pageable_memory: bool,
    /// CUDA version of the driver, 1000 · major + 10 · minor.
    pub driver_version: i32,
}

/// A GPU's primary context, which frameworks use as well.
pub struct Device {
    context: ManuallyDrop<Arc<CudaContext>>,
    /// What it is.
    pub properties: Properties,
}

impl Device {
    /// The GPU of this ordinal.
    pub fn new(ordinal: i32) -> Result<Self> {
        if ordinal < 0 {
            bail!(FORGE_ERROR_SHAPE, "device: {ordinal}; GPUs are counted from 0");
        }
        let driver_version = driver_library::start()?;
        let count = check_cudarc("cuDeviceGetCount", CudaContext::device_count())?;
        if ordinal >= count {
            bail!(
                FORGE_ERROR_SHAPE,
                "device: {ordinal}; there are {count} GPUs, counted from 0 (CUDA_VISIBLE_DEVICES may hide \
                 others)"
            );
        }
        // cudarc leaves the context current on this thread; put back what was there.
        let before = current()?;
        let context = check_cudarc("cuDevicePrimaryCtxRetain", CudaContext::new(ordinal as usize))?;
        // SAFETY: a context that was current, or null.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(before) })?;
        let attribute = |a| check_cudarc("cuDeviceGetAttribute", context.attribute(a));
        use Attribute::*;
        let properties = Properties {
            ordinal,
            name: check_cudarc("cuDeviceGetName", context.name())?,
            capability: (
                attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            sm_count: attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            shared_memory_per_block: attribute(
                CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )? as u32,
            l2_bytes: attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as u32,
            reads_pageable_memory: attribute(CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS)? != 0,
            driver_version,
        };
        if properties.capability.0 < 8 {
            bail!(
                FORGE_ERROR_NO_BACKEND,
                "device: {ordinal} ({}) has compute capability {}.{}; the kernels need 8.0 or \
                 newer; use another GPU, or FORGE_BACKEND_CPU",
                properties.name,
                properties.capability.0,
                properties.capability.1
            );
        }
        Ok(Self { context: ManuallyDrop::new(context), properties })
    }

    /// Makes the context this thread's current one until the guard is dropped, so that a caller who
    /// works on another GPU is not moved to this one.
    pub fn enter(&self) -> Result<Entered<'_>> {
        // SAFETY: the context lives as long as `self`.
        check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.context.cu_ctx()) })?;
        Ok(Entered(std::marker::PhantomData))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // cudarc makes the context current to release it; put back what was there.
        let before = current();
        // SAFETY: dropped once, here.
        unsafe { ManuallyDrop::drop(&mut self.context) };
        if let Ok(before) = before {
            // SAFETY: a context that was current, or null; on failure there is nothing to be done.
            let _ = unsafe { sys::cuCtxSetCurrent(before) };
        }
    }
}

fn current() -> Result<sys::CUcontext> {
    let mut context = std::ptr::null_mut();
    // SAFETY: the result is a live pointer.
    check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&mut context) })?;
    Ok(context)
}

/// Whether CUDA knows an address: memory that was allocated by it on any device, managed or pinned.
pub fn knows(address: DevicePtr) -> bool {
    let mut kind = 0u32;
    // SAFETY: the result is a live u32, which is what this attribute is; any address may be asked about.
    let result = unsafe {
        let kind = (&raw mut kind).cast();
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        sys::cuPointerGetAttribute(kind, attribute, address)
    };
    // Of another failure the next launch tells.
    result != CUresult::CUDA_ERROR_INVALID_VALUE
}

/// See [`Device::enter`]. Tied to its thread.
pub struct Entered<'a>(std::marker::PhantomData<(&'a Device, *mut ())>);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: pops what `enter` pushed; on failure there is nothing to be done about it.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
    }
}

/// A kernel of a loaded module.
#[derive(Clone, Copy, Debug)]
pub struct Function(pub sys::CUfunction);

// SAFETY: a handle of the driver, which may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// The addresses of a kernel's parameters, in order; each value must live until the launch returns.
macro_rules! parameters {
    ($($value:expr),* $(,)?) => {
        [$((&raw const $value).cast_mut().cast::<std::ffi::c_void>()),*]
    };
}
pub(crate) use parameters;

/// Enqueues a kernel.
///
/// # Safety
/// The context is current; `parameters` are the addresses of values of the types that the kernel
/// declares, in its order; what they point to is valid when the kernel runs.
pub unsafe fn launch(
    function: Function,
    grid: [u32; 3],
    block: u32,
    shared_bytes: u32,
    parameters: &mut [*mut c_void],
    stream: Stream,
) -> Result<()> {
    let [x, y, z] = grid;
    let (parameters, none) = (parameters.as_mut_ptr(), std::ptr::null_mut());
    // SAFETY: as promised by the caller.
    let result = unsafe {
        let stream = stream.0.cast();
        sys::cuLaunchKernel(
            function.0,
            x,
            y,
            z,
            block,
            1,
            1,
            shared_bytes,
            stream,
            parameters,
            none,
        )
    };
    check("cuLaunchKernel", result)
}

/// Writes zeros, and waits until they are there.
///
/// # Safety
/// The context is current; the memory is valid for writes of `bytes` and not in use.
pub unsafe fn zero(target: DevicePtr, bytes: u64) -> Result<()> {
    // SAFETY: as promised by the caller.
    unsafe {
        set_zero(target, bytes as usize, Stream::NULL)?;
        check("cuStreamSynchronize", sys::cuStreamSynchronize(Stream::NULL.0.cast()))
    }
}

/// Enqueues the writing of zeros.
///
/// # Safety
/// As [`zero`], when the work runs.
pub unsafe fn set_zero(target: DevicePtr, bytes: usize, stream: Stream) -> Result<()> {
    // SAFETY: as promised by the caller.
    check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(target, 0, bytes, stream.0.cast()) })
}

/// Enqueues a copy of `rows` rows of `row_bytes`, `pitch` bytes apart, to where they are contiguous.
///
/// # Safety
/// The context is current; both are valid, and apart, when the work runs.
pub unsafe fn copy(
    source: DevicePtr,
    pitch: usize,
    target: DevicePtr,
    (rows, row_bytes): (usize, usize),
    stream: Stream,
) -> Result<()> {
    if rows == 0 || row_bytes == 0 {
        return Ok(());
    }
    let device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
    // One row may be wider than the pitch of a copy in two dimensions, which has a limit.
    let contiguous = pitch == row_bytes || rows == 1;
    // SAFETY: as promised by the caller; the struct is live, and what it does not use is null.
    unsafe {
        if contiguous {
            let bytes = rows * row_bytes;
            let result = sys::cuMemcpyDtoDAsync_v2(target, source, bytes, stream.0.cast());
            return check("cuMemcpyDtoDAsync", result);
        }
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: device,
            srcHost: std::ptr::null(),
            srcDevice: source,
            srcArray: std::ptr::null_mut(),
            srcPitch: pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: device,
            dstHost: std::ptr::null_mut(),
            dstDevice: target,
            dstArray: std::ptr::null_mut(),
            dstPitch: row_bytes,
            WidthInBytes: row_bytes,
            Height: rows,
        };
        check("cuMemcpy2DAsync", sys::cuMemcpy2DAsync_v2(&copy, stream.0.cast()))
    }
}

/// Reads a value from device memory; waits for the stream.
///
/// # Safety
/// The context is current; `source` holds a `T`, for which every bit pattern is a value.
pub unsafe fn read<T: Copy + Default>(source: DevicePtr, stream: Stream) -> Result<T> {
    let mut value = T::default();
    let stream: sys::CUstream = stream.0.cast();
    // SAFETY: as promised by the caller; the wait is what makes `value` complete.
    unsafe {
        let target = (&raw mut value).cast();
        check(
            "cuMemcpyDtoHAsync",
            sys::cuMemcpyDtoHAsync_v2(target, source, size_of::<T>(), stream),
        )?;
        check("cuStreamSynchronize", sys::cuStreamSynchronize(stream))?;
    }
    Ok(value)
}

/// A description of a tensor for the tensor memory accelerator, passed to a kernel by value as a
/// `__grid_constant__` parameter of 128 bytes.
pub type TensorMap = sys::CUtensorMap;
pub use sys::CUtensorMapDataType as TensorType;
pub use sys::CUtensorMapSwizzle as Swizzle;

/// Encodes a tiled tensor map. `dims` and `boxes` run from the fastest dimension; `strides` are the
/// bytes of all dimensions but the fastest. What lies outside arrives as zeros.
///
/// # Safety
/// `data` is 16-byte aligned device memory of these dimensions for as long as the map is used.
pub unsafe fn tensor_map(
    element: TensorType,
    data: DevicePtr,
    dims: &[u64],
    strides: &[u64],
    boxes: &[u32],
    swizzle: Swizzle,
) -> Result<TensorMap> {
    let rank = dims.len();
    if rank == 0 || rank > 5 || strides.len() + 1 != rank || boxes.len() != rank {
        bail!(FORGE_ERROR_PANIC, "tensor map: {rank} dimensions, {} strides", strides.len());
    }
    let mut map = TensorMap { opaque: [0; 16] };
    let steps = [1u32; 5];
    // SAFETY: the slices have `rank` elements (strides one less), checked above.
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            element,
            rank as u32,
            data as *mut c_void,
            dims.as_ptr(),
            strides.as_ptr(),
            boxes.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    check("cuTensorMapEncodeTiled", result)?;
    Ok(map)
}
