//! The C ABI on a GPU that is not there (tests/fake_cuda): which memory it refuses, and that what
//! forge_warm compiles is all that the calls of a linear ask for. Kernels are compiled and loaded, not run.

mod fake_cuda;

use cudarc::driver::sys;
use fake_cuda::{again, build, directory, finish, last_error, ok, sized};
use forge::error::forge_status::{self, *};
use forge::ffi::comm::*;
use forge::ffi::context::*;
use forge::ffi::enums::*;
use forge::ffi::error::*;
use forge::ffi::linear::*;
use forge::ffi::run::*;
use forge::ffi::types::*;
use forge::ffi::update_group::*;
use forge::ffi::warm::*;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};

const ROWS: u64 = 128;
const COLS: u64 = 256;
const TOKENS: u64 = 64;

/// Memory of the fake GPU, zeroed; never freed.
fn device(bytes: u64) -> forge_buffer {
    let mut address = 0;
    // SAFETY: the result is a live pointer.
    let status = unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1) as usize) };
    assert_eq!(status, sys::CUresult::CUDA_SUCCESS);
    forge_buffer { data: address as *mut c_void, bytes }
}

fn constant(buffer: forge_buffer) -> forge_const_buffer {
    forge_const_buffer { data: buffer.data, bytes: buffer.bytes }
}

fn path(name: &str) -> PathBuf {
    std::env::var_os(name).unwrap().into()
}

/// Launches that the fake driver has noted.
fn launches() -> Vec<String> {
    let text = std::fs::read_to_string(path("FAKE_CUDA_LOG")).unwrap_or_default();
    text.lines().filter_map(|l| l.strip_prefix("launch ")).map(str::to_string).collect()
}

/// How often the library said that it compiled a kernel.
static COMPILED: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" fn count(_: *mut c_void, _: u32, _: *const c_char, message: *const c_char) {
    // SAFETY: the library's strings are NUL-terminated.
    if unsafe { CStr::from_ptr(message) }.to_string_lossy().contains(" compiled in ") {
        COMPILED.fetch_add(1, Ordering::Relaxed);
    }
}

fn context() -> *mut forge_context {
    let cache = CString::new(path("FORGE_TEST_CACHE").to_str().unwrap()).unwrap();
    let mut config: forge_context_config = sized();
    config.backend = forge_backend::FORGE_BACKEND_CUDA as u32;
    config.cache_dir = cache.as_ptr();
    let mut context = null_mut();
    // SAFETY: the struct and its strings are live.
    unsafe {
        ok(forge_set_log_callback(Some(count), null_mut(), 3));
        ok(forge_context_new(&config, &mut context));
    }
    context
}

/// Weight bf16, AdamW, states of this format, factors of this type.
fn config(rule: &CStr, factor: forge_dtype, state: forge_state_format) -> forge_linear_config {
    let mut config: forge_linear_config = sized();
    config.factor_dtype = factor as u32;
    (config.out_features, config.in_features) = (ROWS, COLS);
    config.weight_format = forge_weight_format::FORGE_WEIGHT_BF16 as u32;
    config.weight_rounding = forge_rounding::FORGE_ROUNDING_STOCHASTIC as u32;
    config.state_formats = [state as u32; 3];
    config.rule = rule.as_ptr();
    config
}

/// A linear with all its buffers.
struct Layer {
    linear: *mut forge_linear,
    parameter: forge_parameter,
    step: forge_step,
    segments: Vec<forge_segment>,
    accumulator: forge_buffer,
    dx: forge_buffer,
    dbias: forge_buffer,
    image: forge_buffer,
    states: u32,
}

impl Layer {
    fn new(context: *mut forge_context, config: &forge_linear_config, segments: usize) -> Self {
        let mut bytes = 0;
        // SAFETY: handles are live; the workspace is memory of the fake GPU.
        unsafe {
            ok(forge_context_workspace_bytes(context, &mut bytes));
            ok(forge_context_set_workspace(context, device(bytes)));
        }
        Self::another(context, config, segments)
    }

