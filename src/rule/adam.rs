//! Adam (Kingma & Ba, arXiv 1412.6980; decay added to the gradient) and AdamW (Loshchilov & Hutter,
//! arXiv 1711.05101; decay applied to the weight), with the order of operations of `torch.optim`.
//!
//! `m += (1−β₁)(g − m);  v = β₂v + (1−β₂)g²;  w −= η/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)`

use super::{
    BELOW_ONE, Constants, Hyper, LR, MAX_STATES, MAXIMIZE, Rule, RuleInfo, State, StepScalars,
    WEIGHT_DECAY,
};
use crate::format::StateKind;

const BETA1: usize = 2;
const BETA2: usize = 3;
const EPS: usize = 4;

const STATES: &[State] = &[
    State { name: c"exp_avg", kind: StateKind::Signed },
    State { name: c"exp_avg_sq", kind: StateKind::NonNegative },
];
const BETA1_SPEC: Hyper = Hyper::new(c"beta1", 0.9, 0.0, BELOW_ONE);
const BETA2_SPEC: Hyper = Hyper::new(c"beta2", 0.999, 0.0, BELOW_ONE);
const EPS_SPEC: Hyper = Hyper::new(c"eps", 1e-8, 0.0, f32::MAX as f64);

pub(super) struct Adam;
pub(super) struct AdamW;

fn constants(step: &StepScalars, is_coupled: bool) -> Constants {
    let decay = step.hyper[WEIGHT_DECAY];
    let (coupled, decoupled) = if is_coupled { (decay, 0.0) } else { (0.0, decay) };
    let h = &step.hyper;
    let t = step.step as f64;
    let bias1 = 1.0 - h[BETA1].powf(t);
    let bias2 = 1.0 - h[BETA2].powf(t);
    let mut c = [0.0; 16];
    c[0] = (-h[LR] / bias1) as f32;
    c[1] = coupled as f32;
    c[2] = (1.0 - h[LR] * decoupled) as f32;
    c[3] = (1.0 - h[BETA1]) as f32;
    c[4] = h[BETA2] as f32;
    c[5] = (1.0 - h[BETA2]) as f32;
    c[6] = bias2.sqrt() as f32;
    c[7] = h[EPS] as f32;
    // For the GPU, which works with fewer instructions: see kernels/rules/adam.cuh.
    let most = f64::from(f32::MAX);
    let scale = if is_coupled { 1.0 } else { step.grad_scale };
    c[8] = (-bias1 / (h[LR] * bias2.sqrt())).max(-most) as f32;
    c[9] = ((1.0 - h[BETA2]).sqrt() * scale) as f32;
    c[10] = if h[EPS] == 0.0 { 0.0 } else { (-bias1 / h[LR] * h[EPS]).max(-most) as f32 };
    let unit = (1.0 - h[BETA1]) / (1.0 - h[BETA2]).sqrt();
    c[11] = (h[BETA1] / unit) as f32;
    c[12] = h[BETA2].sqrt() as f32;
    c[13] = unit as f32;
    c[14] = (-bias1 / (h[LR] * bias2.sqrt()) / unit).max(-most) as f32;
    c[15] = if h[EPS] == 0.0 { 0.0 } else { (-bias1 / h[LR] * h[EPS] / unit).max(-most) as f32 };
    c
}

#[inline(always)]
fn update(c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
    let [negative_step, coupled, shrink, intake1, beta2, intake2, root_bias2, eps, ..] = *c;
    let g = g + coupled * *w;
    let m = s[0] + intake1 * (g - s[0]);
    let v = beta2 * s[1] + intake2 * g * g;
    s[0] = m;
    s[1] = v;
    *w = *w * shrink + negative_step * m / (v.sqrt() / root_bias2 + eps);
}

impl Rule for Adam {
    const INFO: RuleInfo = RuleInfo {
        name: c"adam",
        hyper: &[Hyper::lr(1e-3), Hyper::weight_decay(0.0), BETA1_SPEC, BETA2_SPEC, EPS_SPEC],
        states: STATES,
        flags: MAXIMIZE,
        cuda: "forge::Adam",
    };

    fn constants(step: &StepScalars, _flags: u32) -> Constants {
        constants(step, true)
    }

    #[inline(always)]
    fn update(c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        update(c, g, w, s);
    }
}

impl Rule for AdamW {
    const INFO: RuleInfo = RuleInfo {
        name: c"adamw",
        hyper: &[Hyper::lr(1e-3), Hyper::weight_decay(1e-2), BETA1_SPEC, BETA2_SPEC, EPS_SPEC],
        states: STATES,
        flags: MAXIMIZE,
        cuda: "forge::AdamW",
    };

    fn constants(step: &StepScalars, _flags: u32) -> Constants {
        constants(step, false)
    }

    #[inline(always)]
    fn update(c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        update(c, g, w, s);
    }
}
