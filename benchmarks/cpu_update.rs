//! The CPU backend against a GEMM crate and an optimizer pass: `cargo bench --bench cpu_update`.
//!
//! fp32, AdamW, one thread: a whole backward (dX, then dW and update) and the update alone, against
//! `matrixmultiply` on the same products followed by one fused optimizer pass (the same rule over a
//! gradient in memory), and against FORGE's own products through a gradient buffer. Many tokens over
//! 1024×1024 measure the products. Few tokens over a wide weight measure the traffic: of a gradient
//! larger than a core's own caches, and of one larger than most last-level caches. Ratios of medians
//! of interleaved rounds are printed at the end and, with `FORGE_BENCH_JSON=path` (and
//! `FORGE_COMMIT`), written there.

use criterion::{Criterion, SamplingMode};
use forge::backend::cpu::Cpu;
use forge::backend::{
    Accumulator, Arrays, Backend, Deliver, Factors, Matrix, Scheme, Shard, Step, StepSource, Stream,
};
use forge::format::{Dtype, Rounding, StateFormat, WeightFormat};
use forge::rule::{self, MAX_STATES, StepScalars};
use std::hint::black_box;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

const HOST: Deliver = Deliver::HOST;
const NULL: Stream = Stream::NULL;

/// A size to measure at, and how often.
#[derive(Clone, Copy)]
struct Size {
    tokens: usize,
    out: usize,
    inn: usize,
    rounds: usize,
}

const SIZE: Size = Size { tokens: 4096, out: 1024, inn: 1024, rounds: 41 };
const WIDE: [Size; 2] = [
    Size { tokens: 64, out: 4096, inn: 4096, rounds: 41 },
    Size { tokens: 64, out: 12288, inn: 12288, rounds: 9 },
];

