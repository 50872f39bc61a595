//! Rprop (Riedmiller & Braun, 1993), as `torch.optim.Rprop`: the size of an element's step depends on
//! whether its gradient kept its sign. Meant for full batches.
//!
//! `η = clamp(η · (η₊ if g·g' > 0, η₋ if g·g' < 0, else 1));  g = 0 where g·g' < 0;  w −= η·sign(g);  g' = g`;
//! η is the learning rate before the first step.

use super::{
    Constants, Hyper, LR, MAX_STATES, MAXIMIZE, Rule, RuleInfo, State, StepScalars, WEIGHT_DECAY,
};
use crate::format::StateKind;

const ETA_MINUS: usize = 2;
const ETA_PLUS: usize = 3;
const STEP_MIN: usize = 4;
const STEP_MAX: usize = 5;

pub(super) struct Rprop;

impl Rule for Rprop {
    const INFO: RuleInfo = RuleInfo {
        name: c"rprop",
        hyper: &[
            Hyper::lr(1e-2),
            Hyper::weight_decay(0.0),
            Hyper::new(c"eta_minus", 0.5, 0.0, 1.0),
            Hyper::new(c"eta_plus", 1.2, 1.0, f32::MAX as f64),
            Hyper::new(c"step_size_min", 1e-6, 0.0, f32::MAX as f64),
            Hyper::new(c"step_size_max", 50.0, 0.0, f32::MAX as f64),
        ],
        states: &[
            State { name: c"prev", kind: StateKind::Signed },
            State { name: c"step_size", kind: StateKind::NonNegative },
        ],
        flags: MAXIMIZE,
        cuda: "forge::Rprop",
    };

    fn constants(step: &StepScalars, _flags: u32) -> Constants {
        let h = &step.hyper;
        let mut c = [0.0; 16];
        c[0] = h[LR] as f32;
        c[1] = h[WEIGHT_DECAY] as f32;
        c[2] = h[ETA_MINUS] as f32;
        c[3] = h[ETA_PLUS] as f32;
        c[4] = h[STEP_MIN] as f32;
        c[5] = h[STEP_MAX] as f32;
        // For CUDA's form without comparisons.
        c[6] = c[3] - 1.0;
        c
    }

    #[inline(always)]
    fn update(_flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        let [initial, decay, eta_minus, eta_plus, least, most, ..] = *c;
        let g = decay.mul_add(*w, g);
        // Signs are compared, since the product may underflow.
        let turned = (g > 0.0 && s[0] < 0.0) || (g < 0.0 && s[0] > 0.0);
        let kept = (g > 0.0 && s[0] > 0.0) || (g < 0.0 && s[0] < 0.0);
        let factor = if kept {
            eta_plus
        } else if turned {
            eta_minus
        } else {
            1.0
        };
        // States begin as zeros, and stay so where the first steps were skipped.
        let before = if s[1] == 0.0 { initial } else { s[1] };
        let size = (before * factor).min(most).max(least);
        let g = if turned { 0.0 } else { g };
        s[0] = g;
        s[1] = size;
        *w -= if g == 0.0 { 0.0 } else { size.copysign(g) };
    }
}
