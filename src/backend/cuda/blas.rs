//! cuBLASLt: products whose algorithm is chosen once for each shape. Loaded at run time, like NVRTC.

use super::super::Stream;
use super::driver::DevicePtr;
use super::workspace::BLAS_BYTES;
use crate::error::{Result, bail};
use crate::format::Dtype;
use libloading::os::unix::{Library, RTLD_NOW, Symbol};
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

type Opaque = *mut c_void;

// Numbers of cublasLt.h and library_types.h.
const COMPUTE_32F: c_int = 68; // fp32 arithmetic; TF32 has a number of its own
const R_32F: c_int = 0;
const R_16F: c_int = 2;
const R_16BF: c_int = 14;
const DESC_TRANSB: c_int = 4;
const OP_T: c_int = 1;
const PREF_MAX_WORKSPACE_BYTES: c_int = 1;
const PREF_REDUCTION_SCHEME_MASK: c_int = 3;
const PREF_MIN_ALIGNMENT_A: c_int = 5;
/// What the heuristic says of sizes, strides or alignments for which there is no algorithm.
const WITHOUT_ALGORITHM: [c_int; 2] = [7, 15]; // INVALID_VALUE, NOT_SUPPORTED
/// No split of the summed dimension: each element is summed by one thread block.
const REDUCTION_NONE: u32 = 0;

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Heuristic {
    algorithm: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

type Set = unsafe extern "C" fn(Opaque, c_int, *const c_void, usize) -> c_int;
type GetHeuristic = unsafe extern "C" fn(
    Opaque,
    Opaque,
    Opaque,
    Opaque,
    Opaque,
    Opaque,
    Opaque,
    c_int,
    *mut Heuristic,
    *mut c_int,
) -> c_int;
type Matmul = unsafe extern "C" fn(
    Opaque,
    Opaque,
    *const c_void,
    *const c_void,
    Opaque,
    *const c_void,
    Opaque,
    *const c_void,
    *const c_void,
    Opaque,
    *mut c_void,
    Opaque,
    *const [u64; 8],
    *mut c_void,
    usize,
    Opaque,
) -> c_int;
type Destroy = unsafe extern "C" fn(Opaque) -> c_int;

struct Table {
    create: Symbol<unsafe extern "C" fn(*mut Opaque) -> c_int>,
    desc_create: Symbol<unsafe extern "C" fn(*mut Opaque, c_int, c_int) -> c_int>,
    desc_set: Symbol<Set>,
    desc_destroy: Symbol<Destroy>,
    layout_create: Symbol<unsafe extern "C" fn(*mut Opaque, c_int, u64, u64, i64) -> c_int>,
    layout_destroy: Symbol<Destroy>,
    preference_create: Symbol<unsafe extern "C" fn(*mut Opaque) -> c_int>,
    preference_set: Symbol<Set>,
    preference_destroy: Symbol<Destroy>,
    heuristic: Symbol<GetHeuristic>,
    matmul: Symbol<Matmul>,
    _library: Library,
}

impl Table {
    fn load() -> std::result::Result<Self, String> {
        let names = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];
        let directories = super::libraries::directories("cublas");
        let beside = names.iter().flat_map(|n| directories.iter().map(move |d| d.join(n)));
        let mut tried = Vec::new();
        for path in names.iter().map(PathBuf::from).chain(beside.filter(|p| p.exists())) {
            match Self::open(&path) {
                Ok(table) => return Ok(table),
                Err(e) => tried.push(format!("{}: {}", path.display(), super::libraries::why(e))),
            }
        }
        tracing::debug!(target: "forge", "cuBLASLt: {}", tried.join("; "));
        Err("cuBLASLt: libcublasLt.so.13 cannot be loaded; `pip install nvidia-cublas` (a CUDA build \
             of torch brings it)"
            .to_string())
    }

    fn open(path: &std::path::Path) -> std::result::Result<Self, libloading::Error> {
        // SAFETY: NVIDIA's library has no initialisers that need care; the signatures are those of
        // cublasLt.h, the same in CUDA 12 and 13.
        unsafe {
            let library = Library::open(Some(path), RTLD_NOW)?;
            Ok(Self {
                create: library.get(b"cublasLtCreate\0")?,
                desc_create: library.get(b"cublasLtMatmulDescCreate\0")?,
                desc_set: library.get(b"cublasLtMatmulDescSetAttribute\0")?,
                desc_destroy: library.get(b"cublasLtMatmulDescDestroy\0")?,
                layout_create: library.get(b"cublasLtMatrixLayoutCreate\0")?,
                layout_destroy: library.get(b"cublasLtMatrixLayoutDestroy\0")?,
                preference_create: library.get(b"cublasLtMatmulPreferenceCreate\0")?,
                preference_set: library.get(b"cublasLtMatmulPreferenceSetAttribute\0")?,
                preference_destroy: library.get(b"cublasLtMatmulPreferenceDestroy\0")?,
                heuristic: library.get(b"cublasLtMatmulAlgoGetHeuristic\0")?,
                matmul: library.get(b"cublasLtMatmul\0")?,
                _library: library,
            })
        }
    }
}

