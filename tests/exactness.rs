//! Bit-for-bit: fused = two-phase, shards = whole, the three schedules, every thread count.

mod common;

use common::*;
use forge::backend::Image;
use forge::format::{Dtype, Rounding, StateFormat, WeightFormat};
use forge::linear::Parallel;
use proptest::prelude::*;

/// 1×1, primes, tails of a block, of a tile and of a microkernel.
const SHAPES: [(usize, usize); 8] =
    [(1, 1), (1, 131), (127, 1), (7, 129), (61, 257), (128, 128), (523, 67), (90, 641)];

#[test]
fn fused_is_two_phase_for_every_rule_and_format() {
    let cpu = cpu(2);
    for (case, (name, flags)) in rules().into_iter().enumerate() {
        for weight in WEIGHTS {
            for state in STATES {
                for (k, (out, inn)) in SHAPES.into_iter().enumerate() {
                    let dtype = [Dtype::F32, Dtype::Bf16, Dtype::F16][(case + k) % 3];
                    let mut r = Random((case * 100 + k) as u64);
                    let scheme = scheme(name, flags, weight, state, dtype);
                    let mut fused = Parameter::random(&mut r, scheme, &cpu, out, inn);
                    let start = fused.export(Image::Weight);
                    let mut stored = Parameter::new(scheme, &cpu, out, inn, (Parallel::None, 0, 1));
                    stored.import_weight(&start);
                    for step in 1..=3 {
                        let segments =
                            [5, 0, 300].map(|t| Segment::random(&mut r, t, out, inn, dtype));
                        let s = scalars(name, step);
                        fused.update(&factors(&segments), None, &s);
                        stored.update_two_phase(&cpu, &factors(&segments), &s);
                    }
                    assert!(
                        fused.bytes() == stored.bytes(),
                        "{name} {flags:#x} {weight:?} {state:?} {out}x{inn} {dtype:?}"
                    );
                    // A single bf16 weight may round back to where it was.
                    let moved = fused.export(Image::Weight) != start;
                    assert!(moved || out * inn == 1, "the weights did not move");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn fused_is_two_phase_on_random_shapes(
        out in 1usize..700, inn in 1usize..700, tokens in prop::collection::vec(0usize..400, 1..4),
        rule in 0..rules().len(), weight in 0usize..5, state in 0usize..5, threads in 1usize..4, seed: u64,
    ) {
        let (name, flags) = rules()[rule];
        let cpu = cpu(threads);
        let mut r = Random(seed);
        let scheme = scheme(name, flags, WEIGHTS[weight], STATES[state], Dtype::F32);
        let mut fused = Parameter::random(&mut r, scheme, &cpu, out, inn);
        let mut stored = Parameter::new(scheme, &cpu, out, inn, (Parallel::None, 0, 1));
        stored.import_weight(&fused.export(Image::Weight));
        let segments: Vec<_> =
            tokens.iter().map(|t| Segment::random(&mut r, *t, out, inn, Dtype::F32)).collect();
        for step in 1..=2 {
            fused.update(&factors(&segments), None, &scalars(name, step));
            stored.update_two_phase(&cpu, &factors(&segments), &scalars(name, step));
        }
        prop_assert!(fused.bytes() == stored.bytes());
    }
}

#[test]
fn shards_put_together_are_the_whole() {
    // 4·128 columns: q8 blocks of a row-parallel shard are those of the whole.
    let (out, inn) = (4 * 37, 4 * 128);
    let cpu = cpu(2);
    for (name, flags) in rules() {
        for weight in WEIGHTS {
            for state in STATES {
                let scheme = scheme(name, flags, weight, state, Dtype::F32);
                let mut r = Random(3);
                let mut whole = Parameter::random(&mut r, scheme, &cpu, out, inn);
                let start = whole.export(Image::Weight);
                let segments = [100, 270].map(|t| Segment::random(&mut r, t, out, inn, Dtype::F32));
                for step in 1..=2 {
                    whole.update(&factors(&segments), None, &scalars(name, step));
                }
                for parallel in [Parallel::Column, Parallel::Row] {
                    for size in [2, 4] {
                        for rank in 0..size {
                            let mut shard =
                                Parameter::new(scheme, &cpu, out, inn, (parallel, rank, size));
                            let at = shard.linear.shape.shard;
                            let (row, col) = (at.row_offset as usize, at.col_offset as usize);
                            let cut = |values: &[f32]| -> Vec<f32> {
                                (0..at.rows)
                                    .flat_map(|i| {
                                        let from = (row + i) * inn + col;
                                        values[from..from + at.cols].to_vec()
                                    })
                                    .collect()
                            };
                            shard.import_weight(&cut(&start));
                            let mine: Vec<_> = segments.iter().map(|s| s.shard(row, col)).collect();
                            for step in 1..=2 {
                                shard.update(&mine, None, &scalars(name, step));
                            }
                            let what =
                                format!("{name} {weight:?} {state:?} {parallel:?} {rank}/{size}");
                            let equal = |a: &[f32], b: &[f32]| {
                                a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits())
                            };
                            let expected = cut(&whole.export(Image::Weight));
                            assert!(equal(&shard.export(Image::Weight), &expected), "{what}");
                            for k in 0..scheme.n_states {
                                let expected = cut(&whole.export(Image::State(k)));
                                assert!(equal(&shard.export(Image::State(k)), &expected), "{what}");
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn the_three_schedules_agree_on_equal_factors() {
    let (out, inn) = (150, 333);
    let cpu = cpu(2);
    for (name, flags) in rules() {
        let scheme = scheme(name, flags, WEIGHTS[2], STATES[0], Dtype::Bf16);
        let mut r = Random(9);
        let mut deferred = Parameter::random(&mut r, scheme, &cpu, out, inn);
        let start = deferred.export(Image::Weight);
        let clone = || {
            let mut p = Parameter::new(scheme, &cpu, out, inn, (Parallel::None, 0, 1));
            p.import_weight(&start);
            p
        };
        let (mut fused_last, mut buffered) = (clone(), clone());
        for step in 1..=3 {
            let s = scalars(name, step);
            let segments =
                [64, 300, 1, 17].map(|t| Segment::random(&mut r, t, out, inn, Dtype::Bf16));
            let all = factors(&segments);
            deferred.update(&all, None, &s);
            // accumulate: the last micro-batch in registers, or everything through the buffer.
            let mut buffer = vec![0f32; out * inn];
            let (last, earlier) = all.split_last().unwrap();
            for f in earlier {
                fused_last.accumulate(&[*f], &mut buffer);
            }
            fused_last.update(&[*last], Some(&mut buffer), &s);
            buffered.accumulate(&[*last], &mut buffer);
            buffered.update(&[], Some(&mut buffer), &s);
        }
        assert!(deferred.bytes() == fused_last.bytes(), "{name}");
        assert!(deferred.bytes() == buffered.bytes(), "{name}");
    }
}

#[test]
fn one_segment_is_several() {
    let (out, inn) = (70, 90);
    let cpu = cpu(1);
    let scheme = scheme("adamw", 0, WEIGHTS[0], STATES[0], Dtype::F32);
    let mut r = Random(5);
    let mut whole = Parameter::random(&mut r, scheme, &cpu, out, inn);
    let mut cut = Parameter::new(scheme, &cpu, out, inn, (Parallel::None, 0, 1));
    cut.import_weight(&whole.export(Image::Weight));
    let segment = Segment::random(&mut r, 700, out, inn, Dtype::F32);
    let all = segment.factors();
    let part = |first: usize, tokens: usize| {
        let mut f = all;
        f.dy.data = segment.dy[first * out * 4..].as_ptr();
        f.x.data = segment.x[first * inn * 4..].as_ptr();
        f.tokens = tokens;
        f
    };
    whole.update(&[all], None, &scalars("adamw", 1));
    let parts = [part(0, 1), part(1, 298), part(299, 0), part(299, 401)];
    cut.update(&parts, None, &scalars("adamw", 1));
    assert!(whole.bytes() == cut.bytes());
}

#[test]
fn every_thread_count_and_run_gives_the_same_bits() {
    let (out, inn) = (700, 900);
    let scheme = scheme(
        "adamw",
        0,
        (WeightFormat::Bf16, Rounding::Stochastic),
        (StateFormat::Q8, Rounding::Stochastic),
        Dtype::Bf16,
    );
    let run = |threads: usize| {
        let cpu = cpu(threads);
        let mut r = Random(1);
        let mut p = Parameter::random(&mut r, scheme, &cpu, out, inn);
        let segments = [Segment::random(&mut r, 290, out, inn, Dtype::Bf16)];
        for step in 1..=2 {
            p.update(&factors(&segments), None, &scalars("adamw", step));
        }
        p.bytes().concat()
    };
    let first = run(1);
    for threads in [1, 2, 3, 8, 16] {
        assert!(run(threads) == first, "{threads} threads");
    }
}

#[test]
fn a_bf16_and_its_lower_half_are_the_fp32_run() {
    let (out, inn) = (67, 200);
    let cpu = cpu(2);
    for (name, flags) in rules() {
        let mut exports = Vec::new();
        for weight in [WEIGHTS[0], WEIGHTS[3], WEIGHTS[4]] {
            let scheme = scheme(name, flags, weight, STATES[0], Dtype::Bf16);
            let mut r = Random(21);
            let mut p = Parameter::random(&mut r, scheme, &cpu, out, inn);
            for step in 1..=4 {
                let segment = Segment::random(&mut r, 40, out, inn, Dtype::Bf16);
                p.update(&[segment.factors()], None, &scalars(name, step));
            }
            exports.push(p.export(Image::Weight).iter().map(|v| v.to_bits()).collect::<Vec<_>>());
        }
        assert_eq!(exports[0], exports[1], "{name}");
        assert_eq!(exports[0], exports[2], "{name}");
    }
}
