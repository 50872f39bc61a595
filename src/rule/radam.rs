//! RAdam (Liu et al., "On the variance of the adaptive learning rate and beyond", arXiv 1908.03265), as
//! `torch.optim.RAdam`: decay added to the gradient, or with `decoupled_weight_decay` applied to the
//! weight.
//!
//! `m += (1−β₁)(g − m);  v = β₂v + (1−β₂)g²;  w −= η/(1−β₁ᵗ) · m · (r√(1−β₂ᵗ)/(√v + ε) | 1)`, the former
//! once `ρ = ρ∞ − 2tβ₂ᵗ/(1−β₂ᵗ) > 5`.

use super::{
    BELOW_ONE, Constants, DECOUPLED, Hyper, LR, MAX_STATES, MAXIMIZE, Rule, RuleInfo, State,
    StepScalars, WEIGHT_DECAY,
};
use crate::format::StateKind;

const BETA1: usize = 2;
const BETA2: usize = 3;
const EPS: usize = 4;

pub(super) struct RAdam;

impl Rule for RAdam {
    const INFO: RuleInfo = RuleInfo {
        name: c"radam",
        hyper: &[
            Hyper::lr(1e-3),
            Hyper::weight_decay(0.0),
            Hyper::new(c"beta1", 0.9, 0.0, BELOW_ONE),
            Hyper::new(c"beta2", 0.999, 0.0, BELOW_ONE),
            Hyper::eps(1e-8),
        ],
        states: &[
            State { name: c"exp_avg", kind: StateKind::Signed },
            State { name: c"exp_avg_sq", kind: StateKind::NonNegative },
        ],
        flags: MAXIMIZE | DECOUPLED,
        cuda: "forge::RAdam",
    };

    fn constants(step: &StepScalars, flags: u32) -> Constants {
        let h = &step.hyper;
        let t = step.step as f64;
        let decoupled = flags & DECOUPLED != 0;
        let bias1 = 1.0 - h[BETA1].powf(t);
        let power2 = h[BETA2].powf(t);
        let bias2 = 1.0 - power2;
        let limit = 2.0 / (1.0 - h[BETA2]) - 1.0;
        let rho = limit - 2.0 * t * power2 / bias2;
        let adaptive = rho > 5.0;
        let rectified =
            ((rho - 4.0) * (rho - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * rho)).sqrt();
        let mut c = [0.0; 16];
        c[0] = (-h[LR] / bias1 * if adaptive { rectified * bias2.sqrt() } else { 1.0 }) as f32;
        c[1] = if decoupled { 0.0 } else { h[WEIGHT_DECAY] as f32 };
        c[2] = if decoupled { (1.0 - h[LR] * h[WEIGHT_DECAY]) as f32 } else { 1.0 };
        c[3] = (1.0 - h[BETA1]) as f32;
        c[4] = h[BETA2] as f32;
        c[5] = (1.0 - h[BETA2]) as f32;
        // Whether √v + ε divides.
        c[6] = f32::from(adaptive);
        c[7] = h[EPS] as f32;
        c
    }

    #[inline(always)]
    fn update(_flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        let [step, coupled, shrink, intake1, beta2, intake2, adaptive, eps, ..] = *c;
        let g = coupled.mul_add(*w, g);
        s[0] = intake1.mul_add(g - s[0], s[0]);
        s[1] = (intake2 * g).mul_add(g, beta2 * s[1]);
        let divisor = if adaptive != 0.0 { s[1].sqrt() + eps } else { 1.0 };
        *w = (*w).mul_add(shrink, step * s[0] / divisor);
    }
}