    /// In a context that has a workspace.
    fn another(context: *mut forge_context, config: &forge_linear_config, segments: usize) -> Self {
        let (mut comm, mut linear) = (null_mut(), null_mut());
        let mut layout: forge_layout = sized();
        // SAFETY: handles and structs are live.
        unsafe {
            ok(forge_comm_new_solo(context, &mut comm));
            ok(forge_linear_new(context, comm, config, &mut linear));
            ok(forge_linear_layout(linear, &mut layout));
        }
        let array = |a: &forge_array_layout| if a.bytes == 0 { NO_BUFFER } else { device(a.bytes) };
        let mut parameter: forge_parameter = sized();
        parameter.weight = array(&layout.weight);
        parameter.weight_extra = array(&layout.weight_extra);
        parameter.states = layout.states.map(|s| array(&s));
        parameter.scales = layout.scales.map(|s| array(&s));
        let mut step: forge_step = sized();
        step.scalars.step = 1;
        step.scalars.grad_scale = 1.0;
        step.scalars.hyper[..5].copy_from_slice(&[1e-3, 0.0, 0.9, 0.99, 1e-8]);
        let element =
            if config.factor_dtype == forge_dtype::FORGE_DTYPE_F32 as u32 { 4 } else { 2 };
        let (rows, cols) = (config.out_features, config.in_features);
        let segment = || forge_segment {
            dy: constant(device(TOKENS * rows * element)),
            x: constant(device(TOKENS * cols * element)),
            tokens: TOKENS,
            dy_stride: 0,
            x_stride: 0,
        };
        Self {
            linear,
            parameter,
            step,
            segments: (0..segments).map(|_| segment()).collect(),
            accumulator: device(layout.accumulator.bytes),
            dx: device(TOKENS * cols * element),
            dbias: device(rows * element),
            image: device(4 * rows * cols),
            states: layout.n_states,
        }
    }

    fn backward(&self, mode: forge_backward_mode, accumulator: forge_buffer) -> forge_status {
        let mut call: forge_backward = sized();
        call.mode = mode as u32;
        call.tokens = TOKENS;
        (call.dy, call.x) = (self.segments[0].dy, self.segments[0].x);
        (call.dx, call.dbias, call.accumulator) = (self.dx, self.dbias, accumulator);
        (call.parameter, call.step) = (&self.parameter, &self.step);
        // SAFETY: handles and structs are live, buffers have their sizes.
        unsafe { forge_linear_backward(self.linear, &call, null_mut(), null_mut()) }
    }

    fn update_of(&self, segments: usize, accumulator: forge_buffer) -> forge_update {
        let mut call: forge_update = sized();
        (call.n_segments, call.segments) = (segments as u32, self.segments.as_ptr());
        call.accumulator = constant(accumulator);
        (call.parameter, call.step) = (&self.parameter, &self.step);
        call
    }

    fn update(&self, segments: usize, accumulator: forge_buffer) -> forge_status {
        let call = self.update_of(segments, accumulator);
        let mut report: forge_report = sized();
        // SAFETY: as above.
        unsafe { forge_linear_update(self.linear, &call, &mut report, null_mut()) }
    }

    fn norm(&self, segments: usize, accumulator: forge_buffer) -> forge_status {
        let (n, at) = (segments as u32, self.segments.as_ptr());
        let (mut out, none): (forge_norm, _) = (sized(), null_mut());
        // SAFETY: as above.
        unsafe { forge_linear_norm(self.linear, at, n, constant(accumulator), 0, &mut out, none) }
    }

    fn images(&self, fp32: forge_buffer) -> [forge_status; 2] {
        let (linear, parameter, none) = (self.linear, &self.parameter, null_mut());
        // SAFETY: as above.
        unsafe {
            for k in 0..self.states {
                ok(forge_linear_export_state(linear, parameter, k, self.image, none));
                ok(forge_linear_import_state(linear, parameter, k, constant(self.image), none));
            }
            [
                forge_linear_export_weight(linear, parameter, fp32, none),
                forge_linear_import_weight(linear, parameter, constant(fp32), none),
            ]
        }
    }

    /// Every kind of call.
    fn all(&self) {
        use forge_backward_mode::*;
        for accumulator in [NO_BUFFER, self.accumulator] {
            ok(self.backward(FORGE_BACKWARD_UPDATE, accumulator));
            for segments in [0, 1, self.segments.len()] {
                ok(self.update(segments, accumulator));
                ok(self.norm(segments, accumulator));
            }
        }
        ok(self.backward(FORGE_BACKWARD_ACCUMULATE, self.accumulator));
        ok(self.backward(FORGE_BACKWARD_KEEP, NO_BUFFER));
        self.images(self.image).into_iter().for_each(ok);
    }
}

