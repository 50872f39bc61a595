//! Lion (Chen et al., "Symbolic discovery of optimization algorithms", arXiv 2302.06675), decay
//! decoupled as in its paper.
//!
//! `u = sign(β₁m + (1−β₁)g);  w = (1−ηλ)w − ηu;  m = β₂m + (1−β₂)g`

use super::{
    BELOW_ONE, Constants, Hyper, LR, MAX_STATES, MAXIMIZE, Rule, RuleInfo, State, StepScalars,
    WEIGHT_DECAY,
};
use crate::format::StateKind;

const BETA1: usize = 2;
const BETA2: usize = 3;

pub(super) struct Lion;

impl Rule for Lion {
    const INFO: RuleInfo = RuleInfo {
        name: c"lion",
        hyper: &[
            Hyper::lr(1e-4),
            Hyper::weight_decay(0.0),
            Hyper::new(c"beta1", 0.9, 0.0, BELOW_ONE),
            Hyper::new(c"beta2", 0.99, 0.0, BELOW_ONE),
        ],
        states: &[State { name: c"exp_avg", kind: StateKind::Signed }],
        flags: MAXIMIZE,
        cuda: "forge::Lion",
    };

    fn constants(step: &StepScalars, _flags: u32) -> Constants {
        let h = &step.hyper;
        let mut c = [0.0; 16];
        c[0] = h[LR] as f32;
        c[1] = (1.0 - h[LR] * h[WEIGHT_DECAY]) as f32;
        c[2] = h[BETA1] as f32;
        c[3] = (1.0 - h[BETA1]) as f32;
        c[4] = h[BETA2] as f32;
        c[5] = (1.0 - h[BETA2]) as f32;
        c
    }

    #[inline(always)]
    fn update(_flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        let [lr, shrink, beta1, intake1, beta2, intake2, ..] = *c;
        let m = s[0];
        let u = beta1.mul_add(m, intake1 * g);
        // The paper's sign(0) is 0.
        *w = *w * shrink - if u == 0.0 { 0.0 } else { lr.copysign(u) };
        s[0] = beta2.mul_add(m, intake2 * g);
    }
}
