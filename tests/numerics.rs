//! Against fp64: rules, stochastic rounding through an update, dgrad, bias, norms, non-finite tiles.

mod common;

use common::*;
use forge::backend::{Backend, Image, Norm, NormMethod};
use forge::format::{Dtype, bf16};
use forge::linear::Parallel;
use forge::rule;
use forge::rule::StepScalars;

/// One element of each rule, straight from its definition, in fp64. `s`: its states, and behind them
/// what torch keeps besides (NAdam's product of μ).
fn reference(name: &str, flags: u32, scalars: &StepScalars, g: f64, w: &mut f64, s: &mut [f64; 4]) {
    let h = &scalars.hyper;
    let (lr, decay, t) = (h[0], h[1], scalars.step as i32);
    let has = |flag: u32| flags & flag != 0;
    let mut g = g * scalars.grad_scale * if has(rule::MAXIMIZE) { -1.0 } else { 1.0 };
    let decoupled = ["adamw", "lion", "signum", "ademamix"].contains(&name) || has(rule::DECOUPLED);
    if decoupled {
        *w -= lr * decay * *w;
    } else {
        g += decay * *w;
    }
    let average = |beta: f64, old: f64, new: f64| beta * old + (1.0 - beta) * new;
    let sign = |x: f64| if x == 0.0 { 0.0 } else { x.signum() };
    match name {
        "sgd" => {
            if !has(rule::MOMENTUM) {
                *w -= lr * g;
                return;
            }
            s[0] = if t == 1 { g } else { h[2] * s[0] + (1.0 - h[3]) * g };
            *w -= lr * if has(rule::NESTEROV) { g + h[2] * s[0] } else { s[0] };
        }
        "lion" => {
            *w -= lr * sign(average(h[2], s[0], g));
            s[0] = average(h[3], s[0], g);
        }
        "signum" => {
            s[0] = average(h[2], s[0], g);
            *w -= lr * sign(s[0]);
        }
        "adam" | "adamw" => {
            s[0] = average(h[2], s[0], g);
            s[1] = average(h[3], s[1], g * g);
            s[2] = s[2].max(s[1]);
            let square = if has(rule::AMSGRAD) { s[2] } else { s[1] };
            let v_hat = square / (1.0 - h[3].powi(t));
            *w -= lr * (s[0] / (1.0 - h[2].powi(t))) / (v_hat.sqrt() + h[4]);
        }
        "adamax" => {
            s[0] = average(h[2], s[0], g);
            s[1] = (h[3] * s[1]).max(g.abs() + h[4]);
            *w -= lr / (1.0 - h[2].powi(t)) * s[0] / s[1];
        }
        "nadam" => {
            let mu = |t: i32| h[2] * (1.0 - 0.5 * 0.96f64.powf(f64::from(t) * h[5]));
            s[3] = mu(t) * if t == 1 { 1.0 } else { s[3] };
            s[0] = average(h[2], s[0], g);
            s[1] = average(h[3], s[1], g * g);
            let divisor = (s[1] / (1.0 - h[3].powi(t))).sqrt() + h[4];
            *w -= lr * (1.0 - mu(t)) / (1.0 - s[3]) * g / divisor;
            *w -= lr * mu(t + 1) / (1.0 - s[3] * mu(t + 1)) * s[0] / divisor;
        }
        "radam" => {
            s[0] = average(h[2], s[0], g);
            s[1] = average(h[3], s[1], g * g);
            let m_hat = s[0] / (1.0 - h[2].powi(t));
            let bias2 = 1.0 - h[3].powi(t);
            let limit = 2.0 / (1.0 - h[3]) - 1.0;
            let rho = limit - 2.0 * f64::from(t) * h[3].powi(t) / bias2;
            if rho > 5.0 {
                let above = (rho - 4.0) * (rho - 2.0) * limit;
                let below = (limit - 4.0) * (limit - 2.0) * rho;
                *w -= lr * m_hat * (above / below).sqrt() * bias2.sqrt() / (s[1].sqrt() + h[4]);
            } else {
                *w -= lr * m_hat;
            }
        }
        "ademamix" => {
            let done = (f64::from(t) / h[7]).min(1.0);
            let (alpha, first, last) = (h[6] * done, h[2].ln(), h[4].ln());
            let beta3 = (first * last / ((1.0 - done) * last + done * first)).exp().min(h[4]);
            s[0] = average(h[2], s[0], g);
            s[1] = average(h[3], s[1], g * g);
            s[2] = average(beta3, s[2], g);
            let v_hat = s[1] / (1.0 - h[3].powi(t));
            *w -= lr * (s[0] / (1.0 - h[2].powi(t)) + alpha * s[2]) / (v_hat.sqrt() + h[5]);
        }
        "rmsprop" => {
            s[0] = average(h[2], s[0], g * g);
            s[2] = average(h[2], s[2], g);
            let variance = if has(rule::CENTERED) { s[0] - s[2] * s[2] } else { s[0] };
            let step = g / (variance.max(0.0).sqrt() + h[3]);
            s[1] = if has(rule::MOMENTUM) { h[4] * s[1] } else { 0.0 } + step;
            *w -= lr * s[1];
        }
        "adagrad" => {
            s[0] += g * g + if t == 1 { h[3] } else { 0.0 };
            *w -= lr / (1.0 + f64::from(t - 1) * h[2]) * g / (s[0].sqrt() + h[4]);
        }
        "adadelta" => {
            s[0] = average(h[2], s[0], g * g);
            let delta = (s[1] + h[3]).sqrt() / (s[0] + h[3]).sqrt() * g;
            s[1] = average(h[2], s[1], delta * delta);
            *w -= lr * delta;
        }
        "rprop" => {
            let size = if t == 1 { lr } else { s[1] };
            let kept = sign(g) * sign(s[0]);
            let factor = if kept > 0.0 {
                h[3]
            } else if kept < 0.0 {
                h[2]
            } else {
                1.0
            };
            s[1] = (size * factor).clamp(h[4], h[5]);
            s[0] = if kept < 0.0 { 0.0 } else { g };
            *w -= s[1] * sign(s[0]);
        }
        "asgd" => {
            let eta = lr / (1.0 + h[2] * lr * f64::from(t - 1)).powf(h[3]);
            *w = *w * (1.0 - h[2] * eta) - eta * g;
            s[0] += (*w - s[0]) / (f64::from(t - 1) - h[4]).max(1.0);
        }
        _ => panic!("no definition of {name}"),
    }
}

