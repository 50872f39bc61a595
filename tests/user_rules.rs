//! Rules that the caller defines: as the built-in ones, bit for bit, in every format; and what happens
//! when their functions fail or are not there.

mod common;

use common::*;
use forge::backend::{Backend, Deliver, StepSource, Stream};
use forge::error::forge_status;
use forge::format::{Dtype, StateKind};
use forge::linear::Parallel;
use forge::rule::user::{
    CpuFunction, Definition, Function, HyperDefinition, forge_rule_tile, register,
};
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};

fn define(name: &str, states: &[&str], function: Option<Function>, user: *mut c_void) {
    let hyper =
        [("lr", 1e-3), ("weight_decay", 1e-2), ("beta1", 0.9), ("beta2", 0.999), ("eps", 1e-8)]
            .map(|(name, default)| HyperDefinition {
                name: name.into(),
                default,
                least: 0.0,
                most: 1e9,
            });
    let kinds = [StateKind::Signed, StateKind::NonNegative, StateKind::Signed];
    register(Definition {
        name: name.into(),
        hyper: hyper.to_vec(),
        states: states.iter().zip(kinds).map(|(name, kind)| (name.to_string(), kind)).collect(),
        per_step: vec![],
        cuda: function.is_none().then(|| "w -= lr * g;".into()),
        cpu: function.map(|function| CpuFunction { function, user }),
    })
    .unwrap();
}

/// AdamW in the order of operations of src/rule/adam.rs.
unsafe extern "C" fn adamw(_user: *mut c_void, tile: *const forge_rule_tile) -> i32 {
    // SAFETY: the library passes a tile of `count` elements and the five hyper-parameters of `define`.
    unsafe {
        let tile = &*tile;
        let &[lr, decay, beta1, beta2, eps] = &*tile.hyper.cast::<[f64; 5]>();
        let bias = |beta: f64| 1.0 - beta.powf(tile.step as f64);
        let of_root = (-bias(beta1) / (lr * bias(beta2).sqrt())) as f32;
        let (of_eps, shrink) = ((-bias(beta1) / lr * eps) as f32, (1.0 - lr * decay) as f32);
        let (intake1, keep2, intake2) =
            ((1.0 - beta1) as f32, beta2 as f32, (1.0 - beta2).sqrt() as f32);
        for i in 0..tile.count as usize {
            let (g, w) = (*tile.g.add(i), tile.w.add(i));
            let (m, v) = (tile.states[0].add(i), tile.states[1].add(i));
            *m = intake1.mul_add(g - *m, *m);
            *v = (g * intake2).mul_add(g * intake2, keep2 * *v);
            *w = (*w).mul_add(shrink, *m / (*v).sqrt().mul_add(of_root, of_eps));
        }
    }
    0
}

#[test]
fn a_rule_of_ones_own_is_the_built_in_one_bit_for_bit_in_every_format() {
    define("my_adamw", &["exp_avg", "exp_avg_sq"], Some(adamw), null_mut());
    let cpu = cpu(2);
    let mut r = Random(5);
    for weight in WEIGHTS {
        for state in STATES {
            for (out, inn) in [(1, 1), (7, 129), (61, 257), (600, 530)] {
                let schemes = ["adamw", "my_adamw"]
                    .map(|name| scheme(name, forge::rule::MAXIMIZE, weight, state, Dtype::Bf16));
                let start = r.vector(out * inn);
                let mut parameters = schemes.map(|scheme| {
                    cpu.check_scheme(&scheme).unwrap();
                    let mut p = Parameter::new(scheme, &cpu, out, inn, (Parallel::None, 0, 1));
                    p.import_weight(&start);
                    p
                });
                for step in 1..=3 {
                    let segments =
                        [5, 40].map(|t| Segment::random(&mut r, t, out, inn, Dtype::Bf16));
                    let mut s = scalars("adamw", step);
                    s.grad_scale = 0.7;
                    for p in &mut parameters {
                        p.update(&factors(&segments), None, &s);
                    }
                }
                let [built_in, own] = &parameters;
                assert!(built_in.bytes() == own.bytes(), "{weight:?} {state:?} {out}x{inn}");
            }
        }
    }
}

#[test]
fn a_rule_without_the_half_that_a_backend_needs_is_refused() {
    define("gpu_only", &[], None, null_mut());
    let scheme = scheme("gpu_only", 0, WEIGHTS[0], STATES[0], Dtype::F32);
    let error = cpu(1).check_scheme(&scheme).unwrap_err();
    assert_eq!(error.status, forge_status::FORGE_ERROR_RULE);
    assert!(error.message.contains("'gpu_only' has CUDA source and no CPU function"), "{error}");
}

/// Fails from the second call on.
unsafe extern "C" fn fails(calls: *mut c_void, tile: *const forge_rule_tile) -> i32 {
    // SAFETY: `user` is the counter of the test, the tile is the library's.
    unsafe {
        if (*calls.cast::<AtomicU64>()).fetch_add(1, Ordering::Relaxed) > 0 {
            return 42;
        }
        for i in 0..(*tile).count as usize {
            *(*tile).w.add(i) = 1.0;
        }
    }
    0
}

#[test]
fn a_function_that_fails_is_an_error_and_leaves_its_tile_alone() {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    define("fails", &[], Some(fails), (&raw const CALLS).cast_mut().cast());
    let cpu = cpu(1);
    let (out, inn) = (600, 700);
    let scheme = scheme("fails", 0, WEIGHTS[0], STATES[0], Dtype::F32);
    let mut p = Parameter::new(scheme, &cpu, out, inn, (Parallel::None, 0, 1));
    let segment = Segment::random(&mut Random(1), 8, out, inn, Dtype::F32);
    let arrays = p.arrays();
    let step = StepSource::new(&scheme, &scalars("fails", 1));
    let factors = factors(&[segment]);
    // SAFETY: the arrays have the layout's sizes, factors by construction.
    let result =
        unsafe { p.linear.update(&factors, None, &arrays, &step, Deliver::HOST, Stream::NULL) };
    let error = result.unwrap_err();
    assert_eq!(error.status, forge_status::FORGE_ERROR_RULE_FUNCTION);
    for part in ["rule 'fails'", "returned 42", "this tile is as it was"] {
        assert!(error.message.contains(part), "{part}: {error}");
    }
    let w = p.export(forge::backend::Image::Weight);
    let updated = w.iter().filter(|w| **w == 1.0).count();
    assert!(updated > 0 && updated < w.len(), "the first tile alone: {updated}");
    assert!(w.iter().all(|w| *w == 0.0 || *w == 1.0));
}
