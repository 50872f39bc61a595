//! The text that kernels compile for a user's rule: its names around its lines.

use super::{Definition, STEP};
use std::fmt::Write;

/// `user_rule.cuh`, or None without CUDA source.
pub(super) fn header(definition: &Definition) -> Option<String> {
    let body = definition.cuda.as_ref()?;
    let rule = &definition.name;
    let hyper = || definition.hyper.iter().map(|h| &h.name).enumerate();
    let per_step = || (definition.hyper.len()..).zip(&definition.per_step);
    let mut constants = String::new();
    for (i, name) in hyper() {
        let _ = writeln!(constants, "        [[maybe_unused]] const double {name} = forge_h[{i}];");
        let _ = writeln!(constants, "        forge_c[{i}] = static_cast<float>({name});");
    }
    for (i, value) in per_step() {
        let (name, expression) = (&value.name, &value.expression);
        // Errors then name the user's line and not one of this file.
        let _ = writeln!(constants, "#line 1 \"rule '{rule}', per-step value '{name}'\"");
        let _ = writeln!(constants, "[[maybe_unused]] const double {name} = ({expression});");
        let _ = writeln!(constants, "forge_c[{i}] = static_cast<float>({name});");
    }
    let mut names = String::new();
    for (i, name) in hyper().chain(per_step().map(|(i, value)| (i, &value.name))) {
        let _ = writeln!(names, "        [[maybe_unused]] const float {name} = forge_c[{i}];");
    }
    for (k, (name, _)) in definition.states.iter().enumerate() {
        let _ = writeln!(names, "        [[maybe_unused]] float &{name} = forge_s[{k}];");
    }
    Some(format!(
        r#"// A rule that the caller defined.
#pragma once
#include "arithmetic.cuh"

namespace forge {{

struct User {{
    static constexpr bool CODED = false;

    FORGE_DEVICE static void constants(double step, double, const double *forge_h, float *forge_c) {{
{constants}        forge_c[{STEP}] = static_cast<float>(step);
    }}

    FORGE_DEVICE static void update(const float *forge_c, float g, float forge_scale, float &w,
                                    float *forge_s) {{
        g = __fmul_rn(g, forge_scale);
        [[maybe_unused]] const float step = forge_c[{STEP}];
{names}#line 1 "rule '{rule}'"
{body}
    }}
}};

}} // namespace forge
"#
    ))
}
