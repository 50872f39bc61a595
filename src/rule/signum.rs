//! Signum (Bernstein et al., "signSGD", arXiv 1802.04434, algorithm 2), decay decoupled as in its paper.
//! With `momentum = 0` it is signSGD.
//!
//! `m = βm + (1−β)g;  w = (1−ηλ)w − η·sign(m)`

use super::{
    BELOW_ONE, Constants, Hyper, LR, MAX_STATES, MAXIMIZE, Rule, RuleInfo, State, StepScalars,
    WEIGHT_DECAY,
};
use crate::format::StateKind;

const MU: usize = 2;

pub(super) struct Signum;

impl Rule for Signum {
    const INFO: RuleInfo = RuleInfo {
        name: c"signum",
        hyper: &[
            Hyper::lr(1e-4),
            Hyper::weight_decay(0.0),
            Hyper::new(c"momentum", 0.9, 0.0, BELOW_ONE),
        ],
        states: &[State { name: c"momentum_buffer", kind: StateKind::Signed }],
        flags: MAXIMIZE,
        cuda: "forge::Signum",
    };

    fn constants(step: &StepScalars, _flags: u32) -> Constants {
        let h = &step.hyper;
        let mut c = [0.0; 16];
        c[0] = h[LR] as f32;
        c[1] = (1.0 - h[LR] * h[WEIGHT_DECAY]) as f32;
        c[2] = h[MU] as f32;
        c[3] = (1.0 - h[MU]) as f32;
        c
    }

    #[inline(always)]
    fn update(_flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        let [lr, shrink, mu, intake, ..] = *c;
        let m = mu.mul_add(s[0], intake * g);
        s[0] = m;
        *w = *w * shrink - if m == 0.0 { 0.0 } else { lr.copysign(m) };
    }
}
