//! Averaged SGD (Polyak & Juditsky, SIAM J. Control Optim. 30, 1992), as `torch.optim.ASGD`, decay added
//! to the gradient.
//!
//! `ηₜ = lr/(1 + λ·lr·(t−1))^α;  w = (1 − ληₜ)w − ηₜg;  a += (w − a)/max(1, t − 1 − t₀)`

use super::{
    Constants, Hyper, LR, MAX_STATES, MAXIMIZE, Rule, RuleInfo, State, StepScalars, WEIGHT_DECAY,
};
use crate::format::StateKind;

const LAMBD: usize = 2;
const ALPHA: usize = 3;
const T0: usize = 4;

pub(super) struct Asgd;

impl Rule for Asgd {
    const INFO: RuleInfo = RuleInfo {
        name: c"asgd",
        hyper: &[
            Hyper::lr(1e-2),
            Hyper::weight_decay(0.0),
            Hyper::new(c"lambd", 1e-4, 0.0, f32::MAX as f64),
            Hyper::new(c"alpha", 0.75, 0.0, f32::MAX as f64),
            Hyper::new(c"t0", 1e6, 0.0, f32::MAX as f64),
        ],
        states: &[State { name: c"ax", kind: StateKind::Signed }],
        flags: MAXIMIZE,
        cuda: "forge::Asgd",
    };

    fn constants(step: &StepScalars, _flags: u32) -> Constants {
        let h = &step.hyper;
        let before = (step.step - 1) as f64;
        let eta = h[LR] / (1.0 + h[LAMBD] * h[LR] * before).powf(h[ALPHA]);
        let mut c = [0.0; 16];
        c[0] = -eta as f32;
        c[1] = h[WEIGHT_DECAY] as f32;
        c[2] = (1.0 - h[LAMBD] * eta) as f32;
        c[3] = (1.0 / (before - h[T0]).max(1.0)) as f32;
        c
    }

    #[inline(always)]
    fn update(_flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        let [step, decay, shrink, share, ..] = *c;
        let g = decay.mul_add(*w, g);
        *w = step.mul_add(g, *w * shrink);
        s[0] = share.mul_add(*w - s[0], s[0]);
    }
}
