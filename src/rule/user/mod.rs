//! Rules that the library does not have: defined while the program runs, by a few lines of CUDA C for
//! GPUs and a function over a tile for CPUs.
//!
//! A definition is checked, given a name and kept for the life of the process, so that everything else
//! ([`super::find`], schemes, linears, kernels) treats it as one of the built-in rules.

mod check;
mod registry;
mod source;
mod tile;

pub use tile::forge_rule_tile;

use super::{
    Constants, ErasedRule, Hyper, LR, MAX_HYPER, MAX_STATES, MAXIMIZE, RULES, RuleInfo, Run, State,
    StepScalars, WEIGHT_DECAY,
};
use crate::error::{Result, bail};
use crate::format::StateKind;
use std::ffi::{CStr, CString, c_void};

/// Where the step is among the constants: behind hyper-parameters and per-step values.
pub const STEP: usize = 15;

/// Names that the text of a rule finds besides its own.
const GIVEN: [&str; 3] = ["g", "w", "step"];

/// A rule over a tile, on a CPU: 0 says success. Called by several threads at once, each with another
/// tile.
pub type Function = unsafe extern "C" fn(user: *mut c_void, tile: *const forge_rule_tile) -> i32;

/// A function and its first argument.
#[derive(Clone, Copy, Debug)]
pub struct CpuFunction {
    /// Of the caller.
    pub function: Function,
    /// Passed through.
    pub user: *mut c_void,
}

// SAFETY: whoever defines a rule promises that its function may be called from any thread.
unsafe impl Send for CpuFunction {}
// SAFETY: as above.
unsafe impl Sync for CpuFunction {}

impl PartialEq for CpuFunction {
    fn eq(&self, other: &Self) -> bool {
        (self.function as usize, self.user) == (other.function as usize, other.user)
    }
}

/// A hyper-parameter of a definition.
#[derive(Clone, Debug, PartialEq)]
pub struct HyperDefinition {
    /// An identifier of C.
    pub name: String,
    /// In `least..=most`.
    pub default: f64,
    /// Smallest accepted value.
    pub least: f64,
    /// Largest accepted value.
    pub most: f64,
}

/// A value that is computed once for each step, in fp64, and is there as fp32 for each element.
#[derive(Clone, Debug, PartialEq)]
pub struct PerStep {
    /// An identifier of C.
    pub name: String,
    /// Over hyper-parameters, `step`, and per-step values before it.
    pub expression: String,
}

/// What a user says of a rule.
#[derive(Clone, Debug, PartialEq)]
pub struct Definition {
    /// An identifier of C that no other rule has.
    pub name: String,
    /// `lr` and `weight_decay` first.
    pub hyper: Vec<HyperDefinition>,
    /// At most [`MAX_STATES`].
    pub states: Vec<(String, StateKind)>,
    /// For the CUDA text.
    pub per_step: Vec<PerStep>,
    /// Statements of CUDA C over `g`, `w`, `step` and the names above; None: no CUDA.
    pub cuda: Option<String>,
    /// None: no CPU.
    pub cpu: Option<CpuFunction>,
}

/// A rule that was defined. Lives as long as the process: linears refer to it.
pub struct UserRule {
    definition: Definition,
    name: &'static CStr,
    hyper: &'static [Hyper],
    states: &'static [State],
    header: Option<String>,
}

/// The rules that were defined so far, in that order.
pub fn registered() -> impl Iterator<Item = &'static UserRule> {
    registry::rules()
}

/// Checks a definition and makes it a rule. To define the same rule again changes nothing; another one
/// of that name is refused.
pub fn register(definition: Definition) -> Result<&'static UserRule> {
    check::definition(&definition)?;
    if RULES.iter().any(|r| r.info().name.to_str() == Ok(&definition.name)) {
        bail!(FORGE_ERROR_RULE, "name: '{}' is a built-in rule; choose another", definition.name);
    }
    let rule = registry::find_or_add(&definition);
    if rule.definition != definition {
        bail!(
            FORGE_ERROR_RULE,
            "name: a rule '{}' with another definition is registered already; linears may use it, so \
             choose another name",
            definition.name
        );
    }
    Ok(rule)
}

fn leak(name: &str) -> &'static CStr {
    // `check` has seen that it is an identifier, so there is no NUL in it.
    Box::leak(CString::new(name).unwrap_or_default().into_boxed_c_str())
}

impl UserRule {
    fn new(definition: Definition) -> Self {
        let hyper = definition.hyper.iter().map(|h| Hyper {
            name: leak(&h.name),
            default: h.default,
            least: h.least,
            most: h.most,
        });
        let states =
            definition.states.iter().map(|(name, kind)| State { name: leak(name), kind: *kind });
        Self {
            name: leak(&definition.name),
            hyper: Vec::leak(hyper.collect()),
            states: Vec::leak(states.collect()),
            header: source::header(&definition),
            definition,
        }
    }

    /// The CPU function, or what to do without.
    pub fn function(&self) -> Result<CpuFunction> {
        match self.definition.cpu {
            Some(function) => Ok(function),
            None => bail!(
                FORGE_ERROR_RULE,
                "rule: '{}' has CUDA source and no CPU function; define it with one, or use it on a GPU",
                self.definition.name
            ),
        }
    }

    /// The text that kernels include as `user_rule.cuh`, or what to do without.
    pub fn header(&self) -> Result<&str> {
        match &self.header {
            Some(header) => Ok(header),
            None => bail!(
                FORGE_ERROR_RULE,
                "rule: '{}' has a CPU function and no CUDA source; define it with one, or use it on the \
                 CPU",
                self.definition.name
            ),
        }
    }

    /// Whether a kernel has to compute constants that the host does not know.
    pub fn has_per_step(&self) -> bool {
        !self.definition.per_step.is_empty()
    }
}

impl ErasedRule for UserRule {
    fn info(&self) -> RuleInfo {
        RuleInfo {
            name: self.name,
            hyper: self.hyper,
            states: self.states,
            flags: MAXIMIZE,
            cuda: "forge::User",
        }
    }

    fn states(&self, _flags: u32) -> &'static [State] {
        self.states
    }

    // Without the per-step values, which only a GPU's prologue can compute.
    fn constants(&self, step: &StepScalars, _flags: u32) -> Constants {
        let mut c = [0.0; 16];
        for (constant, value) in c.iter_mut().zip(&step.hyper[..self.hyper.len()]) {
            *constant = *value as f32;
        }
        c[STEP] = step.step as f32;
        c
    }

    fn apply(&self, _flags: u32, _c: &Constants, _run: Run<'_>) {
        unreachable!("a user's rule is applied to whole tiles, by its function")
    }

    fn user(&self) -> Option<&UserRule> {
        Some(self)
    }
}

#[cfg(test)]
mod tests;
