//! Element-wise optimizer rules.
//!
//! A rule is one small file: its names, its hyper-parameters, the constants of a step (computed once,
//! in fp64, like torch does) and what happens to one element (in fp32). To add one, write the file
//! and list it in [`RULES`]; every format, schedule, shard and front end then has it.

mod adadelta;
mod adagrad;
mod adam;
mod adamax;
mod ademamix;
mod asgd;
mod lion;
mod nadam;
mod radam;
mod rmsprop;
mod rprop;
mod sgd;
mod signum;
pub mod user;

use crate::error::{Result, bail};
use crate::format::StateKind;

/// States a rule may have at most.
pub const MAX_STATES: usize = 3;
/// Hyper-parameters a rule may have at most.
pub const MAX_HYPER: usize = 16;
/// `hyper[LR]` is the learning rate in every rule.
pub const LR: usize = 0;
/// `hyper[WEIGHT_DECAY]` is the weight decay in every rule.
pub const WEIGHT_DECAY: usize = 1;

/// Ascend instead of descend: the gradient's sign is turned before anything else.
pub const MAXIMIZE: u32 = 1;
/// Nesterov momentum.
pub const NESTEROV: u32 = 2;
/// Keep a momentum buffer.
pub const MOMENTUM: u32 = 4;
/// Keep the largest second moment so far, and divide by it.
pub const AMSGRAD: u32 = 8;
/// Keep an average of the gradient, and divide by its deviation.
pub const CENTERED: u32 = 16;
/// Apply weight decay to the weight instead of adding it to the gradient.
pub const DECOUPLED: u32 = 32;

/// Every rule of this build.
pub static RULES: &[&dyn ErasedRule] = &[
    &sgd::Sgd,
    &adam::Adam,
    &adam::AdamW,
    &lion::Lion,
    &adamax::Adamax,
    &nadam::NAdam,
    &radam::RAdam,
    &ademamix::AdEmaMix,
    &rmsprop::RmsProp,
    &adagrad::Adagrad,
    &adadelta::Adadelta,
    &rprop::Rprop,
    &asgd::Asgd,
    &signum::Signum,
];

/// One hyper-parameter: name, default, and the closed range of what is accepted.
pub struct Hyper {
    /// As `torch.optim` names it, NUL-terminated for C.
    pub name: &'static std::ffi::CStr,
    /// As `torch.optim` (or the rule's paper) has it.
    pub default: f64,
    /// Smallest accepted value.
    pub least: f64,
    /// Largest accepted value.
    pub most: f64,
}

impl Hyper {
    const fn new(name: &'static std::ffi::CStr, default: f64, least: f64, most: f64) -> Self {
        Self { name, default, least, most }
    }

    /// The learning rate, first in every rule's list.
    const fn lr(default: f64) -> Self {
        Self::new(c"lr", default, 0.0, f32::MAX as f64)
    }

    /// The weight decay, second in every rule's list.
    const fn weight_decay(default: f64) -> Self {
        Self::new(c"weight_decay", default, 0.0, f32::MAX as f64)
    }

    /// What keeps a divisor from 0.
    const fn eps(default: f64) -> Self {
        Self::new(c"eps", default, 0.0, f32::MAX as f64)
    }
}

/// A coefficient of an exponential average: below one.
const BELOW_ONE: f64 = 1.0 - f64::EPSILON / 2.0;

/// One state: its name in checkpoints and what 8-bit codes may assume.
pub struct State {
    /// As `torch.optim` names it, NUL-terminated for C.
    pub name: &'static std::ffi::CStr,
    /// Signed or not.
    pub kind: StateKind,
}

/// What a rule is, apart from its arithmetic.
pub struct RuleInfo {
    /// The name of the C ABI, NUL-terminated.
    pub name: &'static std::ffi::CStr,
    /// Starts with the learning rate and the weight decay.
    pub hyper: &'static [Hyper],
    /// All states that some set of flags needs.
    pub states: &'static [State],
    /// The flags that it takes.
    pub flags: u32,
    /// Its C++ type in `kernels/rules.cuh`.
    pub cuda: &'static str,
}

