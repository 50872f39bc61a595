//! Adamax (Kingma & Ba, arXiv 1412.6980, section 7.1), decay added to the gradient, as
//! `torch.optim.Adamax`.
//!
//! `m += (1−β₁)(g − m);  u = max(β₂u, |g| + ε);  w −= η/(1−β₁ᵗ) · m/u`

use super::{
    BELOW_ONE, Constants, Hyper, LR, MAX_STATES, MAXIMIZE, Rule, RuleInfo, State, StepScalars,
    WEIGHT_DECAY,
};
use crate::format::StateKind;

const BETA1: usize = 2;
const BETA2: usize = 3;
const EPS: usize = 4;

pub(super) struct Adamax;

impl Rule for Adamax {
    const INFO: RuleInfo = RuleInfo {
        name: c"adamax",
        hyper: &[
            Hyper::lr(2e-3),
            Hyper::weight_decay(0.0),
            Hyper::new(c"beta1", 0.9, 0.0, BELOW_ONE),
            Hyper::new(c"beta2", 0.999, 0.0, BELOW_ONE),
            Hyper::eps(1e-8),
        ],
        states: &[
            State { name: c"exp_avg", kind: StateKind::Signed },
            State { name: c"exp_inf", kind: StateKind::NonNegative },
        ],
        flags: MAXIMIZE,
        cuda: "forge::Adamax",
    };

    fn constants(step: &StepScalars, _flags: u32) -> Constants {
        let h = &step.hyper;
        let mut c = [0.0; 16];
        c[0] = (-h[LR] / (1.0 - h[BETA1].powf(step.step as f64))) as f32;
        c[1] = h[WEIGHT_DECAY] as f32;
        c[2] = (1.0 - h[BETA1]) as f32;
        c[3] = h[BETA2] as f32;
        c[4] = h[EPS] as f32;
        c
    }

    #[inline(always)]
    fn update(_flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        let [step, decay, intake, beta2, eps, ..] = *c;
        let g = decay.mul_add(*w, g);
        s[0] = intake.mul_add(g - s[0], s[0]);
        s[1] = (beta2 * s[1]).max(g.abs() + eps);
        *w = step.mul_add(s[0] / s[1], *w);
    }
}