fn f64_gradient(segments: &[Segment]) -> Vec<f64> {
    let (out, inn) = (segments[0].out, segments[0].inn);
    let mut g = vec![0f64; out * inn];
    for s in segments {
        let decode = |bytes: &[u8]| -> Vec<f64> {
            bytes
                .chunks_exact(s.dtype.bytes())
                .map(|b| match s.dtype {
                    Dtype::F32 => f64::from(f32::from_ne_bytes(b.try_into().unwrap())),
                    Dtype::Bf16 => {
                        f64::from(half::bf16::from_bits(u16::from_ne_bytes([b[0], b[1]])))
                    }
                    _ => f64::from(half::f16::from_bits(u16::from_ne_bytes([b[0], b[1]]))),
                })
                .collect()
        };
        let (dy, x) = (decode(&s.dy), decode(&s.x));
        for t in 0..s.tokens {
            for o in 0..out {
                for i in 0..inn {
                    g[o * inn + i] += dy[t * out + o] * x[t * inn + i];
                }
            }
        }
    }
    g
}

#[test]
fn every_rule_follows_fp64_over_50_steps() {
    let (out, inn) = (13, 29);
    let cpu = cpu(1);
    for (name, flags) in rules() {
        let scheme = scheme(name, flags, WEIGHTS[0], STATES[0], Dtype::F32);
        let mut r = Random(77);
        let mut p = Parameter::random(&mut r, scheme, &cpu, out, inn);
        let mut w: Vec<f64> = p.export(Image::Weight).iter().map(|v| f64::from(*v)).collect();
        let mut states = vec![[0f64; 4]; w.len()];
        for step in 1..=50 {
            let s = scalars(name, step);
            let segments = [Segment::random(&mut r, 19, out, inn, Dtype::F32)];
            p.update(&factors(&segments), None, &s);
            let g = f64_gradient(&segments);
            for k in 0..w.len() {
                reference(name, flags, &s, g[k], &mut w[k], &mut states[k]);
            }
        }
        let got = p.export(Image::Weight);
        let scale = w.iter().fold(1.0f64, |a, b| a.max(b.abs()));
        let mut worst = 0f64;
        for (a, b) in got.iter().zip(&w) {
            worst = worst.max((f64::from(*a) - b).abs() / scale);
        }
        // 50 steps of a few roundings each: 50 · 4 · 2⁻²⁴ = 1.2e-5 at the very most. A sign of Lion
        // may flip where its argument is within rounding of zero; none does with this seed.
        assert!(worst < 1.2e-5, "{name} {flags:#x}: {worst:e}");
        println!("{name} {flags:#x}: worst relative difference to fp64 {worst:.2e}");
    }
}