/// The constants of one step, as its [`Rule::update`] wants them.
pub type Constants = [f32; 16];

/// The scalars of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepScalars {
    /// Counted from 1.
    pub step: u64,
    /// Of stochastic rounding.
    pub seed: u64,
    /// Multiplies every gradient: clip coefficient, inverse loss scale.
    pub grad_scale: f64,
    /// In the order of [`RuleInfo::hyper`].
    pub hyper: [f64; MAX_HYPER],
}

/// A rule's arithmetic.
pub trait Rule: Sync {
    /// Names and ranges.
    const INFO: RuleInfo;

    /// The states that these flags need.
    fn states(flags: u32) -> &'static [State] {
        let _ = flags;
        Self::INFO.states
    }

    /// Once for each step, in fp64.
    fn constants(step: &StepScalars, flags: u32) -> Constants;

    /// One element, in fp32. `g` already carries `grad_scale` and the sign of `maximize`.
    fn update(flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]);
}

/// A run of elements in fp32: at most [`crate::format::BLOCK`] of one row.
pub struct Run<'a> {
    /// Gradients, scaled.
    pub g: &'a [f32],
    /// Weights, updated in place.
    pub w: &'a mut [f32],
    /// States, updated in place; those that the rule lacks hold anything.
    pub s: [&'a mut [f32]; MAX_STATES],
}

/// A [`Rule`] behind a pointer.
pub trait ErasedRule: Sync {
    /// Names and ranges.
    fn info(&self) -> RuleInfo;
    /// The states that these flags need.
    fn states(&self, flags: u32) -> &'static [State];
    /// The constants of a step.
    fn constants(&self, step: &StepScalars, flags: u32) -> Constants;
    /// Applies the rule to a run.
    fn apply(&self, flags: u32, c: &Constants, run: Run<'_>);
    /// The rule as its user defined it; None: built in.
    fn user(&self) -> Option<&user::UserRule> {
        None
    }
}

impl<R: Rule> ErasedRule for R {
    fn info(&self) -> RuleInfo {
        R::INFO
    }
    fn states(&self, flags: u32) -> &'static [State] {
        R::states(flags)
    }
    fn constants(&self, step: &StepScalars, flags: u32) -> Constants {
        R::constants(step, flags)
    }
    fn apply(&self, flags: u32, c: &Constants, run: Run<'_>) {
        apply_multiversioned::<R>(flags, c, run);
    }
}

crate::backend::cpu::isa::multiversioned!(
    fn apply_multiversioned[R: Rule](flags: u32, c: &Constants, run: Run<'_>) = apply_run
);

#[inline(always)]
fn apply_run<R: Rule>(flags: u32, c: &Constants, run: Run<'_>) {
    let n = run.g.len();
    let (g, w) = (&run.g[..n], &mut run.w[..n]);
    let [s0, s1, s2] = run.s;
    let (s0, s1, s2) = (&mut s0[..n], &mut s1[..n], &mut s2[..n]);
    for i in 0..n {
        let mut states = [s0[i], s1[i], s2[i]];
        R::update(flags, c, g[i], &mut w[i], &mut states);
        [s0[i], s1[i], s2[i]] = states;
    }
}

/// Every rule: those of this build, then those that were defined.
pub fn all() -> Vec<&'static dyn ErasedRule> {
    let defined = user::registered().map(|r| r as &dyn ErasedRule);
    RULES.iter().copied().chain(defined).collect()
}

/// The rule of this name.
pub fn find(name: &str) -> Result<&'static dyn ErasedRule> {
    let rules = all();
    if let Some(rule) = rules.iter().find(|r| r.info().name.to_str() == Ok(name)) {
        return Ok(*rule);
    }
    let known: Vec<_> = rules.iter().map(|r| r.info().name.to_string_lossy()).collect();
    bail!(FORGE_ERROR_RULE, "rule: no rule is named '{name}'; known: {}", known.join(", "))
}

