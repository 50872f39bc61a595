//! Compiles the fused kernel for tiles named on standard input (`WEIGHT/STATE COLS,…`, as
//! `benchmarks/tune_tiles.py --list` prints them) into a cache directory, on a machine without a GPU:
//!
//!     python benchmarks/tune_tiles.py --list --formats bf16/bf16 |
//!         FORGE_NVRTC=.../libnvrtc.so.13 cargo run --release --example warm_cache -- CACHE_DIR [stochastic]
//!
//! `stochastic`: states are rounded by chance, as they are by default.

use forge::backend::Scheme;
use forge::backend::cuda::cache::Cache;
use forge::backend::cuda::compile::{Nvrtc, options};
use forge::backend::cuda::module::image_key;
use forge::backend::cuda::sm90::{Mode, Specialisation, policy};
use forge::backend::cuda::sources::WGRAD_SM90;
use forge::format::{Dtype, Rounding, StateFormat, WeightFormat};
use forge::rule;
use std::io::{self, BufRead};
use std::path::Path;
use std::sync::Mutex;

fn scheme(formats: &str, state_rounding: Rounding) -> Option<Scheme> {
    let (weight, state) = formats.split_once('/')?;
    let weight_format = match weight {
        "fp32" => WeightFormat::F32,
        "bf16" => WeightFormat::Bf16,
        "bf16+fp32" => WeightFormat::Bf16F32,
        "bf16+16" => WeightFormat::Bf16Low16,
        _ => return None,
    };
    let state_format = match state {
        "fp32" => StateFormat::F32,
        "bf16" => StateFormat::Bf16,
        "q8" => StateFormat::Q8,
        _ => return None,
    };
    Some(Scheme {
        rule: rule::find("adamw").ok()?,
        flags: 0,
        n_states: 2,
        weight_format,
        weight_rounding: Rounding::Stochastic,
        state_formats: [state_format; 3],
        state_rounding,
        factor_dtype: Dtype::Bf16,
        fp32_products: forge::backend::Fp32Products::Exact,
        parameter_id: 0,
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().ok_or("usage: warm_cache CACHE_DIR [stochastic]")?;
    let stochastic = arguments.next().as_deref() == Some("stochastic");
    let rounding = if stochastic { Rounding::Stochastic } else { Rounding::Nearest };
    let path = std::env::var("FORGE_NVRTC").map_err(|_| "set FORGE_NVRTC to libnvrtc.so.13")?;
    let nvrtc = Nvrtc::open(Path::new(&path))?;
    let cache = Cache::new(Some(directory.into()));
    let lines: Vec<String> = io::stdin().lock().lines().collect::<Result<_, _>>()?;
    let lines = Mutex::new(lines.into_iter());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some(line) = lines.lock().expect("no panic holds it").next() else { break };
                    let mut words = line.split_whitespace();
                    let scheme = words.next().and_then(|formats| scheme(formats, rounding));
                    let tile = words.next().and_then(policy::parse);
                    let (Some(scheme), Some(tile)) = (scheme, tile) else {
                        eprintln!("{line}: not WEIGHT/STATE and a tile");
                        continue;
                    };
                    let specialisation = Specialisation {
                        mode: Mode::Update,
                        tile,
                        accumulator: false,
                        whole_draws: true,
                        device_step: false,
                        segments: 1,
                        group: false,
                    };
                    let options = options("sm_90a", &specialisation.defines(&scheme));
                    match nvrtc.compile(WGRAD_SM90, &options, &line) {
                        Ok(image) => {
                            cache.store(&image_key(&nvrtc, WGRAD_SM90, &options), &image.bytes);
                            println!("{line}");
                        }
                        Err(error) => eprintln!("{line}: {error}"),
                    }
                }
            });
        }
    });
    Ok(())
}