#[test]
fn stochastic_weights_are_neighbours_and_unbiased_over_100000_draws() {
    // One update of 100,000 equal elements: SGD with one token, dY = 1, X = 1.
    let (out, inn) = (100, 1000);
    let cpu = cpu(2);
    let scheme = scheme("sgd", 0, WEIGHTS[2], STATES[0], Dtype::F32);
    for start in [1.0f32, -0.7421875, 3.0517578e-5, 1e-39] {
        let mut p = Parameter::new(scheme, &cpu, out, inn, (Parallel::None, 0, 1));
        p.import_weight(&vec![start; out * inn]);
        let mut s = scalars("sgd", 1);
        s.hyper[0] = f64::from(start) * 0.00123;
        s.hyper[1] = 0.0;
        s.hyper[0] = s.hyper[0].abs();
        s.grad_scale = 1.0;
        let segment = Segment {
            dy: encode(Dtype::F32, &vec![1.0; out]),
            x: encode(Dtype::F32, &vec![1.0; inn]),
            tokens: 1,
            out,
            inn,
            dtype: Dtype::F32,
        };
        p.update(&[segment.factors()], None, &s);
        let stored_start = f32::from_bits(u32::from(bf16::nearest(start)) << 16);
        let exact = stored_start + -(s.hyper[0] as f32) * 1.0;
        let down = f32::from_bits(exact.to_bits() & 0xFFFF_0000);
        let up = f32::from_bits((exact.to_bits() & 0xFFFF_0000).wrapping_add(0x1_0000));
        let values = p.export(Image::Weight);
        assert!(values.iter().all(|v| *v == down || *v == up), "{exact} {down} {up}");
        let n = values.len() as f64;
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
        let probability = (f64::from(exact) - f64::from(down)) / (f64::from(up) - f64::from(down));
        let deviation = (probability * (1.0 - probability) / n).sqrt()
            * (f64::from(up) - f64::from(down)).abs();
        let error = (mean - f64::from(exact)).abs();
        assert!(error <= 4.0 * deviation, "{start}: {error:e} > 4 x {deviation:e}");
        assert!(probability > 0.01 && probability < 0.99, "the case must need rounding");
    }
}