const NO_BUFFER: forge_buffer = forge_buffer { data: null_mut(), bytes: 0 };

/// What the tests below run under the fake libraries. FORGE_TEST_ARCHITECTURE is that of the fake GPU.
#[test]
#[ignore = "run by what_was_warmed_is_all_that_a_run_asks_for"]
fn warm_and_run() {
    use {forge_dtype::*, forge_fp32_products::*, forge_state_format::*};
    let architecture = std::env::var("FORGE_TEST_ARCHITECTURE").unwrap();
    let name = CString::new(architecture.clone()).unwrap();
    let cache = CString::new(path("FORGE_TEST_CACHE").to_str().unwrap()).unwrap();
    let context = context();
    for (rule, factor, products, state, segments) in [
        (c"adamw", FORGE_DTYPE_BF16, FORGE_FP32_EXACT, FORGE_STATE_Q8, 3),
        (c"adamw", FORGE_DTYPE_BF16, FORGE_FP32_EXACT, FORGE_STATE_BF16, 1),
        (c"lion", FORGE_DTYPE_F32, FORGE_FP32_EXACT, FORGE_STATE_F32, 2),
        (c"adamw", FORGE_DTYPE_F32, FORGE_FP32_BF16X3, FORGE_STATE_F32, 2),
    ] {
        let mut linear = config(rule, factor, state);
        linear.fp32_products = products as u32;
        let mut warm: forge_warm_config = sized();
        (warm.linear, warm.tokens, warm.micro_batches) = (&linear, TOKENS, segments);
        let mut here = warm;
        (warm.architecture, warm.cache_dir) = (name.as_ptr(), cache.as_ptr());
        let mut report: forge_warm_report = sized();
        // SAFETY: the structs and what they point to are live.
        unsafe { ok(forge_warm(&warm, &mut report)) };
        assert!(report.compiled > 0);
        // The context of such a GPU finds all of it.
        here.threads = 1;
        let all = report.compiled + report.present;
        // SAFETY: as above.
        unsafe { ok(forge_context_warm(context, &here, &mut report)) };
        assert_eq!((report.compiled, report.present), (0, all));

        let before = launches().len();
        Layer::new(context, &linear, segments as usize).all();
        assert_eq!(COMPILED.load(Ordering::Relaxed), 0, "{rule:?} {factor:?} {state:?}");
        let launched = launches().split_off(before);
        let fused = launched.iter().any(|name| name == "forge_wgrad_sm90");
        assert_eq!(fused, architecture == "sm_90a" && factor == FORGE_DTYPE_BF16, "{launched:?}");
        // Factors that are split have the kernel of 8.0 on every GPU; exact ones have none.
        let fused = launched.iter().any(|name| name == "forge_wgrad_sm80");
        let expected =
            products == FORGE_FP32_BF16X3 || architecture != "sm_90a" && factor == FORGE_DTYPE_BF16;
        assert_eq!(fused, expected, "{launched:?}");
        for name in ["forge_elementwise", "forge_export", "forge_import", "forge_bias"] {
            assert!(launched.iter().any(|l| l == name), "no {name} in {launched:?}");
        }
    }
    // What was not warmed is compiled, and the log says so.
    let other = config(c"sgd", FORGE_DTYPE_BF16, FORGE_STATE_F32);
    Layer::new(context, &other, 1).all();
    assert!(COMPILED.load(Ordering::Relaxed) > 0);
}

