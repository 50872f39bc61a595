//! Data parallelism between threads: the ranks together against one rank with all tokens.

mod common;
#[path = "common/threads_comm.rs"]
mod threads_comm;

use common::*;
use forge::backend::{
    Accumulator, Deliver, Factors, Image, Matrix, NormMethod, Scheme, StepSource, Stream,
};
use forge::comm::Comm;
use forge::format::Dtype;
use forge::linear::{
    Backward, DataParallel, ExchangePlaces, Linear, Mode, Parallel, PlanRequest, Reduction,
    Schedule, Shape,
};
use std::ptr::null_mut;
use std::sync::Arc;
use std::thread;
use threads_comm::ThreadComm;

/// How W and tokens are shared out.
#[derive(Clone, Copy, Debug)]
struct World {
    replicas: usize,
    parallel: Parallel,
    tensor: usize,
    sequence: bool,
}

impl World {
    const fn replicas(replicas: usize) -> Self {
        Self { replicas, parallel: Parallel::None, tensor: 1, sequence: false }
    }
}

/// A rank: its linear, and where it is.
struct Rank {
    p: Parameter,
    replica: usize,
    tensor: usize,
}

/// Runs `work` for every rank on a thread of its own; what each returns, tensor ranks of a replica together.
fn on_all<T: Send>(
    world: World,
    scheme: Scheme,
    (out, inn): (usize, usize),
    reduction: Reduction,
    work: impl Fn(Rank) -> T + Sync,
) -> Vec<T> {
    let of_tensor: Vec<_> = (0..world.replicas).map(|_| ThreadComm::group(world.tensor)).collect();
    let of_replicas: Vec<_> =
        (0..world.tensor).map(|_| ThreadComm::group(world.replicas)).collect();
    let (work, of_tensor, of_replicas) = (&work, &of_tensor, &of_replicas);
    thread::scope(|scope| {
        let mut running = Vec::new();
        for replica in 0..world.replicas {
            for tensor in 0..world.tensor {
                running.push(scope.spawn(move || {
                    let comm: Arc<dyn Comm> = of_tensor[replica][tensor].clone();
                    let others: Arc<dyn Comm> = of_replicas[tensor][replica].clone();
                    let World { parallel, sequence, .. } = world;
                    let (o, i, ranks) = (out as u64, inn as u64, world.tensor);
                    let shape = Shape::new(o, i, parallel, sequence, true, tensor, ranks)
                        .and_then(|shape| shape.replicated(replica, world.replicas))
                        .unwrap();
                    let data_parallel =
                        Some(DataParallel { comm: others, reduction, micro_batches: 1 });
                    let backend = cpu(1);
                    let linear = Linear { backend, comm, shape, scheme, data_parallel };
                    work(Rank { p: Parameter::of(linear), replica, tensor })
                }));
            }
        }
        running.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn rows_of(values: &[f32], inn: usize, shard: forge::backend::Shard) -> Vec<f32> {
    let (row, col) = (shard.row_offset as usize, shard.col_offset as usize);
    (row..row + shard.rows)
        .flat_map(|r| values[r * inn + col..r * inn + col + shard.cols].to_vec())
        .collect()
}

impl Rank {
    /// Takes its part of W `[out, inn]`.
    fn import(&mut self, whole: &[f32], inn: usize) {
        let mine = rows_of(whole, inn, self.p.linear.shape.owned());
        self.p.import_weight(&mine);
        let arrays = self.p.arrays();
        // SAFETY: the weight has the layout's size.
        unsafe { self.p.linear.gather_weight(arrays.weight, Stream::NULL) }.unwrap();
    }

    /// dX of a backward over this replica's segment, and the workspace, whose start has exchanged factors.
    fn backward(&mut self, segment: &Segment, mode: Mode) -> (Vec<u8>, Vec<u8>) {
        let arrays = self.p.arrays();
        let linear = &self.p.linear;
        let (shape, dtype) = (linear.shape, linear.scheme.factor_dtype);
        let tokens = segment.tokens;
        let at = shape.shard;
        let Factors { mut dy, mut x, .. } =
            segment.shard(at.row_offset as usize, at.col_offset as usize);
        let local = shape.local_tokens(tokens);
        let own;
        let cut = |m: Matrix, width: usize, first: usize, rows: usize| -> Vec<u8> {
            (first..first + rows)
                .flat_map(|row| {
                    // SAFETY: rows of the segment.
                    unsafe {
                        let from = m.data.add(row * m.stride * dtype.bytes());
                        std::slice::from_raw_parts(from, width * dtype.bytes()).to_vec()
                    }
                })
                .collect()
        };
        if let Some((features, gathers_x)) = shape.gathered_features() {
            let source = if gathers_x { x } else { dy };
            own = cut(source, features, self.tensor * local, local);
            let matrix = Matrix { data: own.as_ptr(), stride: features };
            if gathers_x { x = matrix } else { dy = matrix }
        }
        let x_rows;
        if x.stride != at.cols {
            x_rows = cut(x, at.cols, 0, tokens);
            x = Matrix { data: x_rows.as_ptr(), stride: at.cols };
        }
        let keeps = matches!(mode, Mode::Keep { .. });
        let mut workspace = vec![0u8; linear.workspace_bytes(keeps, tokens) + 1];
        let mut dx = vec![0u8; shape.x_tokens(tokens) * at.cols * dtype.bytes() + 1];
        let work = Backward {
            tokens,
            dy,
            x,
            dx: Some(dx.as_mut_ptr()),
            dbias: None,
            workspace: workspace.as_mut_ptr(),
            arrays,
            mode,
            deliver: Deliver::HOST,
            stream: Stream::NULL,
        };
        // SAFETY: all arrays have their sizes.
        unsafe { linear.backward(&work) }.unwrap();
        dx.pop();
        (dx, workspace)
    }

    fn update_mode(&self, name: &str, step: u64) -> Mode {
        let step = StepSource::new(&self.p.linear.scheme, &scalars(name, step));
        Mode::Update { step, accumulator: None }
    }

    /// What a backward that kept has exchanged.
    fn exchanged(&self, tokens: usize, workspace: &[u8]) -> Factors {
        let shape = self.p.linear.shape;
        let dy = ExchangePlaces::new(&shape, tokens, self.p.linear.scheme.factor_dtype).dy;
        let owned = shape.owned();
        Factors {
            dy: Matrix { data: workspace[dy..].as_ptr(), stride: owned.rows },
            x: Matrix { data: workspace.as_ptr(), stride: owned.cols },
            tokens: shape.replicas * tokens,
        }
    }
}

/// The segments of all replicas as one.
fn together(segments: &[Segment]) -> Segment {
    let first = &segments[0];
    Segment {
        dy: segments.iter().flat_map(|s| s.dy.clone()).collect(),
        x: segments.iter().flat_map(|s| s.x.clone()).collect(),
        tokens: segments.iter().map(|s| s.tokens).sum(),
        ..*first
    }
}

/// What a rank stores, against the same of one rank with all of W and all tokens.
fn assert_is_part(rank: &mut Rank, whole: &mut [Vec<f32>], inn: usize, what: &str) {
    let shape = rank.p.linear.shape;
    for (k, whole) in whole.iter().enumerate() {
        let image = if k == 0 { Image::Weight } else { Image::State(k - 1) };
        let want = rows_of(whole, inn, shape.owned());
        assert!(rank.p.export(image) == want, "{what}: {image:?}");
    }
    let model = rank.p.bytes()[0].to_vec();
    let dtype = rank.p.linear.scheme.weight_format.model_dtype();
    if dtype == Dtype::F32 {
        let want = encode(dtype, &rows_of(&whole[0], inn, shape.shard));
        assert!(model == want, "{what}: W was not gathered");
    }
}

fn images(p: &mut Parameter) -> Vec<Vec<f32>> {
    let n = p.linear.scheme.n_states;
    let states = (0..n).map(Image::State);
    std::iter::once(Image::Weight).chain(states).map(|image| p.export(image)).collect()
}

const WORLDS: [World; 8] = [
    World::replicas(2),
    World::replicas(3),
    World::replicas(4),
    World { replicas: 2, parallel: Parallel::Column, tensor: 2, sequence: false },
    World { replicas: 2, parallel: Parallel::Column, tensor: 2, sequence: true },
    World { replicas: 2, parallel: Parallel::Row, tensor: 2, sequence: false },
    World { replicas: 2, parallel: Parallel::Row, tensor: 2, sequence: true },
    World::replicas(1),
];

#[test]
fn exchanged_factors_give_the_bits_of_one_rank_with_all_tokens() {
    let (out, inn, tokens) = (24, 256, 10);
    for world in WORLDS {
        for (name, flags, weight, state, dtype) in [
            ("adamw", 0, WEIGHTS[0], STATES[0], Dtype::F32),
            ("adamw", 0, WEIGHTS[0], STATES[4], Dtype::F32),
            ("adamw", 0, WEIGHTS[2], STATES[2], Dtype::Bf16),
            ("lion", 0, WEIGHTS[4], STATES[3], Dtype::Bf16),
        ] {
            for keeps in [false, true] {
                let what = format!("{world:?} {name} {weight:?} {state:?} keeps {keeps}");
                let scheme = scheme(name, flags, weight, state, dtype);
                let mut r = Random(5);
                let mut one = Parameter::random(&mut r, scheme, &cpu(1), out, inn);
                let start = one.export(Image::Weight);
                let mut norms = Vec::new();
                let mut given = Vec::new();
                for step in 1..=2 {
                    let mut segment = || Segment::random(&mut r, tokens, out, inn, dtype);
                    let segments: Vec<_> = (0..world.replicas).map(|_| segment()).collect();
                    let all = together(&segments);
                    let norm = one.norm(&[all.factors()], NormMethod::Tiles);
                    norms.push(norm.sum_of_squares);
                    one.update(&[all.factors()], None, &scalars(name, step));
                    given.push(segments);
                }
                let want = images(&mut one);
                let (given, want, norms) = (&given, &want, &norms);
                let sums = on_all(world, scheme, (out, inn), Reduction::Exchange, |mut rank| {
                    rank.import(&start, inn);
                    let mut sums = Vec::new();
                    for (step, segments) in (1..).zip(given) {
                        let mine = &segments[rank.replica];
                        if keeps {
                            let mode = Mode::Keep { norm: null_mut() };
                            let (_, workspace) = rank.backward(mine, mode);
                            let factors = rank.exchanged(tokens, &workspace);
                            let norm = rank.p.norm(&[factors], NormMethod::Tiles);
                            sums.push(norm.sum_of_squares);
                            rank.p.update(&[factors], None, &scalars(name, step));
                        } else {
                            let mode = rank.update_mode(name, step);
                            rank.backward(mine, mode);
                            sums.push(0.0);
                        }
                    }
                    assert_is_part(&mut rank, &mut want.clone(), inn, &what);
                    sums
                });
                for (step, norm) in norms.iter().enumerate().filter(|_| keeps) {
                    let total: f64 = sums.iter().map(|s| s[step]).sum();
                    assert!((total / norm - 1.0).abs() < 1e-12, "{what}: {total} is not {norm}");
                }
            }
        }
    }
}

#[test]
fn dx_is_of_a_ranks_own_tokens_and_of_w_before_the_update() {
    let (out, inn, tokens) = (12, 20, 6);
    let scheme = scheme("sgd", 0, WEIGHTS[0], STATES[0], Dtype::F32);
    let mut r = Random(8);
    let start = r.vector(out * inn);
    let segments = [0, 1, 2].map(|_| Segment::random(&mut r, tokens, out, inn, Dtype::F32));
    for reduction in [Reduction::Exchange, Reduction::Panels] {
        let got = on_all(World::replicas(3), scheme, (out, inn), reduction, |mut rank| {
            rank.import(&start, inn);
            let mode = rank.update_mode("sgd", 1);
            rank.backward(&segments[rank.replica], mode).0
        });
        for (segment, got) in segments.iter().zip(got) {
            let mut alone = Parameter::new(scheme, &cpu(1), out, inn, (Parallel::None, 0, 1));
            alone.import_weight(&start);
            let mut dx = vec![0u8; tokens * inn * 4];
            let w = alone.arrays().weight;
            let dy = segment.factors().dy;
            // SAFETY: all arrays have their sizes.
            unsafe { alone.linear.dgrad(tokens, dy, w, dx.as_mut_ptr(), Stream::NULL) }.unwrap();
            assert!(got == dx, "{reduction:?}");
        }
    }
}

/// Panels differ from factors in the order of the sum alone: each element within fp32 rounding of `tokens` terms.
fn assert_near(got: &[f32], want: &[f32], bound: f32, what: &str) {
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() <= bound, "{what}: {g} is not {w}");
    }
}

#[test]
fn panels_give_the_same_sums() {
    // The last shape has several panels of an owner, the last of them smaller.
    for (world, out, inn, tokens) in [
        (World::replicas(2), 24, 136, 10),
        (World::replicas(4), 24, 136, 10),
        (WORLDS[4], 24, 136, 10),
        (WORLDS[6], 24, 136, 10),
        (World::replicas(2), 2 * 1100, 4100, 2),
    ] {
        let what = format!("{world:?} {out}x{inn}");
        let scheme = scheme("sgd", 0, WEIGHTS[0], STATES[0], Dtype::F32);
        let mut r = Random(6);
        let start = r.vector(out * inn);
        let segments: Vec<Vec<_>> = (0..2)
            .map(|_| {
                let mut segment = || Segment::random(&mut r, tokens, out, inn, Dtype::F32);
                (0..world.replicas).map(|_| segment()).collect()
            })
            .collect();
        let all: Vec<_> = segments.iter().map(|s| together(s)).collect();
        let mut one = Parameter::new(scheme, &cpu(2), out, inn, (Parallel::None, 0, 1));
        one.import_weight(&start);
        let mut buffer = vec![0f32; out * inn];
        for segment in &all {
            one.accumulate(&[segment.factors()], &mut buffer);
        }
        one.update(&[all[0].factors()], None, &scalars("sgd", 1));
        let stepped = one.export(Image::Weight);
        let bound = 1e-6 * tokens as f32 * world.replicas as f32;
        on_all(world, scheme, (out, inn), Reduction::Panels, |mut rank| {
            rank.import(&start, inn);
            let owned = rank.p.linear.shape.owned();
            // Both micro-batches into a buffer of the owned rows.
            let mut sum = vec![0f32; owned.rows * owned.cols];
            for segments in &segments {
                let mode = Mode::Accumulate(Accumulator::fp32(sum.as_mut_ptr()));
                rank.backward(&segments[rank.replica], mode);
            }
            assert_near(&sum, &rows_of(&buffer, inn, owned), 2.0 * bound, &what);
            // The first alone inside the backward.
            let mode = rank.update_mode("sgd", 1);
            rank.backward(&segments[0][rank.replica], mode);
            assert_near(
                &rank.p.export(Image::Weight),
                &rows_of(&stepped, inn, owned),
                bound,
                &what,
            );
            // The buffer of the first and the second micro-batch: as both in the buffer.
            let step = StepSource::new(&rank.p.linear.scheme, &scalars("sgd", 2));
            rank.import(&start, inn);
            let mut first = vec![0f32; owned.rows * owned.cols];
            let mode = Mode::Accumulate(Accumulator::fp32(first.as_mut_ptr()));
            rank.backward(&segments[0][rank.replica], mode);
            let before = first.clone();
            let accumulator = Some(Accumulator::fp32(first.as_mut_ptr()));
            rank.backward(&segments[1][rank.replica], Mode::Update { step, accumulator });
            assert!(first == before, "{what}: an update wrote its accumulator");
            let both = rank.p.export(Image::Weight);
            rank.import(&start, inn);
            let arrays = rank.p.arrays();
            let sum = Some(Accumulator::fp32(sum.as_mut_ptr()));
            rank.p.report(&[], sum, &arrays, &scalars("sgd", 2));
            assert_near(&both, &rank.p.export(Image::Weight), bound, &what);
        });
    }
}

#[test]
fn ranks_of_panels_may_have_different_tokens() {
    let (out, inn) = (24, 136);
    for counts in [[5, 0, 3], [0, 0, 7], [1, 12, 0]] {
        let scheme = scheme("sgd", 0, WEIGHTS[0], STATES[0], Dtype::F32);
        let mut r = Random(8);
        let start = r.vector(out * inn);
        let mut segment = |tokens| Segment::random(&mut r, tokens, out, inn, Dtype::F32);
        let segments: Vec<_> = counts.iter().map(|tokens| segment(*tokens)).collect();
        let all = together(&segments);
        let mut one = Parameter::new(scheme, &cpu(2), out, inn, (Parallel::None, 0, 1));
        one.import_weight(&start);
        let mut buffer = vec![0f32; out * inn];
        one.accumulate(&[all.factors()], &mut buffer);
        one.update(&[all.factors()], None, &scalars("sgd", 1));
        let stepped = one.export(Image::Weight);
        let what = format!("{counts:?} tokens");
        on_all(World::replicas(3), scheme, (out, inn), Reduction::Panels, |mut rank| {
            rank.import(&start, inn);
            let owned = rank.p.linear.shape.owned();
            let mut sum = vec![0f32; owned.rows * owned.cols];
            let own = &segments[rank.replica];
            rank.backward(own, Mode::Accumulate(Accumulator::fp32(sum.as_mut_ptr())));
            assert_near(&sum, &rows_of(&buffer, inn, owned), 2e-5, &what);
            let (dx, _) = rank.backward(own, rank.update_mode("sgd", 1));
            assert_eq!(dx.len(), own.tokens * inn * 4);
            let want = rows_of(&stepped, inn, owned);
            assert_near(&rank.p.export(Image::Weight), &want, 2e-5, &what);
        });
    }
}

#[test]
fn no_tokens_are_a_zero_gradient() {
    let (out, inn) = (8, 6);
    let scheme = scheme("adamw", 0, WEIGHTS[0], STATES[0], Dtype::F32);
    let mut r = Random(9);
    let mut one = Parameter::random(&mut r, scheme, &cpu(1), out, inn);
    let start = one.export(Image::Weight);
    one.update(&[], None, &scalars("adamw", 1));
    let want = images(&mut one);
    for reduction in [Reduction::Auto, Reduction::Exchange, Reduction::Panels] {
        on_all(World::replicas(2), scheme, (out, inn), reduction, |mut rank| {
            rank.import(&start, inn);
            let mode = rank.update_mode("adamw", 1);
            rank.backward(&Segment::random(&mut Random(1), 0, out, inn, Dtype::F32), mode);
            assert_is_part(&mut rank, &mut want.clone(), inn, &format!("{reduction:?}"));
        });
    }
}

#[test]
fn kept_factors_are_reduced_once_for_all_micro_batches() {
    let (out, inn) = (24, 136);
    for world in [World::replicas(2), World::replicas(4), WORLDS[4], WORLDS[6]] {
        let scheme = scheme("sgd", 0, WEIGHTS[0], STATES[0], Dtype::F32);
        let mut r = Random(12);
        let start = r.vector(out * inn);
        let steps: Vec<Vec<_>> = [6, 10, 2]
            .map(|tokens| {
                let mut segment = || Segment::random(&mut r, tokens, out, inn, Dtype::F32);
                (0..world.replicas).map(|_| segment()).collect()
            })
            .into();
        let mut one = Parameter::new(scheme, &cpu(2), out, inn, (Parallel::None, 0, 1));
        one.import_weight(&start);
        let mut buffer = vec![0f32; out * inn];
        for segments in &steps {
            one.accumulate(&[together(segments).factors()], &mut buffer);
        }
        on_all(world, scheme, (out, inn), Reduction::Panels, |mut rank| {
            rank.import(&start, inn);
            let shape = rank.p.linear.shape;
            let (owned, shard) = (shape.owned(), shape.shard);
            let mut gathered = Vec::new();
            let mut local = Vec::new();
            for segments in &steps {
                let mine = &segments[rank.replica];
                let (_, workspace) = rank.backward(mine, Mode::Keep { norm: null_mut() });
                let (row, col) = (shard.row_offset as usize, shard.col_offset as usize);
                let mut factors = mine.shard(row, col);
                if let Some((features, is_x)) = shape.gathered_features() {
                    // The gathered factor is at the start of the workspace.
                    let matrix = Matrix { data: workspace.as_ptr(), stride: features };
                    if is_x { factors.x = matrix } else { factors.dy = matrix }
                }
                gathered.push(workspace);
                local.push(factors);
            }
            let mut sum = vec![0f32; owned.rows * owned.cols];
            let mut workspace = vec![0u8; shape.panel_workspace()];
            let to = Accumulator::fp32(sum.as_mut_ptr());
            // SAFETY: all arrays have their sizes.
            unsafe { rank.p.linear.reduce(&local, to, workspace.as_mut_ptr(), Stream::NULL) }
                .unwrap();
            assert_near(&sum, &rows_of(&buffer, inn, owned), 1e-4, &format!("{world:?}"));
        });
    }
}

#[test]
fn the_reduction_with_fewer_bytes_is_taken() {
    let scheme = scheme("adamw", 0, WEIGHTS[1], STATES[1], Dtype::Bf16);
    let plan = |tokens, reduction, schedule, micro_batches| {
        let plans = on_all(World::replicas(8), scheme, (4096, 4096), reduction, |mut rank| {
            rank.p.linear.data_parallel.as_mut().unwrap().micro_batches = micro_batches;
            rank.p.linear.plan(&PlanRequest {
                schedule,
                tokens_per_micro_batch: tokens,
                micro_batches,
                needs_norm: true,
            })
        });
        plans.into_iter().next().unwrap().unwrap()
    };
    // 7/8 of 4096² fp32 numbers, against 7·(4096 + 512) bf16 numbers of each token of a rank.
    let (owned, panels) = (512 * 4096 * 4, 7 * 512 * 4096 * 4);
    let token = 7 * (4096 + 512) * 2;
    let most = panels / token;
    for (tokens, wanted, bytes) in [
        (1, Reduction::Exchange, token),
        (most, Reduction::Exchange, most * token),
        (most + 1, Reduction::Panels, panels),
        (1 << 20, Reduction::Panels, panels),
    ] {
        let auto = plan(tokens, Reduction::Auto, Schedule::Auto, 1);
        assert_eq!((auto.reduction, auto.wire_bytes), (Some(wanted), bytes), "{tokens}");
    }
    // Of several micro-batches panels are reduced as often as kept factors outgrow the buffer: here in each.
    let several = plan(most, Reduction::Auto, Schedule::Auto, 3);
    assert_eq!(
        (several.reduction, several.wire_bytes),
        (Some(Reduction::Exchange), 3 * most * token)
    );
    let more = plan(most + 1, Reduction::Auto, Schedule::Auto, 3);
    assert_eq!((more.reduction, more.wire_bytes), (Some(Reduction::Panels), 3 * panels));
    let kept_all = plan(most + 1, Reduction::Auto, Schedule::Deferred, 3);
    assert_eq!(kept_all.wire_bytes, panels);
    let small = plan(16, Reduction::Panels, Schedule::Accumulate, 64);
    assert_eq!(
        small.wire_bytes,
        2 * panels,
        "32 micro-batches of 16 tokens are as large as the buffer"
    );
    // What is exchanged is of all tokens and of the owned rows; what is not, of this rank's and of all rows.
    let kept = plan(most, Reduction::Auto, Schedule::Deferred, 1);
    assert_eq!(kept.factor_bytes, 8 * most * (4096 + 512) * 2);
    assert_eq!((kept.gradient_bytes, kept.accumulator_bytes), (owned, 0));
    let local = plan(most + 1, Reduction::Auto, Schedule::Deferred, 2);
    assert_eq!(local.factor_bytes, 2 * (most + 1) * (4096 + 4096) * 2);
    assert_eq!((local.schedule, local.accumulator_bytes), (Schedule::Deferred, owned));
    let forced = plan(most + 1, Reduction::Exchange, Schedule::Deferred, 1);
    assert_eq!(forced.reduction, Some(Reduction::Exchange));
    // More factors than the buffer takes are reduced before the step ends.
    let long = plan(1 << 20, Reduction::Auto, Schedule::Auto, 4);
    assert_eq!((long.schedule, long.accumulator_bytes), (Schedule::Accumulate, owned));
    assert_eq!(long.factor_bytes, (1 << 20) * (4096 + 4096) * 2);
}

#[test]
fn rows_that_do_not_divide_are_refused() {
    let shape = Shape::new(10, 4, Parallel::None, false, false, 0, 1).unwrap();
    let refused = shape.replicated(0, 4).unwrap_err();
    assert!(refused.message.starts_with("out_features: 10 rows"), "{}", refused.message);
}