#[test]
fn dgrad_and_bias_follow_fp64() {
    let cpu = cpu(2);
    for (dtype, tolerance) in [(Dtype::F32, 1e-5), (Dtype::Bf16, 8e-3), (Dtype::F16, 1e-3)] {
        for (tokens, out, inn) in [(1, 1, 1), (37, 300, 53), (523, 17, 600), (0, 4, 4)] {
            let weight = if dtype == Dtype::F32 { WEIGHTS[0] } else { WEIGHTS[1] };
            let scheme = scheme("sgd", 0, weight, STATES[0], dtype);
            let mut r = Random(4);
            let mut p = Parameter::random(&mut r, scheme, &cpu, out, inn);
            let w = p.export(Image::Weight);
            let dy_values = r.vector(tokens * out);
            let dy = encode(dtype, &dy_values);
            let mut dx = vec![0xAAu8; tokens * inn * dtype.bytes()];
            let mut dbias = vec![0xAAu8; out * dtype.bytes()];
            let arrays = p.arrays();
            let m = forge::backend::Matrix { data: dy.as_ptr(), stride: out };
            // SAFETY: sizes by construction.
            unsafe {
                let stream = forge::backend::Stream::NULL;
                p.linear.dgrad(tokens, m, arrays.weight, dx.as_mut_ptr(), stream).unwrap();
                let shard = &p.linear.shape.shard;
                cpu.bias_grad(&scheme, shard, tokens, m, dbias.as_mut_ptr(), stream).unwrap();
            }
            let decode = |b: &[u8]| match dtype {
                Dtype::F32 => f64::from(f32::from_ne_bytes(b.try_into().unwrap())),
                Dtype::Bf16 => f64::from(half::bf16::from_bits(u16::from_ne_bytes([b[0], b[1]]))),
                _ => f64::from(half::f16::from_bits(u16::from_ne_bytes([b[0], b[1]]))),
            };
            let dy: Vec<f64> = dy.chunks_exact(dtype.bytes()).map(decode).collect();
            for t in 0..tokens {
                for i in 0..inn {
                    let exact: f64 =
                        (0..out).map(|o| dy[t * out + o] * f64::from(w[o * inn + i])).sum();
                    let at = (t * inn + i) * dtype.bytes();
                    let got = decode(&dx[at..at + dtype.bytes()]);
                    assert!(
                        (got - exact).abs() <= tolerance * (1.0 + exact.abs()),
                        "{got} {exact}"
                    );
                }
            }
            for o in 0..out {
                let exact: f64 = (0..tokens).map(|t| dy[t * out + o]).sum();
                let got = decode(&dbias[o * dtype.bytes()..(o + 1) * dtype.bytes()]);
                assert!((got - exact).abs() <= tolerance * (1.0 + exact.abs()), "{got} {exact}");
            }
        }
    }
}

fn norm(p: &Parameter, segments: &[Segment], method: NormMethod) -> Norm {
    p.norm(&factors(segments), method)
}

fn parameter(out: usize, inn: usize, dtype: Dtype) -> Parameter {
    let scheme = scheme("adamw", 0, WEIGHTS[0], STATES[0], dtype);
    Parameter::new(scheme, &cpu(2), out, inn, (Parallel::None, 0, 1))
}

#[test]
fn both_norms_agree_with_fp64() {
    for (out, inn, tokens) in [
        (1, 1, vec![1]),
        (40, 70, vec![20, 300, 1]),
        (200, 130, vec![64, 64]),
        (129, 31, vec![600]),
    ] {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let mut r = Random(8);
            let p = parameter(out, inn, dtype);
            let segments: Vec<_> =
                tokens.iter().map(|t| Segment::random(&mut r, *t, out, inn, dtype)).collect();
            let exact: f64 = f64_gradient(&segments).iter().map(|g| g * g).sum();
            for method in [NormMethod::Gram, NormMethod::Tiles, NormMethod::Auto] {
                let n = norm(&p, &segments, method);
                let error = (n.sum_of_squares.sqrt() / exact.sqrt() - 1.0).abs();
                assert!(error < 1e-5, "{out}x{inn} {tokens:?} {method:?}: {error:e}");
                if method == NormMethod::Tiles {
                    assert_eq!(n.method, NormMethod::Tiles);
                }
            }
        }
    }
}

#[test]
fn the_chooser_takes_the_cheaper_norm() {
    let mut r = Random(2);
    let p = parameter(300, 300, Dtype::F32);
    let few = [Segment::random(&mut r, 50, 300, 300, Dtype::F32)];
    let many = [Segment::random(&mut r, 900, 300, 300, Dtype::F32)];
    assert_eq!(norm(&p, &few, NormMethod::Auto).method, NormMethod::Gram);
    assert_eq!(norm(&p, &many, NormMethod::Auto).method, NormMethod::Tiles);
}

