//! Compiles the kernels' specialisations with NVRTC, which needs no GPU: all of them must compile without
//! a warning and without spilling registers. Then what a machine without a driver is told.
//!
//! NVRTC is found through FORGE_NVRTC, which `scripts/test.sh` sets.

mod common;

use common::{STATES, WEIGHTS, rules, scheme};
use forge::backend::cuda::cache;
use forge::backend::cuda::compile::{Nvrtc, options};
use forge::backend::cuda::module::image_key;
use forge::backend::cuda::sm80;
use forge::backend::cuda::sm90::policy::choose;
use forge::backend::cuda::sm90::{MOST_SEGMENTS, Mode, Specialisation, Streams, group};
use forge::backend::cuda::sources::{self, Source};
use forge::backend::cuda::{Cuda, specialise};
use forge::backend::{Fp32Products, Scheme};
use forge::error::forge_status;
use forge::format::{Dtype, Rounding, StateFormat, StateKind, WeightFormat};
use forge::rule::user::{Definition, HyperDefinition, PerStep, register};
use forge::rule::{AMSGRAD, MAXIMIZE};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{fs, thread};

const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_100a"];
/// The one whose specialisations are all compiled; of the others a choice.
const MAIN: &str = "sm_90a";
/// What the fused kernel of 8.0 may run on, and the rows of its tiles there; all specialisations for the
/// first.
const SM80_ON: [(&str, u32); 6] =
    [("sm_80", 128), ("sm_86", 64), ("sm_89", 64), (MAIN, 128), ("sm_100a", 128), ("sm_120", 64)];
/// Two compilers at a time.
const THREADS: usize = 2;

fn nvrtc() -> Nvrtc {
    let path = std::env::var_os("FORGE_NVRTC").expect(
        "FORGE_NVRTC is not set; set it to libnvrtc.so.13, which `pip install nvidia-cuda-nvrtc` puts \
         into site-packages/nvidia/cu13/lib",
    );
    Nvrtc::open(Path::new(&path)).unwrap()
}

/// One compilation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Job {
    source: &'static str,
    architecture: &'static str,
    defines: Vec<String>,
}

fn source_of(name: &str) -> Source {
    let all = [
        sources::ELEMENTWISE,
        sources::EXACT,
        sources::REDUCE,
        sources::BIAS,
        sources::IMAGE,
        sources::PROLOGUE,
        sources::GROUP_MAPS,
        sources::WGRAD_SM80,
        sources::WGRAD_SM90,
    ];
    all.into_iter().find(|s| s.name == name).unwrap()
}

/// Every specialisation that the backend may ask for.
fn jobs() -> BTreeSet<Job> {
    let mut jobs = BTreeSet::new();
    for architecture in ARCHITECTURES {
        let mut add = |source: Source, defines: Vec<String>| {
            jobs.insert(Job { source: source.name, architecture, defines });
        };
        add(sources::REDUCE, vec![]);
        for factor in 0..3 {
            add(sources::BIAS, vec![format!("FORGE_FACTOR={factor}")]);
        }
        for (image, format, kind) in
            [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0), (1, 2, 1)]
        {
            let defines = [
                format!("FORGE_IMAGE={image}"),
                format!("FORGE_FORMAT={format}"),
                format!("FORGE_KIND={kind}"),
            ];
            add(sources::IMAGE, defines.to_vec());
        }
        let mut exact = |left: u32, right: u32, out: u32, left_rows: u32| {
            let defines = [
                format!("FORGE_LEFT={left}"),
                format!("FORGE_RIGHT={right}"),
                format!("FORGE_OUT={out}"),
                format!("FORGE_LEFT_ROWS={left_rows}"),
                "FORGE_RIGHT_ROWS=1".to_string(),
            ];
            add(sources::EXACT, defines.to_vec());
        };
        for factor in 0..3 {
            // wgrad, and dgrad with either type of weight.
            exact(factor, factor, 0, 1);
            exact(factor, 0, factor, 0);
            exact(factor, 1, factor, 0);
        }
        for (name, flags) in rules() {
            if flags & MAXIMIZE != 0 {
                continue;
            }
            let rule = scheme(name, flags, WEIGHTS[0], STATES[0], Dtype::Bf16);
            add(sources::PROLOGUE, specialise::rule(&rule));
            let all: Vec<_> = WEIGHTS.into_iter().flat_map(|w| STATES.map(|s| (w, s))).collect();
            for (weight, state) in if name == "adamw" { all } else { in_use() } {
                for vector in [1, 0] {
                    // Without vectors the rule makes no difference to what may go wrong, nor on other
                    // architectures.
                    if (name != "adamw" || vector == 0) && architecture != MAIN
                        || name != "adamw" && vector == 0
                    {
                        continue;
                    }
                    let scheme = scheme(name, flags, weight, state, Dtype::Bf16);
                    let mut defines = specialise::update(&scheme);
                    defines.push(format!("FORGE_VECTOR={vector}"));
                    add(sources::ELEMENTWISE, defines);
                }
            }
        }
        // States of different formats.
        let mut mixed = scheme("adamw", 0, WEIGHTS[2], STATES[0], Dtype::Bf16);
        for formats in [[StateFormat::Bf16, StateFormat::Q8], [StateFormat::Q8, StateFormat::F32]] {
            mixed.state_formats[..2].copy_from_slice(&formats);
            let mut defines = specialise::update(&mixed);
            defines.push("FORGE_VECTOR=1".to_string());
            add(sources::ELEMENTWISE, defines);
        }
        if architecture == MAIN {
            add(sources::GROUP_MAPS, vec![]);
            for (scheme, specialisation) in fused() {
                add(sources::WGRAD_SM90, specialisation.defines(&scheme));
            }
        }
    }
    for (architecture, tile_rows) in SM80_ON {
        for (scheme, specialisation) in fused_sm80(tile_rows, architecture == SM80_ON[0].0) {
            let (source, defines) = (sources::WGRAD_SM80.name, specialisation.defines(&scheme));
            jobs.insert(Job { source, architecture, defines });
        }
    }
    jobs
}

