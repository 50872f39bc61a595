//! What a user's CPU function gets; a struct of the C ABI.

/// A tile of a parameter in fp32, for a rule's CPU function. Arrays have `count` elements, row after row.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types)]
pub struct forge_rule_tile {
    /// Elements.
    pub count: u64,
    /// The step, from 1.
    pub step: u64,
    /// Gradients: finite, times grad_scale, with the sign of FORGE_RULE_MAXIMIZE.
    pub g: *const f32,
    /// Weights, updated in place.
    pub w: *mut f32,
    /// States, updated in place; NULL behind the last one.
    pub states: [*mut f32; 3],
    /// Hyper-parameters, in the order of the definition.
    pub hyper: *const f64,
}
