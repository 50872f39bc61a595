//! Rules by name, and the clip coefficient.

use super::boundary::{boundary, check_out_struct, check_pointer, check_reserved, read_struct};
use super::enums;
use super::types::{forge_rule_definition, forge_rule_info};
use crate::error::{Result, bail, forge_status};
use crate::rule::user::{self, CpuFunction, Definition, HyperDefinition, PerStep};
use crate::rule::{self, ErasedRule, State};
use std::ffi::{CStr, c_char};
use std::ptr::null;

/// How many rules there are: those of this build, then those of forge_rule_register.
#[unsafe(no_mangle)]
pub extern "C" fn forge_rule_count() -> u32 {
    rule::all().len() as u32
}

/// The rule of this index, from 0, with all states that some flags need.
///
/// Errors: FORGE_ERROR_RULE (an index that is not below forge_rule_count).
///
/// # Safety
/// `out` points to a struct of its `struct_size`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_rule_get(index: u32, out: *mut forge_rule_info) -> forge_status {
    boundary(|| {
        // SAFETY: as promised by the caller.
        unsafe { check_out_struct("out", out)? };
        let rules = rule::all();
        let Some(rule) = rules.get(index as usize) else {
            bail!(FORGE_ERROR_RULE, "index: {index}; there are {} rules", rules.len());
        };
        // SAFETY: checked above.
        unsafe { *out = describe(*rule, rule.info().states) };
        Ok(())
    })
}

/// The rule of this name, with the states that these flags need.
///
/// Errors: FORGE_ERROR_RULE (no such rule, a flag that it does not take).
///
/// # Safety
/// `name` is NUL-terminated, `out` points to a struct of its `struct_size`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_rule_find(
    name: *const c_char,
    rule_flags: u32,
    out: *mut forge_rule_info,
) -> forge_status {
    boundary(|| {
        // SAFETY: as promised by the caller.
        unsafe {
            check_out_struct("out", out)?;
            let rule = find(name)?;
            rule::check_flags(rule, rule_flags)?;
            *out = describe(rule, rule.states(rule_flags));
        }
        Ok(())
    })
}

/// Makes a rule of the caller's own known by its name, for the life of the process; `rule` of a
/// forge_linear_config may name it then. To define the same rule again changes nothing. CUDA source is
/// compiled when the first linear is made with it on a GPU, which reports errors in it.
///
/// # Safety
/// `definition` points to a struct of its `struct_size` whose strings are NULL or NUL-terminated;
/// `cpu_function` stays callable, reads and writes `count` elements of each array that it is given, and
/// nothing else of the library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_rule_register(
    definition: *const forge_rule_definition,
) -> forge_status {
    boundary(|| {
        // SAFETY: as promised by the caller.
        let definition = unsafe { read_definition(&read_struct("definition", definition)?)? };
        user::register(definition).map(|_| ())
    })
}

/// # Safety
/// As [`forge_rule_register`].
unsafe fn read_definition(d: &forge_rule_definition) -> Result<Definition> {
    check_reserved("definition", d.reserved)?;
    let counts =
        [("n_states", d.n_states, 3), ("n_hyper", d.n_hyper, 16), ("n_per_step", d.n_per_step, 16)];
    for (name, count, most) in counts {
        if count > most {
            bail!(FORGE_ERROR_RULE, "{name}: {count}; a rule has at most {most}");
        }
    }
    // SAFETY: as promised by the caller.
    let string = |name: &str, text: *const c_char| unsafe { string(name, text) };
    let optional = |name: &str, text: *const c_char| {
        if text.is_null() { Ok(None) } else { string(name, text).map(Some) }
    };
    let hyper = (0..d.n_hyper as usize).map(|i| {
        Ok(HyperDefinition {
            name: string(&format!("hyper_names[{i}]"), d.hyper_names[i])?,
            default: d.hyper_defaults[i],
            least: d.hyper_least[i],
            most: d.hyper_most[i],
        })
    });
    let states = (0..d.n_states as usize).map(|i| {
        let kind = enums::state_kind(&format!("state_kinds[{i}]"), d.state_kinds[i])?;
        Ok((string(&format!("state_names[{i}]"), d.state_names[i])?, kind))
    });
    let per_step = (0..d.n_per_step as usize).map(|i| {
        Ok(PerStep {
            name: string(&format!("per_step_names[{i}]"), d.per_step_names[i])?,
            expression: string(&format!("per_step_expressions[{i}]"), d.per_step_expressions[i])?,
        })
    });
    Ok(Definition {
        name: string("name", d.name)?,
        hyper: hyper.collect::<Result<_>>()?,
        states: states.collect::<Result<_>>()?,
        per_step: per_step.collect::<Result<_>>()?,
        cuda: optional("cuda_source", d.cuda_source)?,
        cpu: d.cpu_function.map(|function| CpuFunction { function, user: d.cpu_user }),
    })
}