/// Weights and states that training uses most.
fn in_use() -> Vec<((WeightFormat, Rounding), (StateFormat, Rounding))> {
    use {Rounding::*, StateFormat as S, WeightFormat as W};
    let bf16 = (W::Bf16, Stochastic);
    vec![
        (bf16, (S::Bf16, Stochastic)),
        (bf16, (S::Bf16, Nearest)),
        (bf16, (S::F32, Nearest)),
        (bf16, (S::Q8, Nearest)),
        ((W::Bf16Low16, Nearest), (S::Q8, Stochastic)),
        ((W::F32, Nearest), (S::F32, Nearest)),
    ]
}

/// Specialisations of the fused kernel of 8.0: with AdamW the formats in use, or `all` and then every rule
/// too.
fn fused_sm80(tile_rows: u32, all: bool) -> Vec<(Scheme, sm80::Specialisation)> {
    let (most, adamw) = (in_use(), |(w, s), factor| scheme("adamw", 0, w, s, factor));
    let mut out = Vec::new();
    let mut add = |scheme: Scheme, mode, rows: u32, accumulator: bool, vector: bool| {
        let group = false;
        let fused = sm80::Specialisation { mode, tile_rows: rows, accumulator, vector, group };
        out.push((scheme, fused));
        if mode == Mode::Update {
            out.push((scheme, sm80::Specialisation { group: true, ..fused }));
        }
    };
    for formats in &most {
        add(adamw(*formats, Dtype::Bf16), Mode::Update, tile_rows, false, true);
    }
    let split = Scheme {
        fp32_products: Fp32Products::Bf16x3,
        ..adamw((WEIGHTS[0], STATES[0]), Dtype::F32)
    };
    add(split, Mode::Update, tile_rows, false, true);
    add(split, Mode::Accumulate, tile_rows, true, true);
    let plain = adamw(most[0], Dtype::Bf16);
    add(plain, Mode::Accumulate, tile_rows, true, true);
    add(plain, Mode::Norm, tile_rows, false, true);
    if !all {
        return out;
    }
    add(plain, Mode::Norm, tile_rows, true, true);
    add(plain, Mode::Accumulate, tile_rows, true, false);
    add(adamw(most[0], Dtype::F16), Mode::Update, tile_rows, false, true);
    for formats in &most {
        let scheme = adamw(*formats, Dtype::Bf16);
        add(scheme, Mode::Update, 64, false, true);
        add(scheme, Mode::Update, tile_rows, true, true);
        add(scheme, Mode::Update, tile_rows, false, false);
    }
    for formats in WEIGHTS.into_iter().flat_map(|w| STATES.map(|s| (w, s))) {
        add(adamw(formats, Dtype::Bf16), Mode::Update, tile_rows, false, true);
    }
    for (name, flags) in rules().into_iter().filter(|(_, flags)| flags & MAXIMIZE == 0) {
        for (weight, state) in [most[0], most[3]] {
            let scheme = scheme(name, flags, weight, state, Dtype::Bf16);
            add(scheme, Mode::Update, tile_rows, false, true);
        }
    }
    out
}

