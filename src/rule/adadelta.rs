//! Adadelta (Zeiler, arXiv 1212.5701), as `torch.optim.Adadelta`, decay added to the gradient.
//!
//! `v = ρv + (1−ρ)g²;  δ = √(a + ε)/√(v + ε) · g;  a = ρa + (1−ρ)δ²;  w −= ηδ`

use super::{
    BELOW_ONE, Constants, Hyper, LR, MAX_STATES, MAXIMIZE, Rule, RuleInfo, State, StepScalars,
    WEIGHT_DECAY,
};
use crate::format::StateKind;

const RHO: usize = 2;
const EPS: usize = 3;

pub(super) struct Adadelta;

impl Rule for Adadelta {
    const INFO: RuleInfo = RuleInfo {
        name: c"adadelta",
        hyper: &[
            Hyper::lr(1.0),
            Hyper::weight_decay(0.0),
            Hyper::new(c"rho", 0.9, 0.0, BELOW_ONE),
            Hyper::eps(1e-6),
        ],
        states: &[
            State { name: c"square_avg", kind: StateKind::NonNegative },
            State { name: c"acc_delta", kind: StateKind::NonNegative },
        ],
        flags: MAXIMIZE,
        cuda: "forge::Adadelta",
    };

    fn constants(step: &StepScalars, _flags: u32) -> Constants {
        let h = &step.hyper;
        let mut c = [0.0; 16];
        c[0] = -h[LR] as f32;
        c[1] = h[WEIGHT_DECAY] as f32;
        c[2] = h[RHO] as f32;
        c[3] = (1.0 - h[RHO]) as f32;
        c[4] = h[EPS] as f32;
        c
    }

    #[inline(always)]
    fn update(_flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        let [step, decay, rho, intake, eps, ..] = *c;
        let g = decay.mul_add(*w, g);
        s[0] = (intake * g).mul_add(g, rho * s[0]);
        let delta = (s[1] + eps).sqrt() / (s[0] + eps).sqrt() * g;
        s[1] = (intake * delta).mul_add(delta, rho * s[1]);
        *w = step.mul_add(delta, *w);
    }
}