/// Refuses flags that the rule does not take, and Nesterov without momentum.
pub fn check_flags(rule: &dyn ErasedRule, flags: u32) -> Result<()> {
    let info = rule.info();
    let name = info.name.to_string_lossy();
    if flags & !info.flags != 0 {
        bail!(
            FORGE_ERROR_RULE,
            "rule_flags: {flags:#x} has bits that rule '{name}' does not take; it takes {:#x}",
            info.flags
        );
    }
    if flags & NESTEROV != 0 && flags & MOMENTUM == 0 {
        bail!(
            FORGE_ERROR_RULE,
            "rule_flags: {flags:#x} asks for Nesterov without a momentum buffer; \
             set FORGE_RULE_MOMENTUM too"
        );
    }
    Ok(())
}

/// Refuses scalars outside the rule's ranges, NaN among them.
pub fn check_scalars(rule: &dyn ErasedRule, flags: u32, scalars: &StepScalars) -> Result<()> {
    if scalars.step == 0 || scalars.step > u64::from(u32::MAX) {
        bail!(FORGE_ERROR_SCALAR, "step: {} is not in 1..=4294967295", scalars.step);
    }
    if !(scalars.grad_scale.is_finite() && (scalars.grad_scale as f32).is_finite()) {
        bail!(
            FORGE_ERROR_SCALAR,
            "grad_scale: {} is not a finite fp32; skip the step instead of scaling by it",
            scalars.grad_scale
        );
    }
    let info = rule.info();
    for (hyper, value) in info.hyper.iter().zip(scalars.hyper) {
        if !(hyper.least..=hyper.most).contains(&value) {
            bail!(
                FORGE_ERROR_SCALAR,
                "{}: {value} is not in {}..={} (rule '{}')",
                hyper.name.to_string_lossy(),
                hyper.least,
                hyper.most,
                info.name.to_string_lossy()
            );
        }
    }
    // Each in range, and yet a product of two may overflow.
    if let Some(constant) = rule.constants(scalars, flags).iter().find(|c| !c.is_finite()) {
        bail!(
            FORGE_ERROR_SCALAR,
            "lr: {:e} with weight_decay {:e} gives a step that fp32 cannot hold ({constant}); \
             lower one of them (rule '{}')",
            scalars.hyper[LR],
            scalars.hyper[WEIGHT_DECAY],
            info.name.to_string_lossy()
        );
    }
    Ok(())
}

/// Hyper-parameters at their defaults, for tests and as a base to change.
pub fn default_hyper(rule: &dyn ErasedRule) -> [f64; MAX_HYPER] {
    let mut out = [0.0; MAX_HYPER];
    for (value, hyper) in out.iter_mut().zip(rule.info().hyper) {
        *value = hyper.default;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_in_range_whose_product_overflows_are_refused() {
        let rule = find("adamw").unwrap();
        let hyper = default_hyper(rule);
        let mut s = StepScalars { step: 1, seed: 0, grad_scale: 1.0, hyper };
        check_scalars(rule, 0, &s).unwrap();
        (s.hyper[LR], s.hyper[WEIGHT_DECAY]) = (1e30, 1e30);
        let error = check_scalars(rule, 0, &s).unwrap_err();
        assert!(error.message.contains("fp32 cannot hold"), "{error}");
    }

    #[test]
    fn every_rule_starts_with_lr_and_weight_decay() {
        for rule in RULES {
            let info = rule.info();
            assert_eq!(info.hyper[LR].name, c"lr");
            assert_eq!(info.hyper[WEIGHT_DECAY].name, c"weight_decay");
            assert!(info.hyper.len() <= MAX_HYPER && info.states.len() <= MAX_STATES);
            for hyper in info.hyper {
                assert!((hyper.least..=hyper.most).contains(&hyper.default));
            }
        }
    }
}