/// The fused kernel's specialisations: each tile that the policy chooses, for every rule and format.
fn fused() -> Vec<(Scheme, Specialisation)> {
    const H200: (u32, u32) = (132, 232_448);
    let mut out = Vec::new();
    let mut add = |scheme: Scheme, mode, accumulator: bool, tokens, rest: (bool, bool, usize)| {
        let update = mode == Mode::Update;
        let states = &scheme.state_formats[..scheme.n_states];
        let mut bytes = if accumulator { 4 } else { 0 };
        if update {
            let extra = scheme.weight_format.extra_dtype().map_or(0, Dtype::bytes);
            let states = states.iter().map(|s| s.dtype().bytes()).sum::<usize>();
            bytes += scheme.weight_format.model_dtype().bytes() + extra + states;
        }
        let q8 = update && states.contains(&StateFormat::Q8);
        let streams = Streams { bytes: bytes as u32, q8 };
        let Some(tile) = choose(28672, 4096, tokens, &streams, H200.0, H200.1) else { return };
        let (whole_draws, device_step, segments) = rest;
        let group = false;
        let fused =
            Specialisation { mode, tile, accumulator, whole_draws, device_step, segments, group };
        out.push((scheme, fused));
        // With each format in use.
        if update && tokens == 2048 {
            let tile = group::tile(200, (512, 512), tokens, &streams, H200.0, H200.1).unwrap();
            out.push((scheme, group::specialisation(Specialisation { tile, ..fused })));
        }
    };
    let usual = (true, false, 1);
    // Every format with AdamW and with SGD, the formats in use with the other rules; with AdamW these with
    // each tile.
    for (weight, state) in in_use() {
        let scheme = scheme("adamw", 0, weight, state, Dtype::Bf16);
        for tokens in [2048, 8192] {
            add(scheme, Mode::Update, false, tokens, usual);
        }
        add(scheme, Mode::Update, true, 512, usual);
    }
    for (name, flags) in rules() {
        if flags & MAXIMIZE != 0 {
            continue;
        }
        let formats: Vec<_> = if ["adamw", "sgd"].contains(&name) && flags & AMSGRAD == 0 {
            WEIGHTS.into_iter().flat_map(|w| STATES.map(|s| (w, s))).collect()
        } else {
            in_use()
        };
        for (weight, state) in formats {
            let scheme = scheme(name, flags, weight, state, Dtype::Bf16);
            add(scheme, Mode::Update, false, 512, usual);
        }
    }
    let adamw = |factor| scheme("adamw", 0, WEIGHTS[1], STATES[1], factor);
    for rest in [(false, false, 1), (true, true, 1), (true, false, 8), (true, false, MOST_SEGMENTS)]
    {
        add(adamw(Dtype::Bf16), Mode::Update, false, 512, rest);
    }
    add(adamw(Dtype::F16), Mode::Update, false, 8192, usual);
    for tokens in [512, 8192] {
        add(adamw(Dtype::Bf16), Mode::Accumulate, true, tokens, usual);
        for accumulator in [false, true] {
            add(adamw(Dtype::Bf16), Mode::Norm, accumulator, tokens, usual);
        }
    }
    out
}

