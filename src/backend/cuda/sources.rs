//! The kernels' sources, embedded as text: the library needs no file at run time.

use crate::rule::ErasedRule;

/// A translation unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Source {
    /// Its file name under `kernels/`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

macro_rules! source {
    ($name:literal) => {
        Source { name: $name, text: include_str!(concat!("../../../kernels/", $name)) }
    };
}

/// What sources include, under the names by which they do.
pub const HEADERS: &[Source] = &[
    source!("prelude.cuh"),
    source!("instructions.cuh"),
    source!("arithmetic.cuh"),
    source!("philox.cuh"),
    source!("shard.cuh"),
    source!("mode.cuh"),
    source!("q8.cuh"),
    source!("squares.cuh"),
    source!("report.cuh"),
    source!("formats.cuh"),
    source!("rules.cuh"),
    source!("rules/adadelta.cuh"),
    source!("rules/adagrad.cuh"),
    source!("rules/adam.cuh"),
    source!("rules/adamax.cuh"),
    source!("rules/ademamix.cuh"),
    source!("rules/asgd.cuh"),
    source!("rules/lion.cuh"),
    source!("rules/nadam.cuh"),
    source!("rules/radam.cuh"),
    source!("rules/rmsprop.cuh"),
    source!("rules/rprop.cuh"),
    source!("rules/sgd.cuh"),
    source!("rules/signum.cuh"),
    source!("runs.cuh"),
    source!("run_draws.cuh"),
    source!("elementwise.cuh"),
    source!("mma.cuh"),
    source!("launch_sm80.cuh"),
    source!("mainloop_sm80.cuh"),
    source!("ptx.cuh"),
    source!("wgmma.cuh"),
    source!("arrays.cuh"),
    source!("launch.cuh"),
    source!("producer.cuh"),
    source!("tally.cuh"),
    source!("epilogue.cuh"),
];

/// What a compilation with these defines or options may include: [`HEADERS`], and the rule that the
/// caller defined if it is one (`FORGE_USER_RULE=name`).
pub fn headers(defines: &[String]) -> Vec<Source> {
    let mut out = HEADERS.to_vec();
    let user = defines.iter().find_map(|d| d.split_once("FORGE_USER_RULE=").map(|(_, name)| name));
    let mut rules = crate::rule::user::registered();
    let rule = rules.find(|r| r.info().name.to_str().ok() == user);
    if let Some(text) = rule.and_then(|r| r.header().ok()) {
        out.push(Source { name: "user_rule.cuh", text });
    }
    out
}

/// The fused kernel of compute capability 9.0.
pub const WGRAD_SM90: Source = source!("wgrad_sm90.cu");

/// The maps of weights that share a launch of it.
pub const GROUP_MAPS: Source = source!("group_maps.cu");

/// The fused kernel of every compute capability since 8.0.
pub const WGRAD_SM80: Source = source!("wgrad_sm80.cu");

/// The rule over an fp32 gradient in memory.
pub const ELEMENTWISE: Source = source!("elementwise.cu");
/// fp32 products with one accumulator for each element.
pub const EXACT: Source = source!("exact.cu");
/// Reports, norms.
pub const REDUCE: Source = source!("reduce.cu");
/// The bias gradient.
pub const BIAS: Source = source!("bias.cu");
/// Weights and states to fp32 and back.
pub const IMAGE: Source = source!("image.cu");
/// The scalars of a step from device memory.
pub const PROLOGUE: Source = source!("prologue.cu");