/// What `many_small_linears_take_few_launches` runs under the fake libraries: forty layers as warmed, and
/// one whose update is not for a group.
#[test]
#[ignore = "run by many_small_linears_take_few_launches"]
fn update_forty_layers() {
    let context = context();
    let mut linear =
        config(c"adamw", forge_dtype::FORGE_DTYPE_BF16, forge_state_format::FORGE_STATE_BF16);
    (linear.out_features, linear.in_features) = (512, 512);
    let mut warm: forge_warm_config = sized();
    (warm.linear, warm.tokens, warm.micro_batches, warm.threads) = (&linear, TOKENS, 1, 1);
    warm.device_scalars = 1;
    let mut report: forge_warm_report = sized();
    // SAFETY: the structs and what they point to are live.
    unsafe { ok(forge_context_warm(context, &warm, &mut report)) };
    COMPILED.store(0, Ordering::Relaxed);

    let mut layers = vec![Layer::new(context, &linear, 1)];
    for id in 1..41 {
        linear.parameter_id = id;
        layers.push(Layer::another(context, &linear, 1));
    }
    let group = |update: &dyn Fn(&Layer) -> forge_update| {
        let updates: Vec<forge_update> = layers.iter().map(update).collect();
        let updates: Vec<*const forge_update> = updates.iter().map(|u| &raw const *u).collect();
        let linears: Vec<*mut forge_linear> = layers.iter().map(|l| l.linear).collect();
        let before = launches().len();
        // SAFETY: handles and structs are live, buffers have their sizes.
        let status = unsafe {
            let n = linears.len() as u32;
            forge_linear_update_group(linears.as_ptr(), updates.as_ptr(), n, null_mut())
        };
        (status, launches().split_off(before))
    };
    let last = layers.last().unwrap().linear;
    let update = |layer: &Layer, accumulator| {
        // Without factors there is nothing to multiply.
        let segments = usize::from(layer.linear != last);
        let mut call = layer.update_of(segments, accumulator);
        call.device_report = device(size_of::<forge_report>() as u64).data.cast();
        call
    };
    // 9.0's kernel reads tensor maps that another one writes.
    let updates = if std::env::var("FORGE_TEST_ARCHITECTURE").is_ok_and(|a| a == "sm_90a") {
        &["forge_group_maps", "forge_wgrad_sm90"][..]
    } else {
        &["forge_wgrad_sm80"][..]
    };
    let few = [updates, &["forge_reports"]].concat();
    let (status, launched) = group(&|layer| update(layer, NO_BUFFER));
    ok(status);
    assert_eq!(launched, [&few[..], &["forge_elementwise", "forge_report"]].concat());
    let (status, launched) = group(&|layer| update(layer, layer.accumulator));
    ok(status);
    assert_eq!(launched[..few.len()], few);
    // Scalars of a captured step: one kernel makes the constants of all.
    let shared = device(size_of::<forge_step_scalars>() as u64).data;
    let captured = |layer: &Layer| {
        let mut step = layer.step;
        step.device_scalars = shared.cast();
        step
    };
    let steps: Vec<forge_step> = layers.iter().map(captured).collect();
    let (status, launched) = group(&|layer| {
        let index = layers.iter().position(|l| l.linear == layer.linear).unwrap();
        let mut call = update(layer, NO_BUFFER);
        call.step = &steps[index];
        call
    });
    ok(status);
    assert_eq!(launched[..few.len() + 1], [&["forge_prologue"], &few[..]].concat());
    // Of two places: each prologue before its own weights, since both leave constants at one place.
    let other = device(size_of::<forge_step_scalars>() as u64).data;
    let two: Vec<forge_step> = (0..layers.len())
        .map(|k| {
            let mut step = steps[k];
            if k % 2 == 1 {
                step.device_scalars = other.cast();
            }
            step
        })
        .collect();
    let (status, launched) = group(&|layer| {
        let index = layers.iter().position(|l| l.linear == layer.linear).unwrap();
        let mut call = layer.update_of(1, NO_BUFFER);
        call.step = &two[index];
        call
    });
    ok(status);
    let one = [&["forge_prologue"], updates].concat();
    assert_eq!(launched, [&one[..], &one[..]].concat());
    // Nobody asked for a report.
    let (status, launched) = group(&|layer| layer.update_of(1, NO_BUFFER));
    ok(status);
    assert_eq!(launched, updates);
    assert_eq!(COMPILED.load(Ordering::Relaxed), 0);

    let host = [0u8; 8];
    let (status, launched) = group(&|layer| {
        let mut call = layer.update_of(1, NO_BUFFER);
        if layer.linear == last {
            call.accumulator = forge_const_buffer { data: host.as_ptr().cast(), bytes: 1 << 20 };
        }
        call
    });
    assert_eq!((status, launched.len()), (FORGE_ERROR_MEMORY, 0), "{}", last_error());
    assert!(last_error().starts_with("updates[40]: accumulator: 0x"), "{}", last_error());
}