/// A number of a ptxas line, such as the 12 of `12 bytes spill stores`.
fn before(line: &str, what: &str) -> u32 {
    let Some(at) = line.find(what) else { return 0 };
    line[..at].split_whitespace().next_back().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// What ptxas says of a job's kernels, one line each: registers, spills, shared memory.
fn resources(job: &Job, log: &str) -> String {
    let mut table = String::new();
    let (mut kernel, mut spilled) = ("", 0);
    for line in log.lines() {
        if let Some(name) = line.split("entry function '").nth(1) {
            kernel = name.split('\'').next().unwrap_or_default();
        }
        if line.contains("bytes spill") {
            spilled = before(line, " bytes spill stores");
        }
        if line.contains("Used ") {
            let (registers, shared) = (before(line, " registers"), before(line, " bytes smem"));
            let defines = job.defines.join(" ").replace("FORGE_", "");
            writeln!(
                table,
                "{kernel}: {registers} registers, {spilled} bytes spilled, {shared} bytes shared; \
                 {defines}"
            )
            .unwrap();
        }
    }
    table
}

/// Whether a job's resources are recorded: those of the specialisations that matter most.
fn recorded(job: &Job) -> bool {
    let adamw = ["FORGE_RULE=forge::AdamW", "FORGE_RULE=forge::NoRule"];
    let of_interest = match job.source {
        "elementwise.cu" => {
            job.defines[0] == adamw[0] && job.defines.ends_with(&["FORGE_VECTOR=1".into()])
        }
        "wgrad_sm80.cu" => adamw.contains(&&*job.defines[0]),
        "wgrad_sm90.cu" => adamw.contains(&&*job.defines[0]),
        _ => true,
    };
    let main = if job.source == "wgrad_sm80.cu" { SM80_ON[0].0 } else { MAIN };
    job.architecture == main && of_interest
}

#[test]
fn every_specialisation_compiles_without_warnings_or_spills() {
    let nvrtc = nvrtc();
    let jobs: Vec<Job> = jobs().into_iter().collect();
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let tables = Mutex::new(vec![String::new(); jobs.len()]);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(index) else { break };
                    let mut options = options(job.architecture, &job.defines);
                    options.push("--ptxas-options=-v".to_string());
                    let wrong = match nvrtc.compile(source_of(job.source), &options, "test") {
                        Err(error) => Some(error.message),
                        Ok(image) => {
                            assert_eq!(image.bytes[..4], *b"\x7fELF");
                            let log = image.log;
                            if recorded(job) {
                                tables.lock().unwrap()[index] = resources(job, &log);
                            }
                            // Kernels that are no main ones may have some registers in memory: the
                            // element-wise one for ragged shapes and rules other than AdamW, q8 with a
                            // buffer to add, and three states of q8.
                            let has = |define: &str| job.defines.iter().any(|d| d == define);
                            let elementwise = job.source == sources::ELEMENTWISE.name;
                            let adamw = has("FORGE_RULE=forge::AdamW");
                            let most = if has("FORGE_STATE2_FORMAT=2") && !elementwise {
                                140
                            } else if has("FORGE_VECTOR=0") {
                                20
                            } else if elementwise && !adamw
                                || has("FORGE_ACCUMULATOR=1") && has("FORGE_STATE0_FORMAT=2")
                            {
                                16
                            } else {
                                0
                            };
                            let spills =
                                log.lines().any(|line| before(line, " bytes spill") > most);
                            // C7508, C7510: a serialised wgmma.
                            (spills || log.contains("warning") || log.contains("C75"))
                                .then_some(log)
                        }
                    };
                    if let Some(wrong) = wrong {
                        let text = format!(
                            "{} {} {:?}\n{wrong}",
                            job.source, job.architecture, job.defines
                        );
                        failures.lock().unwrap().push(text);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    println!("{} specialisations", jobs.len());
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), jobs.len(), failures.join("\n"));

    let table = tables.into_inner().unwrap().concat();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels/resources.txt");
    if std::env::var_os("FORGE_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &table).unwrap();
    }
    let recorded = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        table, recorded,
        "FORGE_BLESS=1 cargo test --test kernels renews it, if the change is meant"
    );
}

#[test]
fn a_compile_error_names_what_and_shows_the_log() {
    let source = Source { name: "wrong.cu", text: "__global__ void f() { no_such_thing(); }" };
    let error = nvrtc().compile(source, &options(MAIN, &[]), "rule 'x'").err().unwrap();
    assert_eq!(error.status, forge_status::FORGE_ERROR_COMPILE);
    for part in ["rule 'x'", "wrong.cu", "no_such_thing"] {
        assert!(error.message.contains(part), "{part}: {}", error.message);
    }
}

/// Registers a rule of this CUDA source, with a state `m` and a per-step value `bias`.
fn user_rule(name: &str, cuda: &str, bias: &str) -> Scheme {
    let hyper = ["lr", "weight_decay", "beta"].map(|name| HyperDefinition {
        name: name.into(),
        default: 0.5,
        least: 0.0,
        most: 1.0,
    });
    register(Definition {
        name: name.into(),
        hyper: hyper.to_vec(),
        states: vec![("m".into(), StateKind::Signed)],
        per_step: vec![PerStep { name: "bias".into(), expression: bias.into() }],
        cuda: Some(cuda.into()),
        cpu: None,
    })
    .unwrap();
    scheme(name, 0, WEIGHTS[2], STATES[1], Dtype::Bf16)
}