fn check(call: &str, status: c_int) -> Result<()> {
    if status != 0 {
        bail!(FORGE_ERROR_DEVICE, "cuBLASLt: {call}: status {status} (cublasStatus_t)");
    }
    Ok(())
}

/// The left operand of a product, row-major in memory: either `[m, k]` or, `summed_first`, `[k, m]`.
#[derive(Clone, Copy, Debug)]
pub struct Left {
    /// First element.
    pub data: DevicePtr,
    /// Elements from one row in memory to the next.
    pub stride: usize,
    /// Whether the summed dimension is the slow one.
    pub summed_first: bool,
}

/// The right operand `[k, n]` and the results `[m, n]`, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Plane {
    /// First element.
    pub data: DevicePtr,
    /// Elements from one row to the next.
    pub stride: usize,
}

/// `D[m, n] = left[m, k] · right[k, n] (+ C[m, n])`, summed in fp32.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Rows of D.
    pub m: usize,
    /// Columns of D.
    pub n: usize,
    /// Summed.
    pub k: usize,
    /// Type of both operands.
    pub dtype: Dtype,
    /// Type of C and D.
    pub out_dtype: Dtype,
    /// Left operand.
    pub left: Left,
    /// Right operand.
    pub right: Plane,
    /// Added to the product, if there is one.
    pub addend: Option<Plane>,
    /// Where the result goes.
    pub out: Plane,
}

/// What an algorithm is chosen for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    sizes: [usize; 3],
    strides: [usize; 4],
    alignments: [u32; 4],
    dtypes: [c_int; 2],
    summed_first: bool,
}

/// Descriptors and algorithm of a shape; None where cuBLASLt has none.
struct Plan {
    table: &'static Table,
    desc: Opaque,
    layouts: [Opaque; 4],
    chosen: Option<Heuristic>,
}

// SAFETY: descriptors are plain memory that is only read after creation.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by the matching create calls (null where those failed), destroyed once.
        unsafe {
            for layout in self.layouts.into_iter().filter(|l| !l.is_null()) {
                (self.table.layout_destroy)(layout);
            }
            if !self.desc.is_null() {
                (self.table.desc_destroy)(self.desc);
            }
        }
    }
}

struct Handle(Opaque);
// SAFETY: cuBLASLt's handle may be used from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// Plans kept; a run of ragged batches must not grow them without end.
const MOST_PLANS: usize = 4096;

/// cuBLASLt for one device.
#[derive(Default)]
pub struct Blas {
    /// Made on first use, with the device's context current; kept, since destroying it at the end of a
    /// process would race with the driver's own end.
    handle: OnceLock<std::result::Result<Handle, String>>,
    plans: Mutex<HashMap<Shape, Arc<Plan>>>,
}

fn table() -> std::result::Result<&'static Table, String> {
    static TABLE: OnceLock<std::result::Result<Table, String>> = OnceLock::new();
    TABLE.get_or_init(Table::load).as_ref().map_err(Clone::clone)
}

fn type_code(dtype: Dtype) -> c_int {
    match dtype {
        Dtype::F32 => R_32F,
        Dtype::Bf16 => R_16BF,
        Dtype::F16 => R_16F,
        Dtype::U8 | Dtype::U16 => unreachable!("products are of floats; the C ABI checks this"),
    }
}

/// The largest power of two up to 256 that divides an address.
fn alignment(data: DevicePtr) -> u32 {
    1 << data.trailing_zeros().min(8)
}

