//! Stochastic gradient descent with momentum, dampening and Nesterov, as `torch.optim.SGD`.
//!
//! `g += λw;  b = μb + (1−τ)g  (b = g at step 1);  g = g + μb | b;  w −= ηg`

use super::{
    Constants, Hyper, LR, MAX_STATES, MAXIMIZE, MOMENTUM, NESTEROV, Rule, RuleInfo, State,
    StepScalars, WEIGHT_DECAY,
};
use crate::format::StateKind;

const MU: usize = 2;
const DAMPENING: usize = 3;

pub(super) struct Sgd;

impl Rule for Sgd {
    const INFO: RuleInfo = RuleInfo {
        name: c"sgd",
        hyper: &[
            Hyper::lr(1e-3),
            Hyper::weight_decay(0.0),
            Hyper::new(c"momentum", 0.0, 0.0, f32::MAX as f64),
            Hyper::new(c"dampening", 0.0, f32::MIN as f64, f32::MAX as f64),
        ],
        states: &[State { name: c"momentum_buffer", kind: StateKind::Signed }],
        flags: MAXIMIZE | NESTEROV | MOMENTUM,
        cuda: "forge::SgdRule<FORGE_RULE_FLAGS>",
    };

    fn states(flags: u32) -> &'static [State] {
        if flags & MOMENTUM != 0 { Self::INFO.states } else { &[] }
    }

    fn constants(step: &StepScalars, flags: u32) -> Constants {
        let mut c = [0.0; 16];
        c[0] = step.hyper[LR] as f32;
        c[1] = step.hyper[WEIGHT_DECAY] as f32;
        // Without a buffer: μ = 0 and weight 1, so that b = g. At the first step b = g as well.
        let first = flags & MOMENTUM == 0 || step.step == 1;
        c[2] = if first { 0.0 } else { step.hyper[MU] as f32 };
        c[3] = if first { 1.0 } else { (1.0 - step.hyper[DAMPENING]) as f32 };
        c[4] = step.hyper[MU] as f32;
        c[5] = f32::from(flags & NESTEROV != 0);
        c
    }

    #[inline(always)]
    fn update(flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        let [lr, decay, carry, intake, mu, ..] = *c;
        let g = decay.mul_add(*w, g);
        let mut direction = g;
        if flags & MOMENTUM != 0 {
            s[0] = carry.mul_add(s[0], intake * g);
            direction = if flags & NESTEROV != 0 { mu.mul_add(s[0], g) } else { s[0] };
        }
        *w = (-lr).mul_add(direction, *w);
    }
}