#[test]
fn a_rule_of_ones_own_compiles_into_every_kernel_that_applies_rules() {
    let source = "m += (1.0f - beta) * (g - m);\nfor (int i = 0; i < 2; ++i)\n    \
                  w -= 0.5f * lr * quotient(m, root(fabsf(m)) + 1e-6f) / bias;\n\
                  w = fmaf(-lr, weight_decay * w, w);";
    let scheme = user_rule("compiles", source, "1.0 - pow(beta, step)");
    let vector = [specialise::update(&scheme), vec!["FORGE_VECTOR=1".into()]].concat();
    let shapes = fused().into_iter().map(|(_, specialisation)| specialisation);
    let fused = shapes.into_iter().find(|s| s.mode == Mode::Update).unwrap();
    let units = [
        (sources::PROLOGUE, specialise::rule(&scheme)),
        (sources::ELEMENTWISE, vector),
        (sources::WGRAD_SM90, fused.defines(&scheme)),
    ];
    for (source, defines) in units {
        let image = nvrtc().compile(source, &options(MAIN, &defines), "rule 'compiles'").unwrap();
        assert!(!image.log.contains("warning"), "{}: {}", source.name, image.log);
    }
}

#[test]
fn an_error_in_a_rule_of_ones_own_names_the_rule_and_its_line() {
    let cases = [
        (
            "typo",
            "m = g;\nw -= lr * momentum;",
            "1.0",
            ["rule 'typo'", "(2)", "\"momentum\" is undefined"],
        ),
        (
            "bad_value",
            "m = g; w -= lr * m;",
            "1.0 - pow(gamma)",
            ["per-step value 'bias'", "(1)", "gamma"],
        ),
        (
            "constant",
            "m = g; lr = 1.0f; w -= lr * m;",
            "1.0",
            ["rule 'constant'", "(1)", "modifiable"],
        ),
    ];
    for (name, cuda, bias, parts) in cases {
        let scheme = user_rule(name, cuda, bias);
        let options = options(MAIN, &specialise::rule(&scheme));
        let error = nvrtc().compile(sources::PROLOGUE, &options, &specialise::name(&scheme));
        let error = error.err().unwrap();
        assert_eq!(error.status, forge_status::FORGE_ERROR_COMPILE);
        for part in parts {
            assert!(error.message.contains(part), "{part}: {}", error.message);
        }
    }
}

#[test]
fn a_rules_text_is_among_what_an_image_is_made_from() {
    let scheme = user_rule("text", "m = g; w -= lr * m;", "1.0");
    let headers = sources::headers(&options(MAIN, &specialise::rule(&scheme)));
    let text = headers.iter().find(|h| h.name == "user_rule.cuh").unwrap().text;
    assert!(text.contains("m = g; w -= lr * m;"), "{text}");
    assert_eq!(sources::headers(&[]).len() + 1, headers.len());
}

#[test]
fn a_missing_compiler_is_named() {
    let error = Nvrtc::open(Path::new("/no/such/libnvrtc.so.13")).err().unwrap();
    assert!(error.contains("/no/such/libnvrtc.so.13"), "{error}");
}

#[test]
fn the_key_depends_on_source_defines_and_architecture() {
    let nvrtc = nvrtc();
    let defines = |v: &str| vec![format!("FORGE_VECTOR={v}")];
    let keys: BTreeSet<String> = [
        image_key(&nvrtc, sources::ELEMENTWISE, &options(MAIN, &defines("0"))),
        image_key(&nvrtc, sources::ELEMENTWISE, &options(MAIN, &defines("1"))),
        image_key(&nvrtc, sources::ELEMENTWISE, &options("sm_80", &defines("1"))),
        image_key(&nvrtc, sources::REDUCE, &options(MAIN, &defines("1"))),
        cache::key(["ab", "c"]),
        cache::key(["a", "bc"]),
    ]
    .into();
    assert_eq!(keys.len(), 6);
}

#[test]
fn without_a_driver_the_library_is_named() {
    // Where there is a driver and a GPU this is no error.
    if let Err(error) = Cuda::new(0, None) {
        assert_eq!(error.status, forge_status::FORGE_ERROR_NO_BACKEND);
        let named =
            ["libcuda.so.1", "driver", "GPU"].iter().any(|what| error.message.contains(what));
        assert!(
            error.message.starts_with("backend: FORGE_BACKEND_CUDA") && named,
            "{}",
            error.message
        );
    }
}