/// # Safety
/// `text` is NULL or NUL-terminated.
unsafe fn string(name: &str, text: *const c_char) -> Result<String> {
    check_pointer(name, text)?;
    // SAFETY: as promised by the caller.
    match unsafe { CStr::from_ptr(text) }.to_str() {
        Ok(text) => Ok(text.to_string()),
        Err(_) => bail!(FORGE_ERROR_RULE, "{name}: not UTF-8"),
    }
}

/// # Safety
/// `name` is NULL or NUL-terminated.
pub(super) unsafe fn find(name: *const c_char) -> Result<&'static dyn ErasedRule> {
    check_pointer("rule", name)?;
    // SAFETY: as promised by the caller.
    rule::find(&unsafe { CStr::from_ptr(name) }.to_string_lossy())
}

fn describe(rule: &dyn ErasedRule, states: &[State]) -> forge_rule_info {
    let info = rule.info();
    let mut out = forge_rule_info {
        struct_size: size_of::<forge_rule_info>() as u32,
        n_states: states.len() as u32,
        n_hyper: info.hyper.len() as u32,
        allowed_flags: info.flags,
        name: info.name.as_ptr(),
        state_names: [null(); 3],
        hyper_names: [null(); 16],
        hyper_defaults: [0.0; 16],
    };
    for (name, state) in out.state_names.iter_mut().zip(states) {
        *name = state.name.as_ptr();
    }
    for (i, hyper) in info.hyper.iter().enumerate() {
        out.hyper_names[i] = hyper.name.as_ptr();
        out.hyper_defaults[i] = hyper.default;
    }
    out
}

/// The gradient norm and what to multiply gradients by: `norm = grad_scale · √sum_of_squares`,
/// `coefficient = grad_scale · min(1, max_norm / (norm + 1e-6))`, as torch's clip_grad_norm_ and
/// Megatron-LM have it. `max_norm <= 0`: no clipping. A sum that is not finite gives that norm and a
/// coefficient of 0: skip the step. `sum_of_squares` is the sum over all layers and ranks, `grad_scale` what
/// gradients are multiplied by anyway (an inverse loss scale, or 1).
///
/// Errors: FORGE_ERROR_SCALAR (a negative sum, a scale that is not finite, a `max_norm` of NaN).
///
/// # Safety
/// `out_norm` and `out_coefficient` point to doubles.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_clip_coefficient(
    sum_of_squares: f64,
    grad_scale: f64,
    max_norm: f64,
    out_norm: *mut f64,
    out_coefficient: *mut f64,
) -> forge_status {
    boundary(|| {
        check_pointer("out_norm", out_norm)?;
        check_pointer("out_coefficient", out_coefficient)?;
        if sum_of_squares < 0.0 {
            bail!(FORGE_ERROR_SCALAR, "sum_of_squares: {sum_of_squares} is negative");
        }
        if !grad_scale.is_finite() {
            bail!(FORGE_ERROR_SCALAR, "grad_scale: {grad_scale} is not finite");
        }
        if max_norm.is_nan() {
            bail!(FORGE_ERROR_SCALAR, "max_norm: NaN; 0 turns clipping off");
        }
        let norm = grad_scale.abs() * sum_of_squares.sqrt();
        let ratio = if max_norm > 0.0 { max_norm / (norm + 1e-6) } else { 1.0 };
        let coefficient = if norm.is_finite() { grad_scale * ratio.min(1.0) } else { 0.0 };
        // SAFETY: checked above.
        unsafe {
            *out_norm = norm;
            *out_coefficient = coefficient;
        }
        Ok(())
    })
}
