//! AdEMAMix (Pagliardini et al., arXiv 2409.03137): Adam with a second, slow average of the gradient,
//! decay decoupled.
//!
//! `m += (1−β₁)(g − m);  n += (1−β₃)(g − n);  v = β₂v + (1−β₂)g²;`
//! `w = (1−ηλ)w − η · (m/(1−β₁ᵗ) + αn) / (√(v/(1−β₂ᵗ)) + ε)`
//!
//! In the first `warmup` steps α grows from 0 and β₃ from β₁, as in section 3 of the paper.

use super::{
    BELOW_ONE, Constants, Hyper, LR, MAX_STATES, MAXIMIZE, Rule, RuleInfo, State, StepScalars,
    WEIGHT_DECAY,
};
use crate::format::StateKind;

const BETA1: usize = 2;
const BETA2: usize = 3;
const BETA3: usize = 4;
const EPS: usize = 5;
const ALPHA: usize = 6;
const WARMUP: usize = 7;

/// α and β₃ of a step.
fn scheduled(h: &[f64], step: f64) -> (f64, f64) {
    let done = step / h[WARMUP];
    // Also without a warm-up, where it is infinite.
    if done >= 1.0 {
        return (h[ALPHA], h[BETA3]);
    }
    // The half-life of β₃ grows linearly. One of 0 cannot grow.
    if h[BETA1] == 0.0 || h[BETA3] == 0.0 {
        return (h[ALPHA] * done, h[BETA3]);
    }
    let (first, last) = (h[BETA1].ln(), h[BETA3].ln());
    let beta3 = (first * last / ((1.0 - done) * last + done * first)).exp();
    (h[ALPHA] * done, beta3.min(h[BETA3]))
}

pub(super) struct AdEmaMix;

impl Rule for AdEmaMix {
    const INFO: RuleInfo = RuleInfo {
        name: c"ademamix",
        hyper: &[
            Hyper::lr(1e-3),
            Hyper::weight_decay(0.0),
            Hyper::new(c"beta1", 0.9, 0.0, BELOW_ONE),
            Hyper::new(c"beta2", 0.999, 0.0, BELOW_ONE),
            Hyper::new(c"beta3", 0.9999, 0.0, BELOW_ONE),
            Hyper::eps(1e-8),
            Hyper::new(c"alpha", 5.0, 0.0, f32::MAX as f64),
            Hyper::new(c"warmup", 0.0, 0.0, f32::MAX as f64),
        ],
        states: &[
            State { name: c"exp_avg", kind: StateKind::Signed },
            State { name: c"exp_avg_sq", kind: StateKind::NonNegative },
            State { name: c"exp_avg_slow", kind: StateKind::Signed },
        ],
        flags: MAXIMIZE,
        cuda: "forge::AdEmaMix",
    };

    fn constants(step: &StepScalars, _flags: u32) -> Constants {
        let h = &step.hyper;
        let t = step.step as f64;
        let (alpha, beta3) = scheduled(h, t);
        let mut c = [0.0; 16];
        c[0] = (-h[LR] / (1.0 - h[BETA1].powf(t))) as f32;
        c[1] = (-h[LR] * alpha) as f32;
        c[2] = (1.0 - h[LR] * h[WEIGHT_DECAY]) as f32;
        c[3] = (1.0 - h[BETA1]) as f32;
        c[4] = h[BETA2] as f32;
        c[5] = (1.0 - h[BETA2]) as f32;
        c[6] = (1.0 / (1.0 - h[BETA2].powf(t)).sqrt()) as f32;
        c[7] = h[EPS] as f32;
        c[8] = (1.0 - beta3) as f32;
        c
    }

    #[inline(always)]
    fn update(_flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        let [of_m, of_n, shrink, intake1, beta2, intake2, unbias, eps, intake3, ..] = *c;
        s[0] = intake1.mul_add(g - s[0], s[0]);
        s[1] = (intake2 * g).mul_add(g, beta2 * s[1]);
        s[2] = intake3.mul_add(g - s[2], s[2]);
        let divisor = s[1].sqrt().mul_add(unbias, eps);
        *w = (*w).mul_add(shrink, of_n.mul_add(s[2], of_m * s[0]) / divisor);
    }
}