fn data(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

struct Case {
    size: Size,
    scheme: Scheme,
    shard: Shard,
    step: Step,
    dy: Vec<f32>,
    x: Vec<f32>,
    dx: Vec<f32>,
    gradient: Vec<f32>,
    w: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
}

impl Case {
    fn new(size: Size) -> Self {
        let Size { tokens, out, inn, .. } = size;
        let rule = rule::find("adamw").unwrap();
        let scheme = Scheme {
            rule,
            flags: 0,
            n_states: rule.states(0).len(),
            weight_format: WeightFormat::F32,
            weight_rounding: Rounding::Nearest,
            state_formats: [StateFormat::F32; MAX_STATES],
            state_rounding: Rounding::Nearest,
            factor_dtype: Dtype::F32,
            fp32_products: forge::backend::Fp32Products::Exact,
            parameter_id: 0,
        };
        let shard =
            Shard { rows: out, cols: inn, row_offset: 0, col_offset: 0, global_cols: inn as u64 };
        let scalars =
            StepScalars { step: 1, seed: 0, grad_scale: 1e-3, hyper: rule::default_hyper(rule) };
        Self {
            size,
            step: Step::new(&scheme, &scalars),
            scheme,
            shard,
            dy: data(tokens * out, 1),
            x: data(tokens * inn, 2),
            dx: vec![0.0; tokens * inn],
            gradient: vec![0.0; out * inn],
            w: data(out * inn, 3),
            m: vec![0.0; out * inn],
            v: vec![0.0; out * inn],
        }
    }

    fn factors(&self) -> Factors {
        Factors {
            dy: Matrix { data: self.dy.as_ptr().cast(), stride: self.size.out },
            x: Matrix { data: self.x.as_ptr().cast(), stride: self.size.inn },
            tokens: self.size.tokens,
        }
    }

    fn arrays(&mut self) -> Arrays {
        let states = [self.m.as_mut_ptr().cast(), self.v.as_mut_ptr().cast(), null_mut()];
        let weight = self.w.as_mut_ptr().cast();
        Arrays { weight, extra: null_mut(), states, scales: [null_mut(); MAX_STATES] }
    }

    fn fused_update(&mut self, cpu: &Cpu) {
        let (arrays, f) = (self.arrays(), self.factors());
        // SAFETY: sizes by construction.
        unsafe {
            cpu.update(
                &self.scheme,
                &self.shard,
                &[f],
                None,
                &arrays,
                &StepSource::Value(self.step),
                HOST,
                NULL,
            )
        }
        .unwrap();
    }

    fn dgrad(&mut self, cpu: &Cpu) {
        let (f, w) = (self.factors(), self.w.as_ptr().cast());
        let dx = self.dx.as_mut_ptr().cast();
        // SAFETY: sizes by construction.
        unsafe { cpu.dgrad(&self.scheme, &self.shard, self.size.tokens, f.dy, w, dx, NULL) }
            .unwrap();
    }

    /// What frameworks do with FORGE's own products: a gradient buffer that stays allocated is
    /// zeroed, added to, and read by the optimizer.
    fn two_phase(&mut self, cpu: &Cpu) {
        self.gradient.fill(0.0);
        let (gradient, f) = (Accumulator::fp32(self.gradient.as_mut_ptr()), self.factors());
        // SAFETY: sizes by construction.
        unsafe { cpu.accumulate(&self.scheme, &self.shard, &[f], gradient, NULL) }.unwrap();
        self.optimizer_pass(cpu);
    }

    fn crate_wgrad(&mut self) {
        let Size { tokens, out, inn, .. } = self.size;
        // SAFETY: sizes by construction.
        unsafe {
            matrixmultiply::sgemm(
                out,
                tokens,
                inn,
                1.0,
                self.dy.as_ptr(),
                1,
                out as isize,
                self.x.as_ptr(),
                inn as isize,
                1,
                0.0,
                self.gradient.as_mut_ptr(),
                inn as isize,
                1,
            );
        }
    }

    fn crate_dgrad(&mut self) {
        let Size { tokens, out, inn, .. } = self.size;
        // SAFETY: sizes by construction.
        unsafe {
            matrixmultiply::sgemm(
                tokens,
                out,
                inn,
                1.0,
                self.dy.as_ptr(),
                out as isize,
                1,
                self.w.as_ptr(),
                inn as isize,
                1,
                0.0,
                self.dx.as_mut_ptr(),
                inn as isize,
                1,
            );
        }
    }

    /// One pass over weight, states and a gradient in memory: FORGE's own rule, no GEMM.
    fn optimizer_pass(&mut self, cpu: &Cpu) {
        let arrays = self.arrays();
        let gradient = Some(Accumulator::fp32(self.gradient.as_mut_ptr()));
        // SAFETY: sizes by construction.
        unsafe {
            cpu.update(
                &self.scheme,
                &self.shard,
                &[],
                gradient,
                &arrays,
                &StepSource::Value(self.step),
                HOST,
                NULL,
            )
        }
        .unwrap();
    }
}

type Variant = fn(&mut Case, &Cpu);

const VARIANTS: [(&str, Variant); 5] = [
    ("forge_update", |case, cpu| case.fused_update(cpu)),
    ("crate_wgrad_then_optimizer_pass", |case, cpu| {
        case.crate_wgrad();
        case.optimizer_pass(cpu);
    }),
    ("two_phase", |case, cpu| case.two_phase(cpu)),
    ("forge_backward", |case, cpu| {
        case.dgrad(cpu);
        case.fused_update(cpu);
    }),
    ("crate_backward_then_optimizer_pass", |case, cpu| {
        case.crate_dgrad();
        case.crate_wgrad();
        case.optimizer_pass(cpu);
    }),
];

fn benchmarks(c: &mut Criterion, cpu: &Cpu, case: &mut Case) {
    let mut group = c.benchmark_group("adamw_fp32_4096x1024x1024");
    group.sampling_mode(SamplingMode::Flat).sample_size(20);
    group.measurement_time(Duration::from_secs(3));
    for (name, variant) in VARIANTS {
        group.bench_function(name, |b| b.iter(|| variant(black_box(case), cpu)));
    }
    group.finish();
}

/// Median seconds of each variant over rounds that run every variant once: what disturbs the machine
/// for a while disturbs them all.
fn interleaved_medians(cpu: &Cpu, case: &mut Case) -> Vec<f64> {
    let mut times = vec![Vec::new(); VARIANTS.len()];
    for _ in 0..case.size.rounds {
        for ((_, variant), times) in VARIANTS.iter().zip(&mut times) {
            let begin = Instant::now();
            variant(black_box(case), cpu);
            times.push(begin.elapsed().as_secs_f64());
        }
    }
    times
        .into_iter()
        .map(|mut t| {
            t.sort_by(f64::total_cmp);
            t[t.len() / 2]
        })
        .collect()
}

/// Size, conditions, medians and ratios of one size.
fn record(cpu: &Cpu, case: &mut Case) -> serde_json::Value {
    let Size { tokens, out, inn, rounds } = case.size;
    let times = interleaved_medians(cpu, case);
    let seconds: serde_json::Map<_, _> =
        VARIANTS.iter().zip(&times).map(|((n, _), t)| (n.to_string(), (*t).into())).collect();
    serde_json::json!({
        "conditions": format!("one thread, medians of {rounds} interleaved rounds"),
        "tokens": tokens, "out": out, "in": inn, "rule": "adamw", "weight_format": "fp32",
        "state_format": "fp32", "median_seconds": seconds,
        "gradient_bytes": out * inn * size_of::<f32>(),
        "ratios": {
            "update_rate_over_crate_plus_pass": times[1] / times[0],
            "backward_rate_over_crate_plus_pass": times[4] / times[3],
            "two_phase_over_fused_update": times[2] / times[0],
        },
    })
}

fn main() {
    let cpu = Cpu::new(1).expect("one thread needs no pool");
    let mut case = Case::new(SIZE);
    let mut criterion = Criterion::default().configure_from_args();
    benchmarks(&mut criterion, &cpu, &mut case);
    criterion.final_summary();
    if !std::env::args().any(|a| a == "--bench") {
        return; // `cargo test --benches` measures nothing
    }
    let mut result = record(&cpu, &mut case);
    drop(case);
    let wide: Vec<_> = WIDE.iter().map(|size| record(&cpu, &mut Case::new(*size))).collect();
    result["device"] = cpu_model().into();
    result["last_level_cache"] = last_level_cache().into();
    result["commit"] = std::env::var("FORGE_COMMIT").ok().into();
    result["wide"] = wide.into();
    println!("{result:#}");
    if let Ok(path) = std::env::var("FORGE_BENCH_JSON") {
        std::fs::write(path, format!("{result:#}\n")).expect("the JSON can be written");
    }
}

/// The processor's name, where Linux tells it.
fn cpu_model() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split(':').nth(1)?.trim().to_string())
}

/// The last-level cache's size with its unit, where Linux tells it.
fn last_level_cache() -> Option<String> {
    let size = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").ok()?;
    Some(size.trim().to_string())
}
