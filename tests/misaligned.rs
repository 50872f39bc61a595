//! A pointer that is not aligned for what it points to is refused, by name, whichever argument of
//! whichever function it is and however far it is off; nothing is written. Each call is made aligned
//! first, and must succeed then.

use forge::error::forge_status::{self, *};
use forge::ffi::comm::*;
use forge::ffi::context::*;
use forge::ffi::error::forge_last_error;
use forge::ffi::linear::*;
use forge::ffi::rule::*;
use forge::ffi::run::*;
use forge::ffi::types::*;
use forge::ffi::update_group::forge_linear_update_group;
use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_void};
use std::ptr::{null, null_mut};

const OUT: u64 = 6;
const IN: u64 = 10;
const TOKENS: u64 = 3;

/// A struct of the ABI that starts with its size, the rest zeros.
fn sized<T: Copy>() -> T {
    // SAFETY: C structs of numbers and nullable pointers whose first field is their size.
    unsafe {
        let mut value: T = std::mem::zeroed();
        std::ptr::from_mut(&mut value).cast::<u32>().write(size_of::<T>() as u32);
        value
    }
}

/// The pointers of a call: remembered when it is made right, one of them moved afterwards.
#[derive(Default)]
struct Pointers {
    seen: RefCell<Vec<(&'static str, usize)>>,
    moved: Cell<Option<(&'static str, usize)>>,
}

impl Pointers {
    fn of<T>(&self, name: &'static str, pointer: *mut T) -> *mut T {
        self.aligned(name, pointer, align_of::<T>())
    }

    fn read<T>(&self, name: &'static str, pointer: *const T) -> *const T {
        self.of(name, pointer.cast_mut())
    }

    /// A pointer that must be aligned to so many bytes.
    fn aligned<T>(&self, name: &'static str, pointer: *mut T, alignment: usize) -> *mut T {
        match self.moved.get() {
            None => self.seen.borrow_mut().push((name, alignment)),
            Some((moved, by)) if moved == name => return pointer.wrapping_byte_add(by),
            Some(_) => {}
        }
        pointer
    }
}

/// Makes a call right, and then with each of its pointers off by 1, 2, … bytes.
fn check(function: &str, call: impl Fn(&Pointers) -> forge_status) -> usize {
    let pointers = Pointers::default();
    // SAFETY: never NULL, and valid until the next failure on this thread.
    let message = || unsafe { CStr::from_ptr(forge_last_error()) }.to_str().unwrap().to_string();
    let status = call(&pointers);
    assert_eq!(status, FORGE_OK, "{function}: {}", message());
    let seen = pointers.seen.take();
    let mut refused = 0;
    for (name, alignment) in seen {
        for by in 1..alignment {
            pointers.moved.set(Some((name, by)));
            let status = call(&pointers);
            let said = message();
            assert_eq!(status, FORGE_ERROR_MISALIGNED, "{function}, {name} + {by}: {said}");
            assert!(
                said.contains(name)
                    && said.contains(&format!("is not aligned to {alignment} bytes")),
                "{function}, {name} + {by}: {said}"
            );
            refused += 1;
        }
    }
    refused
}

/// Room for one array, with bytes behind it that a misaligned pointer may point to.
struct Array(RefCell<Vec<u64>>, u64);

impl Array {
    fn new(bytes: u64) -> Self {
        Self(RefCell::new(vec![0; bytes as usize / 8 + 3]), bytes)
    }

    fn ptr(&self) -> *mut c_void {
        self.0.borrow_mut().as_mut_ptr().cast()
    }

    fn buffer(&self, p: &Pointers, name: &'static str, element: usize) -> forge_buffer {
        if self.1 == 0 {
            return forge_buffer { data: null_mut(), bytes: 0 };
        }
        forge_buffer { data: p.aligned(name, self.ptr(), element), bytes: self.1 }
    }

    fn constant(&self, p: &Pointers, name: &'static str, element: usize) -> forge_const_buffer {
        let forge_buffer { data, bytes } = self.buffer(p, name, element);
        forge_const_buffer { data, bytes }
    }
}

/// A linear and everything that its calls are given.
struct Fixture {
    context: *mut forge_context,
    comm: *mut forge_comm,
    linear: *mut forge_linear,
    config: forge_linear_config,
    layout: forge_layout,
    arrays: Vec<Array>,
    dy: Array,
    x: Array,
    dx: Array,
    dbias: Array,
    accumulator: Array,
    image: Array,
    workspace: Array,
    step: forge_step,
}

const ARRAYS: [&str; 8] = [
    "parameter.weight",
    "parameter.weight_extra",
    "parameter.states[0]",
    "parameter.states[1]",
    "parameter.states[2]",
    "parameter.scales[0]",
    "parameter.scales[1]",
    "parameter.scales[2]",
];

impl Fixture {
    fn new(factor_dtype: u32, weight_format: u32, state_format: u32) -> Self {
        let mut context_config = sized::<forge_context_config>();
        context_config.threads = 1;
        let (mut context, mut comm, mut linear) = (null_mut(), null_mut(), null_mut());
        let mut config = sized::<forge_linear_config>();
        config.factor_dtype = factor_dtype;
        config.out_features = OUT;
        config.in_features = IN;
        // Column parallel with SP, for the workspace.
        config.parallel = 1;
        config.sequence_parallel = 1;
        config.weight_format = weight_format;
        config.state_formats = [state_format; 3];
        config.rule = c"adamw".as_ptr();
        let mut layout = sized::<forge_layout>();
        let mut rule = sized::<forge_rule_info>();
        let mut workspace = 0;
        // SAFETY: all pointers are to live values.
        unsafe {
            assert_eq!(forge_context_new(&context_config, &mut context), FORGE_OK);
            assert_eq!(forge_comm_new_solo(context, &mut comm), FORGE_OK);
            assert_eq!(forge_linear_new(context, comm, &config, &mut linear), FORGE_OK);
            assert_eq!(forge_linear_layout(linear, &mut layout), FORGE_OK);
            assert_eq!(forge_rule_find(config.rule, 0, &mut rule), FORGE_OK);
            assert_eq!(forge_linear_workspace(linear, 0, TOKENS, &mut workspace), FORGE_OK);
        }
        let element = if factor_dtype == 1 { 4 } else { 2 };
        let mut step = sized::<forge_step>();
        step.scalars.step = 1;
        step.scalars.grad_scale = 1.0;
        step.scalars.hyper = rule.hyper_defaults;
        let all = [layout.weight, layout.weight_extra].into_iter();
        let all = all.chain(layout.states).chain(layout.scales);
        Self {
            context,
            comm,
            linear,
            config,
            layout,
            arrays: all.map(|a| Array::new(a.bytes)).collect(),
            dy: Array::new(TOKENS * OUT * element),
            x: Array::new(TOKENS * IN * element),
            dx: Array::new(TOKENS * IN * element),
            dbias: Array::new(OUT * element),
            accumulator: Array::new(OUT * IN * 4),
            image: Array::new(OUT * IN * 4),
            workspace: Array::new(workspace),
            step,
        }
    }

    fn element(&self) -> usize {
        if self.config.factor_dtype == 1 { 4 } else { 2 }
    }

    fn parameter(&self, p: &Pointers, weight_only: bool) -> forge_parameter {
        let layout = &self.layout;
        let alignment = [layout.weight, layout.weight_extra].into_iter();
        let alignment = alignment.chain(layout.states).chain(layout.scales);
        let ignored = Pointers::default();
        let mut buffers = ARRAYS.iter().zip(&self.arrays).zip(alignment).enumerate().map(
            |(i, ((name, array), layout))| {
                let p = if weight_only && i > 0 { &ignored } else { p };
                array.buffer(p, name, layout.alignment as usize)
            },
        );
        let mut parameter = sized::<forge_parameter>();
        parameter.weight = buffers.next().unwrap();
        parameter.weight_extra = buffers.next().unwrap();
        for k in 0..3 {
            parameter.states[k] = buffers.next().unwrap();
        }
        for k in 0..3 {
            parameter.scales[k] = buffers.next().unwrap();
        }
        parameter
    }

    fn segment(&self, p: &Pointers) -> forge_segment {
        forge_segment {
            dy: self.dy.constant(p, "segments[0].dy", self.element()),
            x: self.x.constant(p, "segments[0].x", self.element()),
            tokens: TOKENS,
            dy_stride: 0,
            x_stride: 0,
        }
    }

    /// A call with an update; all that it points to lives as long.
    fn update(
        &self,
        p: &Pointers,
        call: impl FnOnce(*const forge_update) -> forge_status,
    ) -> forge_status {
        let mut device_report = [sized::<forge_report>(); 2];
        let segments = [self.segment(p); 2];
        let parameter = self.parameter(p, false);
        let mut u = sized::<forge_update>();
        u.n_segments = 1;
        u.segments = p.read("segments", segments.as_ptr());
        u.accumulator = self.accumulator.constant(p, "accumulator", 4);
        u.parameter = p.read("parameter", &parameter);
        u.step = p.read("step", &self.step);
        u.device_report = p.of("device_report", device_report.as_mut_ptr());
        call(p.read("update", &u))
    }

    fn objects(&self) -> usize {
        let mut refused = 0;
        // SAFETY: all pointers are to live values, or misaligned, which is what must be refused.
        unsafe {
            refused += check("forge_context_new", |p| {
                let mut config = sized::<forge_context_config>();
                config.threads = 1;
                let mut out = [null_mut(); 2];
                let config = p.read("config", &config);
                let status = forge_context_new(config, p.of("out_context", out.as_mut_ptr()));
                assert!(status == FORGE_OK || out[0].is_null());
                forge_context_free(out[0]);
                status
            });
            refused += check("forge_comm_new_solo", |p| {
                let mut out = [null_mut(); 2];
                let context = p.of("context", self.context);
                let status = forge_comm_new_solo(context, p.of("out_comm", out.as_mut_ptr()));
                forge_comm_free(out[0]);
                status
            });
            refused += check("forge_comm_new_host", |p| {
                let mut out = [null_mut(); 2];
                let mut host = sized::<forge_host_collectives>();
                host.all_gather = Some(gather);
                host.reduce_scatter = Some(gather);
                host.all_reduce = Some(reduce);
                let host = p.read("collectives", &host);
                let context = p.of("context", self.context);
                let out_comm = p.of("out_comm", out.as_mut_ptr());
                let status = forge_comm_new_host(context, 0, 1, host, out_comm);
                forge_comm_free(out[0]);
                status
            });
            refused += check("forge_linear_new", |p| {
                let mut out = [null_mut(); 2];
                let (context, comm) = (p.of("context", self.context), p.of("comm", self.comm));
                let config = p.read("config", &self.config);
                let out_linear = p.of("out_linear", out.as_mut_ptr());
                let status = forge_linear_new(context, comm, config, out_linear);
                forge_linear_free(out[0]);
                status
            });
            refused += check("forge_linear_new_data_parallel", |p| {
                let mut out = [null_mut(); 2];
                let (context, comm) = (p.of("context", self.context), p.of("comm", self.comm));
                let others = p.of("data_parallel", self.comm);
                let config = p.read("config", &self.config);
                let to = p.of("out_linear", out.as_mut_ptr());
                let status =
                    forge_linear_new_data_parallel(context, comm, others, 0, 1, config, to);
                forge_linear_free(out[0]);
                status
            });
            refused +=
                check("forge_comm_wait", |p| forge_comm_wait(p.of("comm", self.comm), null_mut()));
            refused += check("forge_context_workspace_bytes", |p| {
                let mut out = [7u64; 2];
                let out_bytes = p.of("out_bytes", out.as_mut_ptr());
                forge_context_workspace_bytes(p.of("context", self.context), out_bytes)
            });
            refused += check("forge_context_set_workspace", |p| {
                let none = forge_buffer { data: null_mut(), bytes: 0 };
                forge_context_set_workspace(p.of("context", self.context), none)
            });
            refused += check("forge_linear_layout", |p| {
                let mut out = [sized::<forge_layout>(); 2];
                forge_linear_layout(p.of("linear", self.linear), p.of("out", out.as_mut_ptr()))
            });
            refused += check("forge_linear_workspace", |p| {
                let mut out = [0u64; 2];
                let out_bytes = p.of("out_bytes", out.as_mut_ptr());
                forge_linear_workspace(p.of("linear", self.linear), 0, TOKENS, out_bytes)
            });
            refused += check("forge_linear_plan", |p| {
                let mut request = sized::<forge_plan_request>();
                request.tokens_per_micro_batch = 1;
                request.micro_batches = 1;
                let mut out = [sized::<forge_plan>(); 2];
                let request = p.read("request", &request);
                let out = p.of("out", out.as_mut_ptr());
                forge_linear_plan(p.of("linear", self.linear), request, out)
            });
            refused += check("forge_rule_get", |p| {
                let mut out = [sized::<forge_rule_info>(); 2];
                forge_rule_get(0, p.of("out", out.as_mut_ptr()))
            });
            refused += check("forge_rule_find", |p| {
                let mut out = [sized::<forge_rule_info>(); 2];
                forge_rule_find(c"adamw".as_ptr(), 0, p.of("out", out.as_mut_ptr()))
            });
            refused += check("forge_clip_coefficient", |p| {
                let mut out = [[0.0f64; 2]; 2];
                let norm = p.of("out_norm", out[0].as_mut_ptr());
                let coefficient = p.of("out_coefficient", out[1].as_mut_ptr());
                forge_clip_coefficient(1.0, 1.0, 1.0, norm, coefficient)
            });
            refused += check("forge_linear_check_step", |p| {
                let mut step = self.step;
                step.device_scalars = p.read("step.device_scalars", &self.step.scalars);
                let step = p.read("step", &step);
                forge_linear_check_step(p.read("linear", self.linear.cast_const()), step)
            });
        }
        refused
    }

    fn runs(&self) -> usize {
        let mut refused = 0;
        let (element, stream) = (self.element(), null_mut());
        // SAFETY: as above; arrays have the sizes that are declared.
        unsafe {
            for mode in [0, 1] {
                refused += check("forge_linear_backward", |p| {
                    let mut report = [sized::<forge_report>(); 2];
                    let mut device_report = [sized::<forge_report>(); 2];
                    let parameter = self.parameter(p, mode == 1);
                    let mut b = sized::<forge_backward>();
                    b.mode = mode;
                    b.tokens = TOKENS;
                    b.dy = self.dy.constant(p, "dy", element);
                    b.x = self.x.constant(p, "x", element);
                    b.dx = self.dx.buffer(p, "dx", element);
                    b.dbias = self.dbias.buffer(p, "dbias", element);
                    b.workspace = self.workspace.buffer(p, "workspace", element);
                    b.accumulator = self.accumulator.buffer(p, "accumulator", 4);
                    b.parameter = p.read("parameter", &parameter);
                    b.step = if mode == 0 { p.read("step", &self.step) } else { null() };
                    b.device_report = p.of("device_report", device_report.as_mut_ptr());
                    let report = p.of("report", report.as_mut_ptr());
                    let linear = p.of("linear", self.linear);
                    forge_linear_backward(linear, p.read("backward", &b), report, stream)
                });
            }
            refused += check("forge_linear_dgrad", |p| {
                let parameter = self.parameter(p, true);
                let dy = self.dy.constant(p, "dy", element);
                let dx = self.dx.buffer(p, "dx", element);
                let parameter = p.read("parameter", &parameter);
                let linear = p.of("linear", self.linear);
                forge_linear_dgrad(linear, TOKENS, dy, 0, parameter, dx, stream)
            });
            refused += check("forge_linear_update", |p| {
                let mut report = [sized::<forge_report>(); 2];
                self.update(p, |update| {
                    let report = p.of("report", report.as_mut_ptr());
                    forge_linear_update(p.of("linear", self.linear), update, report, stream)
                })
            });
            refused += check("forge_linear_update_group", |p| {
                self.update(p, |update| {
                    let (linears, updates) = ([p.of("linears[0]", self.linear); 2], [update; 2]);
                    let linears = p.read("linears", linears.as_ptr());
                    let updates = p.read("updates", updates.as_ptr());
                    forge_linear_update_group(linears, updates, 1, stream)
                })
            });
            refused += check("forge_linear_accumulate", |p| {
                let segments = [self.segment(p); 2];
                let accumulator = self.accumulator.buffer(p, "accumulator", 4);
                let segments = p.read("segments", segments.as_ptr());
                let linear = p.of("linear", self.linear);
                forge_linear_accumulate(linear, segments, 1, accumulator, stream)
            });
            for (name, out_name, norm) in [
                ("forge_linear_norm", "out", forge_linear_norm as NormFunction),
                ("forge_linear_norm_async", "device_out", forge_linear_norm_async),
            ] {
                refused += check(name, |p| {
                    let mut out = [sized::<forge_norm>(); 2];
                    let segments = [self.segment(p); 2];
                    let accumulator = self.accumulator.constant(p, "accumulator", 4);
                    let segments = p.read("segments", segments.as_ptr());
                    let out = p.of(out_name, out.as_mut_ptr());
                    norm(p.of("linear", self.linear), segments, 1, accumulator, 0, out, stream)
                });
            }
            for what in 0..4 {
                refused += check("forge_linear_{export,import}_{weight,state}", |p| {
                    let parameter = self.parameter(p, false);
                    let parameter = p.read("parameter", &parameter);
                    let linear = p.read("linear", self.linear.cast_const());
                    let image = self.image.buffer(p, "fp32", 4);
                    let constant = forge_const_buffer { data: image.data, bytes: image.bytes };
                    match what {
                        0 => forge_linear_export_weight(linear, parameter, image, stream),
                        1 => forge_linear_export_state(linear, parameter, 1, image, stream),
                        2 => forge_linear_import_weight(linear, parameter, constant, stream),
                        _ => forge_linear_import_state(linear, parameter, 1, constant, stream),
                    }
                });
            }
        }
        refused
    }
}

type NormFunction = unsafe extern "C" fn(
    *mut forge_linear,
    *const forge_segment,
    u32,
    forge_const_buffer,
    u32,
    *mut forge_norm,
    *mut c_void,
) -> forge_status;

impl Drop for Fixture {
    fn drop(&mut self) {
        // SAFETY: made by the `_new` functions and not freed.
        unsafe {
            forge_linear_free(self.linear);
            forge_comm_free(self.comm);
            forge_context_free(self.context);
        }
    }
}

unsafe extern "C" fn gather(
    _: *mut c_void,
    _: *const c_void,
    _: *mut c_void,
    _: u64,
    _: u32,
) -> i32 {
    1
}

unsafe extern "C" fn reduce(_: *mut c_void, _: *mut c_void, _: u64, _: u32) -> i32 {
    1
}

#[test]
fn objects() {
    assert!(Fixture::new(1, 0, 0).objects() >= 100);
}

#[test]
fn fp32_arrays() {
    assert!(Fixture::new(1, 0, 0).runs() >= 200);
}

/// Codes of one byte cannot be misaligned, their scales can.
#[test]
fn bf16_with_lower_halves_and_q8() {
    assert!(Fixture::new(2, 3, 2).runs() >= 200);
}
