//! Adam (Kingma & Ba, arXiv 1412.6980; decay added to the gradient) and AdamW (Loshchilov & Hutter,
//! arXiv 1711.05101; decay applied to the weight), with the order of operations of `torch.optim`.
//!
//! `m += (1−β₁)(g − m);  v = β₂v + (1−β₂)g²;  w −= η/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)`; with `amsgrad`
//! (Reddi et al., ICLR 2018) the largest v so far takes the place of v there.

use super::{
    AMSGRAD, BELOW_ONE, Constants, Hyper, LR, MAX_STATES, MAXIMIZE, Rule, RuleInfo, State,
    StepScalars, WEIGHT_DECAY,
};
use crate::format::StateKind;

const BETA1: usize = 2;
const BETA2: usize = 3;
const EPS: usize = 4;

const STATES: &[State] = &[
    State { name: c"exp_avg", kind: StateKind::Signed },
    State { name: c"exp_avg_sq", kind: StateKind::NonNegative },
    State { name: c"max_exp_avg_sq", kind: StateKind::NonNegative },
];

fn states(flags: u32) -> &'static [State] {
    if flags & AMSGRAD != 0 { STATES } else { &STATES[..2] }
}

const BETA1_SPEC: Hyper = Hyper::new(c"beta1", 0.9, 0.0, BELOW_ONE);
const BETA2_SPEC: Hyper = Hyper::new(c"beta2", 0.999, 0.0, BELOW_ONE);

pub(super) struct Adam;
pub(super) struct AdamW;

fn constants(step: &StepScalars, is_coupled: bool, flags: u32) -> Constants {
    let decay = step.hyper[WEIGHT_DECAY];
    let (coupled, decoupled) = if is_coupled { (decay, 0.0) } else { (0.0, decay) };
    let h = &step.hyper;
    let t = step.step as f64;
    let bias1 = 1.0 - h[BETA1].powf(t);
    let bias2 = 1.0 - h[BETA2].powf(t);
    let mut c = [0.0; 16];
    let most = f64::from(f32::MAX);
    // −η/(1−β₁ᵗ) goes into the divisor, and √(1−β₂) into what is squared: fewer instructions.
    let unit = (1.0 - h[BETA1]) / (1.0 - h[BETA2]).sqrt();
    let of_root = -bias1 / (h[LR] * bias2.sqrt());
    let of_eps = if h[EPS] == 0.0 { 0.0 } else { -bias1 / h[LR] * h[EPS] };
    let sign = if flags & MAXIMIZE != 0 { -1.0 } else { 1.0 };
    c[1] = coupled as f32;
    c[2] = (1.0 - h[LR] * decoupled) as f32;
    c[3] = (1.0 - h[BETA1]) as f32;
    c[4] = h[BETA2] as f32;
    c[5] = (1.0 - h[BETA2]).sqrt() as f32;
    c[8] = of_root.max(-most) as f32;
    c[10] = of_eps.max(-most) as f32;
    // For the GPU alone, which takes 8-bit states in units of its own: kernels/rules/adam.cuh.
    c[9] = ((1.0 - h[BETA2]).sqrt() * sign * step.grad_scale) as f32;
    c[11] = (h[BETA1] / unit) as f32;
    c[12] = h[BETA2].sqrt() as f32;
    c[13] = unit as f32;
    c[14] = (of_root / unit).max(-most) as f32;
    c[15] = (of_eps / unit).max(-most) as f32;
    c
}

#[inline(always)]
fn update(flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
    let [_, coupled, shrink, intake1, beta2, root_intake2, _, _, of_root, _, of_eps, ..] = *c;
    let g = coupled.mul_add(*w, g);
    let intake = g * root_intake2;
    s[0] = intake1.mul_add(g - s[0], s[0]);
    s[1] = intake.mul_add(intake, beta2 * s[1]);
    let mut square = s[1];
    if flags & AMSGRAD != 0 {
        s[2] = s[2].max(square);
        square = s[2];
    }
    *w = (*w).mul_add(shrink, s[0] / square.sqrt().mul_add(of_root, of_eps));
}

impl Rule for Adam {
    const INFO: RuleInfo = RuleInfo {
        name: c"adam",
        hyper: &[
            Hyper::lr(1e-3),
            Hyper::weight_decay(0.0),
            BETA1_SPEC,
            BETA2_SPEC,
            Hyper::eps(1e-8),
        ],
        states: STATES,
        flags: MAXIMIZE | AMSGRAD,
        cuda: "forge::Adam",
    };

    fn states(flags: u32) -> &'static [State] {
        states(flags)
    }

    fn constants(step: &StepScalars, flags: u32) -> Constants {
        constants(step, true, flags)
    }

    #[inline(always)]
    fn update(flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        update(flags, c, g, w, s);
    }
}

impl Rule for AdamW {
    const INFO: RuleInfo = RuleInfo {
        name: c"adamw",
        hyper: &[
            Hyper::lr(1e-3),
            Hyper::weight_decay(1e-2),
            BETA1_SPEC,
            BETA2_SPEC,
            Hyper::eps(1e-8),
        ],
        states: STATES,
        flags: MAXIMIZE | AMSGRAD,
        cuda: "forge::AdamW",
    };

    fn states(flags: u32) -> &'static [State] {
        states(flags)
    }

    fn constants(step: &StepScalars, flags: u32) -> Constants {
        constants(step, false, flags)
    }

    #[inline(always)]
    fn update(flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        update(flags, c, g, w, s);
    }
}
