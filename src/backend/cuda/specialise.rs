//! From a [`Scheme`] to the defines that its kernels are compiled with.
//!
//! | define | meaning |
//! |---|---|
//! | `FORGE_RULE` | the rule's C++ type |
//! | `FORGE_RULE_FLAGS` | its flags; without `maximize`, which `grad_scale` carries |
//! | `FORGE_USER_RULE` | its name, where the caller defined it: then `user_rule.cuh` has that type |
//! | `FORGE_N_STATES` | states that it has |
//! | `FORGE_WEIGHT_FORMAT` | 0 fp32, 1 bf16, 2 bf16+fp32, 3 bf16+16 |
//! | `FORGE_WEIGHT_STOCHASTIC` | 1: a bf16 weight is rounded by chance |
//! | `FORGE_STATE0_FORMAT` … `2` | 0 fp32, 1 bf16, 2 q8 |
//! | `FORGE_STATE0_KIND` … `2` | 0 signed, 1 non-negative |
//! | `FORGE_STATE_STOCHASTIC` | 1: bf16 and q8 states are rounded by chance |
//! | `FORGE_EXACT` | 1: fp32 factors and exact products, so that rules give the CPU backend's bits |
//! | `FORGE_FACTOR` | 0 fp32, 1 bf16, 2 fp16 |

use super::super::Scheme;
use crate::format::{Dtype, Rounding, StateFormat, StateKind, WeightFormat};
use crate::rule::{MAX_STATES, MAXIMIZE};

/// The rule and its flags.
pub fn rule(scheme: &Scheme) -> Vec<String> {
    let info = scheme.rule.info();
    let mut out = vec![
        format!("FORGE_RULE={}", info.cuda),
        format!("FORGE_RULE_FLAGS={}u", scheme.flags & !MAXIMIZE),
        format!("FORGE_N_STATES={}", scheme.n_states),
    ];
    if scheme.rule.user().is_some() {
        out.push(format!("FORGE_USER_RULE={}", info.name.to_string_lossy()));
    }
    out
}

/// How weight and states are stored and rounded.
pub fn formats(scheme: &Scheme) -> Vec<String> {
    let rounded = scheme.weight_format == WeightFormat::Bf16
        && scheme.weight_rounding == Rounding::Stochastic;
    let used = &scheme.state_formats[..scheme.n_states];
    let states_rounded = scheme.state_rounding == Rounding::Stochastic
        && used.iter().any(|format| *format != StateFormat::F32);
    let mut out = vec![
        format!("FORGE_WEIGHT_FORMAT={}", weight_code(scheme.weight_format)),
        format!("FORGE_WEIGHT_STOCHASTIC={}", u32::from(rounded)),
        format!("FORGE_STATE_STOCHASTIC={}", u32::from(states_rounded)),
    ];
    let states = scheme.rule.states(scheme.flags);
    for k in 0..MAX_STATES {
        // States that the rule lacks are fp32, so that equal kernels have equal defines.
        let format = used.get(k).map_or(0, |format| state_code(*format));
        let kind = states.get(k).map_or(StateKind::Signed, |state| state.kind);
        out.push(format!("FORGE_STATE{k}_FORMAT={format}"));
        out.push(format!("FORGE_STATE{k}_KIND={}", u32::from(kind == StateKind::NonNegative)));
    }
    out
}

/// For kernels that touch neither weight nor states.
pub fn none() -> Vec<String> {
    let mut out: Vec<String> =
        ["RULE=forge::NoRule", "RULE_FLAGS=0u", "N_STATES=0", "WEIGHT_FORMAT=0"]
            .iter()
            .chain(&["WEIGHT_STOCHASTIC=0", "STATE_STOCHASTIC=0"])
            .map(|define| format!("FORGE_{define}"))
            .collect();
    for k in 0..MAX_STATES {
        out.push(format!("FORGE_STATE{k}_FORMAT=0"));
        out.push(format!("FORGE_STATE{k}_KIND=0"));
    }
    out
}

/// Everything that an update kernel depends on.
pub fn update(scheme: &Scheme) -> Vec<String> {
    let mut out = rule(scheme);
    out.extend(formats(scheme));
    out.push(format!("FORGE_EXACT={}", u32::from(scheme.is_exact())));
    out
}

/// A short name of a scheme for errors and logs.
pub fn name(scheme: &Scheme) -> String {
    let rule = scheme.rule.info().name.to_string_lossy();
    let states = &scheme.state_formats[..scheme.n_states];
    format!("rule '{rule}', weight {:?}, states {states:?}", scheme.weight_format)
}

/// `FORGE_FACTOR` and its like.
pub fn dtype_code(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::Bf16 => 1,
        Dtype::F16 => 2,
        Dtype::U8 | Dtype::U16 => unreachable!("factors are floats; the C ABI checks this"),
    }
}

/// `FORGE_WEIGHT_FORMAT`.
pub fn weight_code(format: WeightFormat) -> u32 {
    match format {
        WeightFormat::F32 => 0,
        WeightFormat::Bf16 => 1,
        WeightFormat::Bf16F32 => 2,
        WeightFormat::Bf16Low16 => 3,
    }
}

/// `FORGE_STATE0_FORMAT` and its like.
pub fn state_code(format: StateFormat) -> u32 {
    match format {
        StateFormat::F32 => 0,
        StateFormat::Bf16 => 1,
        StateFormat::Q8 => 2,
    }
}