/// What the test below runs twice: with NVRTC to warm, and without to run.
#[test]
#[ignore = "run by a_warmed_cache_needs_no_compiler"]
fn warm_or_run_without_nvrtc() {
    use {forge_dtype::*, forge_state_format::*};
    let linear = config(c"adamw", FORGE_DTYPE_BF16, FORGE_STATE_BF16);
    if std::env::var_os("FORGE_TEST_WARM").is_some() {
        let mut warm: forge_warm_config = sized();
        let cache = CString::new(path("FORGE_TEST_CACHE").to_str().unwrap()).unwrap();
        (warm.linear, warm.tokens, warm.micro_batches) = (&linear, TOKENS, 1);
        (warm.architecture, warm.cache_dir) = (c"sm_90a".as_ptr(), cache.as_ptr());
        let mut report: forge_warm_report = sized();
        // SAFETY: the structs and what they point to are live.
        return unsafe { ok(forge_warm(&warm, &mut report)) };
    }
    let context = context();
    Layer::new(context, &linear, 1).all();
    let other = Layer::new(context, &config(c"lion", FORGE_DTYPE_BF16, FORGE_STATE_F32), 1);
    assert_eq!(other.update(1, NO_BUFFER), FORGE_ERROR_COMPILE);
    let message = last_error();
    for part in ["'lion'", "is not in the cache", "/cache", "FORGE_NVRTC", "forge_train warm"] {
        assert!(message.contains(part), "no '{part}' in: {message}");
    }
}

/// What `memory_that_is_not_the_gpus_is_refused_by_name` runs under the fake libraries.
#[test]
#[ignore = "run by memory_that_is_not_the_gpus_is_refused_by_name"]
fn refuse_memory() {
    use forge_backward_mode::*;
    let context = context();
    let linear =
        config(c"adamw", forge_dtype::FORGE_DTYPE_BF16, forge_state_format::FORGE_STATE_BF16);
    let mut host = vec![0u64; (ROWS * COLS) as usize];
    let at_host = |b: forge_buffer| forge_buffer { data: host.as_ptr() as *mut c_void, ..b };

    // Before a workspace was lent, and lent wrong ones.
    let mut layer = Layer::new(context, &linear, 1);
    let before = launches().len();
    let refused = |status: forge_status, wanted: forge_status, parts: &[&str]| {
        let message = last_error();
        println!("{status:?}: {message}");
        assert_eq!(status, wanted, "{message}");
        for part in parts {
            assert!(message.contains(part), "no '{part}' in: {message}");
        }
    };
    let memory = |status, name: &str| {
        refused(status, FORGE_ERROR_MEMORY, &[&format!("{name}: 0x"), "host's", "copy it"]);
    };
    let good = device(64 << 20);
    // SAFETY: handles are live; what is refused is not used.
    unsafe {
        memory(forge_context_set_workspace(context, at_host(good)), "workspace");
        let shifted = forge_buffer { data: good.data.wrapping_byte_add(16), bytes: 63 << 20 };
        let status = forge_context_set_workspace(context, shifted);
        refused(status, FORGE_ERROR_MISALIGNED, &["workspace: 0x", "256 bytes"]);
        let small = forge_buffer { bytes: 1000, ..good };
        let status = forge_context_set_workspace(context, small);
        refused(status, FORGE_ERROR_BUFFER_SIZE, &["workspace: 1000 bytes"]);
    }

    let (parameter, segment, step) = (layer.parameter, layer.segments[0], layer.step);
    layer.parameter.weight = at_host(parameter.weight);
    memory(layer.update(1, NO_BUFFER), "parameter.weight");
    memory(layer.backward(FORGE_BACKWARD_KEEP, NO_BUFFER), "parameter.weight");
    layer.parameter = parameter;
    layer.parameter.states[1] = at_host(parameter.states[1]);
    memory(layer.update(1, NO_BUFFER), "parameter.states[1]");
    layer.parameter = parameter;
    let at_host_const =
        |b: forge_const_buffer| forge_const_buffer { data: host.as_ptr().cast(), ..b };
    layer.segments[0].x = at_host_const(segment.x);
    memory(layer.norm(1, NO_BUFFER), "segments[0].x");
    memory(layer.backward(FORGE_BACKWARD_UPDATE, NO_BUFFER), "x");
    layer.segments[0] = segment;
    layer.segments[0].dy = at_host_const(segment.dy);
    memory(layer.update(1, NO_BUFFER), "segments[0].dy");
    layer.segments[0] = segment;
    memory(layer.update(1, at_host(layer.accumulator)), "accumulator");
    for status in layer.images(at_host(layer.image)) {
        assert_eq!(status, FORGE_ERROR_MEMORY);
    }
    // The images of states were right, and are all that was enqueued.
    let images = launches().split_off(before);
    assert_eq!(images, ["forge_export", "forge_import"].repeat(2 * layer.states as usize / 2));
    let before = launches().len();
    layer.step.device_scalars = host.as_mut_ptr().cast();
    memory(layer.update(1, NO_BUFFER), "step.device_scalars");
    layer.step = step;
    // Half an element off.
    layer.segments[0].dy.data = segment.dy.data.wrapping_byte_add(1);
    layer.segments[0].dy.bytes -= 2;
    layer.segments[0].tokens -= 1;
    refused(layer.update(1, NO_BUFFER), FORGE_ERROR_MISALIGNED, &["segments[0].dy: 0x", "2 bytes"]);
    layer.segments[0] = segment;
    assert_eq!(launches().len(), before, "nothing was enqueued");
    ok(layer.update(1, NO_BUFFER));
    assert!(launches().len() > before);
}