#[test]
fn under_cancellation_the_gram_norm_hands_over() {
    // Token pairs whose outer products cancel but for a small remainder: the Gram sum is a
    // difference of numbers 1e4 to 1e8 times as large.
    for remainder in [1e-2f32, 1e-3, 1e-4] {
        let (out, inn, pairs) = (120, 150, 40);
        let mut r = Random(6);
        let (mut dy, mut x) = (Vec::new(), Vec::new());
        for _ in 0..pairs {
            let (y, v) = (r.vector(out), r.vector(inn));
            let noise = r.vector(out);
            dy.extend(&y);
            dy.extend(y.iter().zip(&noise).map(|(a, e)| -a + remainder * e));
            x.extend(&v);
            x.extend(&v);
        }
        let (dy, x) = (encode(Dtype::F32, &dy), encode(Dtype::F32, &x));
        let segments = [Segment { dy, x, tokens: 2 * pairs, out, inn, dtype: Dtype::F32 }];
        let p = parameter(out, inn, Dtype::F32);
        assert!(forge::backend::cpu::gram_is_cheaper(&p.linear.shape.shard, 2 * pairs));
        let exact: f64 = f64_gradient(&segments).iter().map(|g| g * g).sum();
        for method in [NormMethod::Auto, NormMethod::Gram] {
            let n = norm(&p, &segments, method);
            assert_eq!(n.method, NormMethod::Tiles, "remainder {remainder}");
            let error = (n.sum_of_squares / exact).sqrt() - 1.0;
            assert!(error.abs() < 2e-4, "remainder {remainder}: {error:e}");
        }
    }
}

#[test]
fn norms_say_when_something_is_not_finite() {
    let (out, inn, tokens) = (50, 60, 20);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for method in [NormMethod::Gram, NormMethod::Tiles, NormMethod::Auto] {
            let mut r = Random(1);
            let mut values = r.vector(tokens * out);
            values[777] = bad;
            let dy = encode(Dtype::F32, &values);
            let x = encode(Dtype::F32, &r.vector(tokens * inn));
            let segments = [Segment { dy, x, tokens, out, inn, dtype: Dtype::F32 }];
            let n = norm(&parameter(out, inn, Dtype::F32), &segments, method);
            assert!(!n.sum_of_squares.is_finite(), "{bad} {method:?}");
        }
    }
    // Finite factors whose product overflows.
    let dy = encode(Dtype::F32, &vec![1e30; tokens * out]);
    let x = encode(Dtype::F32, &vec![1e30; tokens * inn]);
    let segments = [Segment { dy, x, tokens, out, inn, dtype: Dtype::F32 }];
    for method in [NormMethod::Gram, NormMethod::Tiles] {
        let n = norm(&parameter(out, inn, Dtype::F32), &segments, method);
        assert!(!n.sum_of_squares.is_finite(), "{method:?}");
    }
    // Factors whose Gram matrices overflow though dW is small.
    let dy = encode(Dtype::F32, &vec![1e25; tokens * out]);
    let x = encode(Dtype::F32, &vec![1e-25; tokens * inn]);
    let segments = [Segment { dy, x, tokens, out, inn, dtype: Dtype::F32 }];
    let n = norm(&parameter(out, inn, Dtype::F32), &segments, NormMethod::Gram);
    let exact = (tokens * tokens * out * inn) as f64;
    assert!((n.sum_of_squares / exact - 1.0).abs() < 1e-5);
}

#[test]
fn a_non_finite_tile_is_skipped_counted_and_nothing_else() {
    // Two tiles of rows; one bad dY entry in the second.
    let (out, inn, tokens) = (1024, 256, 8);
    let cpu = cpu(2);
    let scheme = scheme("adamw", 0, WEIGHTS[0], STATES[0], Dtype::F32);
    let mut r = Random(12);
    let mut p = Parameter::random(&mut r, scheme, &cpu, out, inn);
    let start = p.export(Image::Weight);
    let mut dy = r.vector(tokens * out);
    dy[3 * out + 1000] = f32::NAN;
    let x = encode(Dtype::F32, &r.vector(tokens * inn));
    let dy = encode(Dtype::F32, &dy);
    let segment = Segment { dy, x, tokens, out, inn, dtype: Dtype::F32 };
    let arrays = p.arrays();
    let report = p.report(&[segment.factors()], None, &arrays, &scalars("adamw", 1));
    assert!(report.tiles > report.nonfinite_tiles && report.nonfinite_tiles == 1);
    let end = p.export(Image::Weight);
    assert!(end.iter().all(|w| w.is_finite()));
    assert_eq!(end[1000 * inn..1001 * inn], start[1000 * inn..1001 * inn]);
    assert_ne!(end[..inn], start[..inn]);
    // A scale that overflows what was finite is the same.
    let segment = Segment::random(&mut r, tokens, out, inn, Dtype::F32);
    let mut s = scalars("adamw", 1);
    s.grad_scale = 3e38;
    let report = p.report(&[segment.factors()], None, &arrays, &s);
    assert_eq!(report.nonfinite_tiles, report.tiles);
    assert_eq!(p.export(Image::Weight), end);
}

