//! The emulated kernels against the CPU backend.

use crate::check::{Outcome, on_cpu};
use crate::memory::{Guarded, Memory};
use forge::backend::Scheme;
use forge::format::{StateFormat, WeightFormat};

/// The emulated update against the CPU backend's, with the same gradient and the same draws.
pub fn assert_near_cpu(what: &str, scheme: &Scheme, o: &Outcome) {
    let mut theirs = o.before.clone();
    on_cpu(scheme, &o.shard, &mut theirs, &o.gradient, &o.step);
    let (ours, theirs) = (&o.after, &theirs);
    match scheme.weight_format {
        WeightFormat::F32 => near(what, &ours.weight.f32(), &theirs.weight.f32()),
        WeightFormat::Bf16 => few_flips(what, &monotone(&ours.weight), &monotone(&theirs.weight)),
        WeightFormat::Bf16F32 => near(what, &ours.extra.f32(), &theirs.extra.f32()),
        WeightFormat::Bf16Low16 => {
            let join = |m: &Memory| -> Vec<f32> {
                let halves = m.weight.u16().into_iter().zip(m.extra.u16());
                halves.map(|(u, l)| join_halves(u, l)).collect()
            };
            near(what, &join(ours), &join(theirs));
        }
    }
    for k in 0..scheme.n_states {
        let what = format!("{what}: state {k}");
        let (a, b) = (&ours.states[k], &theirs.states[k]);
        match scheme.state_formats[k] {
            StateFormat::F32 => near(&what, &a.f32(), &b.f32()),
            StateFormat::Bf16 => few_flips(&what, &monotone(a), &monotone(b)),
            StateFormat::Q8 => {
                let codes =
                    |m: &Guarded| m.bytes().iter().map(|b| i32::from(*b)).collect::<Vec<_>>();
                few_flips(&what, &codes(a), &codes(b));
                near(&what, &ours.scales[k].f32(), &theirs.scales[k].f32());
            }
        }
    }
}

/// An fp32 from a bf16 that was rounded to nearest and the 16 bits below it.
fn join_halves(upper: u16, lower: u16) -> f32 {
    let both = u32::from(upper) << 16 | u32::from(lower);
    f32::from_bits(both.wrapping_sub((both & 0x8000) << 1))
}

/// bf16 bits as integers in the order of their values.
fn monotone(memory: &Guarded) -> Vec<i32> {
    let of = |bits: u16| {
        let magnitude = i32::from(bits & 0x7FFF);
        if bits & 0x8000 == 0 { magnitude } else { -magnitude }
    };
    memory.u16().into_iter().map(of).collect()
}

/// Within a few roundings of numbers of the array's size.
pub fn near(what: &str, ours: &[f32], theirs: &[f32]) {
    let square = |x: &f32| f64::from(*x) * f64::from(*x);
    let size = (theirs.iter().map(square).sum::<f64>() / theirs.len() as f64).sqrt();
    for (k, (a, b)) in ours.iter().zip(theirs).enumerate() {
        let bound = 2f64.powi(-19) * (size + f64::from(b.abs()));
        let error = (f64::from(*a) - f64::from(*b)).abs();
        assert!(error <= bound, "{what}: [{k}] is {a}, the CPU's {b}; bound {bound}");
    }
}

/// Neighbours at most, and few: where fp32 results lie on a rounding's edge.
fn few_flips(what: &str, ours: &[i32], theirs: &[i32]) {
    let differences = || ours.iter().zip(theirs).map(|(a, b)| (a - b).unsigned_abs());
    let (most, sum) = (differences().max().unwrap_or(0), differences().sum::<u32>());
    assert!(most <= 1, "{what}: differ by {most}");
    assert!(f64::from(sum) <= 3.0 + 0.01 * ours.len() as f64, "{what}: {sum} of {}", ours.len());
}
