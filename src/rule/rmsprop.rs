//! RMSprop (Tieleman & Hinton, lecture 6.5, 2012; centered: Graves, arXiv 1308.0850), as
//! `torch.optim.RMSprop`, decay added to the gradient.
//!
//! `v = αv + (1−α)g²;  a = αa + (1−α)g (centered);  d = g/(√(v − a²) + ε);  b = μb + d;  w −= η(b | d)`
//!
//! `v − a²`, which rounding can turn negative where gradients are constant, counts as 0 then; torch
//! gives NaN.

use super::{
    BELOW_ONE, CENTERED, Constants, Hyper, LR, MAX_STATES, MAXIMIZE, MOMENTUM, Rule, RuleInfo,
    State, StepScalars, WEIGHT_DECAY,
};
use crate::format::StateKind;

const ALPHA: usize = 2;
const EPS: usize = 3;
const MU: usize = 4;

const SQUARE: State = State { name: c"square_avg", kind: StateKind::NonNegative };
const BUFFER: State = State { name: c"momentum_buffer", kind: StateKind::Signed };
const AVERAGE: State = State { name: c"grad_avg", kind: StateKind::Signed };

pub(super) struct RmsProp;

impl Rule for RmsProp {
    const INFO: RuleInfo = RuleInfo {
        name: c"rmsprop",
        hyper: &[
            Hyper::lr(1e-2),
            Hyper::weight_decay(0.0),
            Hyper::new(c"alpha", 0.99, 0.0, BELOW_ONE),
            Hyper::eps(1e-8),
            Hyper::new(c"momentum", 0.0, 0.0, f32::MAX as f64),
        ],
        states: &[SQUARE, BUFFER, AVERAGE],
        flags: MAXIMIZE | MOMENTUM | CENTERED,
        cuda: "forge::RmsProp",
    };

    fn states(flags: u32) -> &'static [State] {
        match (flags & MOMENTUM != 0, flags & CENTERED != 0) {
            (false, false) => &[SQUARE],
            (true, false) => &[SQUARE, BUFFER],
            (false, true) => &[SQUARE, AVERAGE],
            (true, true) => Self::INFO.states,
        }
    }

    fn constants(step: &StepScalars, _flags: u32) -> Constants {
        let h = &step.hyper;
        let mut c = [0.0; 16];
        c[0] = -h[LR] as f32;
        c[1] = h[WEIGHT_DECAY] as f32;
        c[2] = h[ALPHA] as f32;
        c[3] = (1.0 - h[ALPHA]) as f32;
        c[4] = h[EPS] as f32;
        c[5] = h[MU] as f32;
        c
    }

    #[inline(always)]
    fn update(flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        let [step, decay, alpha, intake, eps, mu, ..] = *c;
        let (momentum, centered) = (flags & MOMENTUM != 0, flags & CENTERED != 0);
        let g = decay.mul_add(*w, g);
        s[0] = (intake * g).mul_add(g, alpha * s[0]);
        let mut variance = s[0];
        if centered {
            let average = &mut s[if momentum { 2 } else { 1 }];
            *average = intake.mul_add(g - *average, *average);
            variance = (-*average).mul_add(*average, variance).max(0.0);
        }
        let mut direction = g / (variance.sqrt() + eps);
        if momentum {
            direction = mu.mul_add(s[1], direction);
            s[1] = direction;
        }
        *w = step.mul_add(direction, *w);
    }
}
