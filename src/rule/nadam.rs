//! NAdam (Dozat, "Incorporating Nesterov momentum into Adam", 2016), as `torch.optim.NAdam`: decay
//! added to the gradient, or with `decoupled_weight_decay` applied to the weight.
//!
//! `μₜ = β₁(1 − ½·0.96^(tψ));  m += (1−β₁)(g − m);  v = β₂v + (1−β₂)g²;  d = √(v/(1−β₂ᵗ)) + ε;`
//! `w −= η(1−μₜ)/(1−Πμ) · g/d + ημₜ₊₁/(1−Πμ·μₜ₊₁) · m/d`

use super::{
    BELOW_ONE, Constants, DECOUPLED, Hyper, LR, MAX_STATES, MAXIMIZE, Rule, RuleInfo, State,
    StepScalars, WEIGHT_DECAY,
};
use crate::format::StateKind;

const BETA1: usize = 2;
const BETA2: usize = 3;
const EPS: usize = 4;
const MOMENTUM_DECAY: usize = 5;

/// What μ of a step lacks to β₁, as a share of it.
fn lack(h: &[f64], step: f64) -> f64 {
    0.5 * 0.96f64.powf(step * h[MOMENTUM_DECAY])
}

/// μ of a step.
fn mu(h: &[f64], step: f64) -> f64 {
    h[BETA1] * (1.0 - lack(h, step))
}

/// The product of all μ so far. torch keeps it as a running product; it is the same as long as β₁ and
/// ψ do not change.
fn mu_product(h: &[f64], step: u64) -> f64 {
    let mut product = 1.0;
    for t in 1..=step {
        // From here on μ is β₁.
        if lack(h, t as f64) < 1e-17 {
            return product * h[BETA1].powf((step - t + 1) as f64);
        }
        product *= mu(h, t as f64);
        // What follows changes 1 − product no more.
        if product < 1e-20 {
            break;
        }
    }
    product
}

pub(super) struct NAdam;

impl Rule for NAdam {
    const INFO: RuleInfo = RuleInfo {
        name: c"nadam",
        hyper: &[
            Hyper::lr(2e-3),
            Hyper::weight_decay(0.0),
            Hyper::new(c"beta1", 0.9, 0.0, BELOW_ONE),
            Hyper::new(c"beta2", 0.999, 0.0, BELOW_ONE),
            Hyper::eps(1e-8),
            Hyper::new(c"momentum_decay", 4e-3, 0.0, f32::MAX as f64),
        ],
        states: &[
            State { name: c"exp_avg", kind: StateKind::Signed },
            State { name: c"exp_avg_sq", kind: StateKind::NonNegative },
        ],
        flags: MAXIMIZE | DECOUPLED,
        cuda: "forge::NAdam",
    };

    fn constants(step: &StepScalars, flags: u32) -> Constants {
        let h = &step.hyper;
        let t = step.step as f64;
        let decoupled = flags & DECOUPLED != 0;
        let (now, next) = (mu(h, t), mu(h, t + 1.0));
        let product = mu_product(h, step.step);
        let mut c = [0.0; 16];
        c[0] = (-h[LR] * (1.0 - now) / (1.0 - product)) as f32;
        c[1] = if decoupled { 0.0 } else { h[WEIGHT_DECAY] as f32 };
        c[2] = if decoupled { (1.0 - h[LR] * h[WEIGHT_DECAY]) as f32 } else { 1.0 };
        c[3] = (1.0 - h[BETA1]) as f32;
        c[4] = h[BETA2] as f32;
        c[5] = (1.0 - h[BETA2]) as f32;
        c[6] = (1.0 / (1.0 - h[BETA2].powf(t)).sqrt()) as f32;
        c[7] = h[EPS] as f32;
        c[8] = (-h[LR] * next / (1.0 - product * next)) as f32;
        c
    }

    #[inline(always)]
    fn update(_flags: u32, c: &Constants, g: f32, w: &mut f32, s: &mut [f32; MAX_STATES]) {
        let [of_g, coupled, shrink, intake1, beta2, intake2, unbias, eps, of_m, ..] = *c;
        let g = coupled.mul_add(*w, g);
        s[0] = intake1.mul_add(g - s[0], s[0]);
        s[1] = (intake2 * g).mul_add(g, beta2 * s[1]);
        let divisor = s[1].sqrt().mul_add(unbias, eps);
        *w = (*w).mul_add(shrink, of_m.mul_add(s[0], of_g * g) / divisor);
    }
}