#[test]
fn zero_tokens_decay_as_a_zero_gradient() {
    let cpu = cpu(1);
    let scheme = scheme("adamw", 0, WEIGHTS[0], STATES[0], Dtype::F32);
    let mut r = Random(1);
    let mut p = Parameter::random(&mut r, scheme, &cpu, 5, 6);
    let start = p.export(Image::Weight);
    let s = scalars("adamw", 1);
    p.update(&[], None, &s);
    let shrink = (1.0 - s.hyper[0] * s.hyper[1]) as f32;
    for (end, start) in p.export(Image::Weight).iter().zip(&start) {
        assert_eq!(*end, start * shrink);
    }
}

#[test]
fn q8_training_stays_finite_on_adversarial_gradients() {
    let (out, inn) = (8, 300);
    let cpu = cpu(1);
    for state in [STATES[3], STATES[4]] {
        for (name, flags) in rules() {
            let scheme = scheme(name, flags, WEIGHTS[0], state, Dtype::F32);
            let mut r = Random(31);
            let mut p = Parameter::random(&mut r, scheme, &cpu, out, inn);
            let magnitudes = [0.0f32, 1e-45, 1e-38, 1e-20, 1.0, 1e18];
            for step in 1..=40 {
                let dy = encode(Dtype::F32, &vec![1.0; out]);
                let x: Vec<f32> =
                    (0..inn).map(|_| magnitudes[(r.bits() % 6) as usize] * r.uniform()).collect();
                let x = encode(Dtype::F32, &x);
                let segment = Segment { dy, x, tokens: 1, out, inn, dtype: Dtype::F32 };
                p.update(&[segment.factors()], None, &scalars(name, step));
            }
            assert!(p.export(Image::Weight).iter().all(|w| w.is_finite()), "{name} {state:?}");
            for k in 0..scheme.n_states {
                assert!(p.export(Image::State(k)).iter().all(|s| s.is_finite()), "{name}");
            }
        }
    }
}

#[test]
fn states_that_did_not_begin_at_the_first_step_begin_later() {
    // A tile that was not finite at step 1 keeps states of zeros.
    for (name, index, value) in [("rprop", 0, 0.01), ("adagrad", 3, 0.5)] {
        let rule = rule::find(name).unwrap();
        let mut s = scalars(name, 2);
        s.hyper[1] = 0.0;
        s.hyper[index] = value;
        let constants = rule.constants(&s, 0);
        let (mut w, mut state0, mut state1) = ([1.0f32], [0.0f32], [0.0f32]);
        let states = [&mut state0[..], &mut state1[..], &mut [0.0f32][..]];
        rule.apply(0, &constants, rule::Run { g: &[2.0], w: &mut w, s: states });
        match name {
            "rprop" => assert_eq!((state1[0], w[0]), (0.01, 0.99)),
            _ => assert_eq!(state0[0], 4.5),
        }
    }
}

#[test]
fn radam_before_its_rectification_does_not_look_at_the_second_moment() {
    let rule = rule::find("radam").unwrap();
    let mut s = scalars("radam", 1);
    s.hyper[1] = 0.0;
    let (mut w, mut m, mut v) = ([1.0f32], [0.0f32], [0.0f32]);
    let states = [&mut m[..], &mut v[..], &mut [0.0f32][..]];
    // Its square overflows.
    rule.apply(0, &rule.constants(&s, 0), rule::Run { g: &[1e21], w: &mut w, s: states });
    assert!(v[0].is_infinite() && w[0].is_finite() && w[0] < -1e18, "{} {}", v[0], w[0]);
}