/// Another context, to which no workspace was lent.
#[test]
#[ignore = "run by memory_that_is_not_the_gpus_is_refused_by_name"]
fn refuse_without_workspace() {
    let (lent, bare) = (context(), context());
    let linear =
        config(c"adamw", forge_dtype::FORGE_DTYPE_BF16, forge_state_format::FORGE_STATE_BF16);
    let mut layer = Layer::new(lent, &linear, 1);
    let mut comm = null_mut();
    // SAFETY: handles and structs are live.
    unsafe {
        ok(forge_comm_new_solo(bare, &mut comm));
        ok(forge_linear_new(bare, comm, &linear, &mut layer.linear));
    }
    assert_eq!(layer.update(1, NO_BUFFER), FORGE_ERROR_WORKSPACE);
    let message = last_error();
    for part in ["workspace: the context was lent none", "forge_context_set_workspace", "58"] {
        assert!(message.contains(part), "no '{part}' in: {message}");
    }
}

/// An ignored test under the fake libraries, for a GPU of this capability.
fn child(root: &Path, test: &str, capability: &str, architecture: &str) -> Command {
    // Not as libcuda.so.1: NVRTC looks for that name and asks it for what only NVIDIA's has.
    build(root, "cuda.c", "libcuda.so", &[]);
    build(root, "cublaslt.c", "libcublasLt.so.13", &[]);
    let mut child = again(test, &[root]);
    child.env("FAKE_CUDA_CAPABILITY", capability).env("FAKE_CUDA_LOG", root.join("log"));
    child.env("FORGE_TEST_ARCHITECTURE", architecture).env("FORGE_TEST_CACHE", root.join("cache"));
    child
}

fn run(test: &str, capability: &str, architecture: &str) {
    let root = directory(&format!("fake-gpu-{test}-{capability}"));
    print!("{}", finish(&mut child(&root, test, capability, architecture)));
}

#[test]
fn a_warmed_cache_needs_no_compiler() {
    let root = directory("fake-gpu-without-nvrtc");
    let start = || child(&root, "warm_or_run_without_nvrtc", "90", "sm_90a");
    finish(start().env("FORGE_TEST_WARM", "1"));
    finish(start().env("FORGE_NVRTC", "/nowhere/libnvrtc.so.13"));
}

#[test]
fn what_was_warmed_is_all_that_a_run_asks_for() {
    run("warm_and_run", "90", "sm_90a");
    run("warm_and_run", "80", "sm_80");
}

#[test]
fn many_small_linears_take_few_launches() {
    run("update_forty_layers", "90", "sm_90a");
    run("update_forty_layers", "80", "sm_80");
}

#[test]
fn memory_that_is_not_the_gpus_is_refused_by_name() {
    run("refuse_memory", "90", "sm_90a");
    run("refuse_without_workspace", "90", "sm_90a");
}
