//! Adagrad (Duchi et al., "Adaptive subgradient methods", JMLR 12, 2011), as `torch.optim.Adagrad`,
//! decay added to the gradient.
//!
//! `v += g²;  w −= η/(1 + (t−1)·lr_decay) · g/(√v + ε)`; before the first step v is
//! `initial_accumulator_value`.

use super::{
    Constants, Hyper, LR, MAX_STATES, MAXIMIZE, Rule, RuleInfo, State, StepScalars, WEIGHT_DECAY,
};
use crate::format::StateKind;

const LR_DECAY: usize = 2;
const INITIAL: usize = 3;
const EPS: usize = 4;

pub(super) struct Adagrad;

impl Rule for Adagrad {
    const INFO: RuleInfo = RuleInfo {
        name: c"adagrad",
        hyper: &[
            Hyper::lr(1e-2),
            Hyper::weight_decay(0.0),
            Hyper::new(c"lr_decay", 0.0, 0.0, f32::MAX as f64),
            Hyper::new(c"initial_accumulator_value", 0.0, 0.0, f32::MAX as f64),
            Hyper::eps(1e-10),
        ],
        states: &[State { name: c"sum", kind: StateKind::NonNegative }],
        flags: MAXIMIZE,
        cuda: "forge::Adagrad",
    };

    fn constants(step: &StepScalars, _flags: u32) -> Constants {
        let h = &step.hyper;
        let mut c = [0.0; 16];
        c[0] = (-h[LR] / (1.0 + (step.step - 1) as f64 * h[LR_DECAY])) as f32;
        c[1] = h[WEIGHT_DECAY] as f32;
        c[2] = h[INITIAL] as f32;
        c[3] = h[EPS] as f32;
        c
    }

    #[inline(always)]
    fn update(_flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        let [step, decay, initial, eps, ..] = *c;
        let g = decay.mul_add(*w, g);
        // States begin as zeros, and stay so where the first steps were skipped.
        let before = if s[0] == 0.0 { initial } else { s[0] };
        s[0] = g.mul_add(g, before);
        *w = step.mul_add(g / (s[0].sqrt() + eps), *w);
    }
}