impl Blas {
    /// Enqueues a product. False: cuBLASLt has no algorithm for these sizes and alignments.
    ///
    /// # Safety
    /// The context is current; all memory is valid when the work runs, and [`BLAS_BYTES`] of
    /// `workspace` are free for it.
    pub unsafe fn enqueue(
        &self,
        product: &Product,
        workspace: DevicePtr,
        stream: Stream,
    ) -> Result<bool> {
        let missing = |why: &String| {
            crate::error::Error::new(crate::error::forge_status::FORGE_ERROR_DEVICE, why.clone())
        };
        let table = table().map_err(|why| missing(&why))?;
        let handle = self.handle.get_or_init(|| {
            let mut handle = null_mut();
            // SAFETY: the result is a live pointer.
            check("cublasLtCreate", unsafe { (table.create)(&mut handle) })
                .map_err(|e| e.message)?;
            Ok(Handle(handle))
        });
        let handle = handle.as_ref().map_err(missing)?;
        let plan = self.plan(table, handle, product)?;
        let Some(chosen) = plan.chosen else { return Ok(false) };
        let (one, beta) = (1.0f32, if product.addend.is_some() { 1.0f32 } else { 0.0 });
        let addend = product.addend.unwrap_or(product.out);
        let pointer = |data: DevicePtr| data as *mut c_void;
        // Column-major, as cuBLAS counts, everything is transposed: Dᵀ = rightᵀ · leftᵀ.
        // SAFETY: as promised by the caller; descriptors belong to these sizes.
        let status = unsafe {
            (table.matmul)(
                handle.0,
                plan.desc,
                (&raw const one).cast(),
                pointer(product.right.data),
                plan.layouts[0],
                pointer(product.left.data),
                plan.layouts[1],
                (&raw const beta).cast(),
                pointer(addend.data),
                plan.layouts[2],
                pointer(product.out.data),
                plan.layouts[3],
                &chosen.algorithm,
                pointer(workspace),
                BLAS_BYTES as usize,
                stream.0,
            )
        };
        check("cublasLtMatmul", status)?;
        Ok(true)
    }

    fn plan(&self, table: &'static Table, handle: &Handle, p: &Product) -> Result<Arc<Plan>> {
        let addend = p.addend.unwrap_or(p.out);
        let shape = Shape {
            sizes: [p.m, p.n, p.k],
            strides: [p.right.stride, p.left.stride, addend.stride, p.out.stride],
            alignments: [p.right.data, p.left.data, addend.data, p.out.data].map(alignment),
            dtypes: [type_code(p.dtype), type_code(p.out_dtype)],
            summed_first: p.left.summed_first,
        };
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&shape) {
            return Ok(plan.clone());
        }
        if plans.len() >= MOST_PLANS {
            plans.clear();
        }
        let plan = Arc::new(make_plan(table, handle, &shape)?);
        plans.insert(shape, plan.clone());
        Ok(plan)
    }
}

fn make_plan(table: &'static Table, handle: &Handle, shape: &Shape) -> Result<Plan> {
    let mut plan = Plan { table, desc: null_mut(), layouts: [null_mut(); 4], chosen: None };
    let [m, n, k] = shape.sizes.map(|size| size as u64);
    let [operand, out] = shape.dtypes;
    let left = if shape.summed_first { (m, k) } else { (k, m) };
    let sizes = [(n, k), left, (n, m), (n, m)];
    let types = [operand, operand, out, out];
    let bytes = |value: &u32| (&raw const *value).cast::<c_void>();
    // SAFETY: results are live pointers, attributes have the sizes that cublasLt.h gives them.
    unsafe {
        check("cublasLtMatmulDescCreate", (table.desc_create)(&mut plan.desc, COMPUTE_32F, R_32F))?;
        if shape.summed_first {
            let transposed = OP_T as u32;
            let set = (table.desc_set)(plan.desc, DESC_TRANSB, bytes(&transposed), 4);
            check("cublasLtMatmulDescSetAttribute", set)?;
        }
        for i in 0..4 {
            let (rows, cols) = sizes[i];
            let layout = &mut plan.layouts[i];
            let made = (table.layout_create)(layout, types[i], rows, cols, shape.strides[i] as i64);
            check("cublasLtMatrixLayoutCreate", made)?;
        }
        let mut preference = null_mut();
        check("cublasLtMatmulPreferenceCreate", (table.preference_create)(&mut preference))?;
        let most = BLAS_BYTES;
        let mut set = (table.preference_set)(
            preference,
            PREF_MAX_WORKSPACE_BYTES,
            (&raw const most).cast(),
            8,
        );
        let no_split = bytes(&REDUCTION_NONE);
        set |= (table.preference_set)(preference, PREF_REDUCTION_SCHEME_MASK, no_split, 4);
        for (i, alignment) in shape.alignments.iter().enumerate() {
            let attribute = PREF_MIN_ALIGNMENT_A + i as c_int;
            set |= (table.preference_set)(preference, attribute, bytes(alignment), 4);
        }
        let (mut best, mut found) = (Heuristic::default(), 0);
        let [a, b, c, d] = plan.layouts;
        let status = (table.heuristic)(
            handle.0, plan.desc, a, b, c, d, preference, 1, &mut best, &mut found,
        );
        (table.preference_destroy)(preference);
        check("cublasLtMatmulPreferenceSetAttribute", set)?;
        if !WITHOUT_ALGORITHM.contains(&status) {
            check("cublasLtMatmulAlgoGetHeuristic", status)?;
            plan.chosen = (found > 0 && best.state == 0).then_some(best);
        }
    }
    Ok(plan)
}

const _: () = assert!(size_of::<Heuristic>() == 96);
