//! Every image that the calls of a linear may ask for: what `forge_warm` compiles ahead of time. The
//! defines come from the functions that the calls themselves use; what is repeated here is which call
//! takes which way. A new kernel, or a new way, is added to [`needs`].

use super::images::Need;
use super::mainloop::Mainloop;
use super::sm90::{self, Mode, Specialisation, Streams, policy};
use super::{elementwise, exact, group, reduce, sm80, sources, specialise};
use crate::backend::warm::Work;
use crate::backend::{Image, Shard};
use crate::format::Dtype;
use std::collections::BTreeSet;

/// What of a GPU decides on kernels and tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Compute capability.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Largest dynamic shared memory of a block, in bytes.
    pub shared_memory_per_block: u32,
}

impl Target {
    fn limits(&self) -> sm80::Limits {
        let Self { sm_count, shared_memory_per_block, .. } = *self;
        sm80::Limits { sm_count, shared_memory_per_block }
    }

    /// As most GPUs of a compute capability are.
    pub fn typical(capability: (i32, i32)) -> Self {
        // CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; A100, RTX 3090,
        // L40S, H100 and H200 SXM, B200, RTX PRO 6000.
        let (sm_count, kib) = match capability {
            (8, 0) => (108, 163),
            (8, 7) => (16, 163),
            (8, 6) => (82, 99),
            (8, _) => (142, 99),
            (9, _) => (132, 227),
            (10 | 11, _) => (148, 227),
            _ => (188, 99),
        };
        Self { capability, sm_count, shared_memory_per_block: kib << 10 }
    }
}

/// A list without repetitions.
#[derive(Default)]
struct List(Vec<Need>);

impl List {
    fn add(&mut self, need: Need) {
        if !self.0.iter().any(|n| n.source == need.source && n.defines == need.defines) {
            self.0.push(need);
        }
    }
}

/// The images that the calls of `work` need on a GPU, each once.
pub fn needs(target: &Target, work: &Work) -> Vec<Need> {
    let mut list = List::default();
    shared(&mut list, work);
    updates(&mut list, work);
    let mainloop = Mainloop::of_device(target.capability, &work.scheme);
    grouped(&mut list, target, work, mainloop);
    match mainloop {
        Mainloop::Sm90 => {
            fused_sm90(&mut list, target, work);
            grouped_sm90(&mut list, target, work);
        }
        Mainloop::Sm80 => fused_sm80(&mut list, target, work),
        Mainloop::Panel => {}
    }
    list.0
}

/// What many linears have in common: reports and norms, dgrad, bias, images.
fn shared(list: &mut List, work: &Work) {
    let scheme = &work.scheme;
    let factor = scheme.factor_dtype;
    list.add(Need::new(sources::REDUCE, vec![], "reports and norms"));
    list.add(Need::new(sources::BIAS, reduce::bias_defines(scheme), "bias gradient"));
    // cuBLASLt takes most products of 16-bit factors; whether all, only it can say.
    let weight = scheme.weight_format.model_dtype();
    let wgrad = exact::Types { left: factor, right: factor, out: Dtype::F32 };
    let dgrad = exact::Types { left: factor, right: weight, out: factor };
    let one_row = work.shards.iter().any(|s| s.rows == 1);
    let lefts: &[bool] = if one_row { &[false, true] } else { &[false] };
    list.add(Need::new(sources::EXACT, exact::defines(wgrad, [true, true]), "exact product of dW"));
    for left in lefts {
        let defines = exact::defines(dgrad, [*left, true]);
        list.add(Need::new(sources::EXACT, defines, "exact product of dX"));
    }
    let states = (0..scheme.n_states).map(Image::State);
    for image in [Image::Weight].into_iter().chain(states) {
        let what = match image {
            Image::Weight => "checkpoint image of the weight",
            Image::State(_) => "checkpoint image of a state",
        };
        list.add(Need::new(sources::IMAGE, reduce::image_defines(scheme, image), what));
    }
}

/// The element-wise kernel, and the scalars of a step from device memory.
fn updates(list: &mut List, work: &Work) {
    let scheme = &work.scheme;
    let name = specialise::name(scheme);
    // A rule of the caller's own is checked by compiling it there.
    if work.device_scalars || scheme.rule.user().is_some() {
        let what = format!("scalars of a step, {name}");
        list.add(Need::new(sources::PROLOGUE, specialise::rule(scheme), what));
    }
    let mut runs: Vec<bool> = work.shards.iter().map(elementwise::has_runs).collect();
    if runs.is_empty() {
        runs = vec![true, false];
    }
    for vector in runs {
        let what =
            format!("element-wise update{}, {name}", if vector { "" } else { " (ragged rows)" });
        list.add(Need::new(sources::ELEMENTWISE, elementwise::defines(scheme, vector), what));
    }
}

/// A call: the segments that there is room for, and its tokens, None: any number.
type Call = (usize, Option<u64>);

/// The calls over factors: one micro-batch at a time, and all of a step together.
fn calls(work: &Work) -> Vec<Call> {
    let counts = match work.micro_batches {
        Some(n) => vec![1, n as usize],
        None => (1..=sm90::MOST_SEGMENTS).collect(),
    };
    let mut calls: Vec<Call> = counts
        .into_iter()
        .filter(|n| (1..=sm90::MOST_SEGMENTS).contains(n))
        .map(|n| (sm90::room(n), work.tokens.map(|t| t.saturating_mul(n as u64))))
        .collect();
    calls.sort_unstable();
    calls.dedup();
    calls
}

/// What a fused kernel is asked for: mode, whether a buffer is added, and a name.
const FUSED: [(Mode, bool, &str); 5] = [
    (Mode::Update, false, "update"),
    (Mode::Update, true, "update with a buffer"),
    (Mode::Accumulate, true, "accumulation"),
    (Mode::Norm, false, "norm"),
    (Mode::Norm, true, "norm with a buffer"),
];

/// The fused kernel of compute capability 9.0: updates, accumulation and norms.
fn fused_sm90(list: &mut List, target: &Target, work: &Work) {
    let scheme = &work.scheme;
    let shards: Vec<&Shard> = work.shards.iter().filter(|s| sm90::fits(scheme, s)).collect();
    if shards.is_empty() && !work.shards.is_empty() {
        return;
    }
    // Without a shape draws may come in whole blocks or not.
    let mut draws: Vec<bool> = shards.iter().map(|s| sm90::whole_draws(s)).collect();
    if draws.is_empty() {
        draws = vec![true, false];
    }
    draws.sort_unstable();
    draws.dedup();
    let steps: &[bool] = if work.device_scalars { &[false, true] } else { &[false] };
    for (mode, accumulator, name) in FUSED {
        let streams = Streams::of(scheme, mode, accumulator);
        let updates = mode == Mode::Update;
        let (draws, steps) =
            if updates { (&draws[..], steps) } else { (&[true][..], &[false][..]) };
        let scheme_name = if updates { specialise::name(scheme) } else { String::new() };
        for (segments, tokens) in calls(work) {
            for tile in tiles(target, &shards, tokens, &streams) {
                for (whole_draws, device_step) in
                    draws.iter().flat_map(|d| steps.iter().map(|s| (*d, *s)))
                {
                    let special = Specialisation {
                        mode,
                        tile,
                        accumulator,
                        whole_draws,
                        device_step,
                        segments,
                        group: false,
                    };
                    let what = format!(
                        "fused {name}, tiles of {}×{}, {}{}{scheme_name}",
                        policy::TILE_ROWS,
                        tile.cols,
                        if segments == 1 {
                            "1 segment".into()
                        } else {
                            format!("{segments} segments")
                        },
                        if updates { ", " } else { "" },
                    );
                    list.add(Need::new(sources::WGRAD_SM90, special.defines(scheme), what));
                }
            }
        }
    }
}

/// The fused kernel of the other capabilities: updates, accumulation and norms.
fn fused_sm80(list: &mut List, target: &Target, work: &Work) {
    let scheme = &work.scheme;
    let limits = target.limits();
    let mut tiles: Vec<(u32, bool)> = work
        .shards
        .iter()
        .map(|s| (sm80::tile_rows(s, &limits), elementwise::has_runs(s)))
        .collect();
    if tiles.is_empty() {
        tiles = [128, 64].into_iter().flat_map(|rows| [(rows, true), (rows, false)]).collect();
    }
    for (mode, accumulator, name) in FUSED {
        for (tile_rows, vector) in &tiles {
            let special = sm80::Specialisation {
                mode,
                tile_rows: *tile_rows,
                accumulator,
                vector: *vector,
                group: false,
            };
            let scheme_name = match mode {
                Mode::Update => format!(", {}", specialise::name(scheme)),
                Mode::Accumulate | Mode::Norm => String::new(),
            };
            let ragged = if *vector { "" } else { " (ragged rows)" };
            let what = format!("fused {name}, tiles of {tile_rows}×128{ragged}{scheme_name}");
            list.add(Need::new(sources::WGRAD_SM80, special.defines(scheme), what));
        }
    }
}

/// The updates of many small weights of one shape in one launch, over a micro-batch each.
fn grouped_sm90(list: &mut List, target: &Target, work: &Work) {
    let Target { sm_count, shared_memory_per_block: most, .. } = *target;
    let scheme = &work.scheme;
    let small = |s: &&Shard| {
        group::is_small(s, sm_count, Mainloop::Sm90)
            && sm90::fits(scheme, s)
            && sm90::group::has_room(s)
    };
    let shards: Vec<&Shard> = work.shards.iter().filter(small).collect();
    if shards.is_empty() && !work.shards.is_empty() {
        return;
    }
    list.add(Need::new(sources::GROUP_MAPS, Vec::new(), "maps of a group"));
    let steps: &[bool] = if work.device_scalars { &[false, true] } else { &[false] };
    for (mode, accumulator, name) in FUSED.into_iter().filter(|(m, ..)| *m == Mode::Update) {
        let streams = Streams::of(scheme, mode, accumulator);
        let room = sm90::group::room(scheme, accumulator);
        let mut tiles = Vec::new();
        for tokens in work.tokens.map_or_else(|| policy::token_counts(&streams), |t| vec![t]) {
            if shards.is_empty() {
                let any = policy::candidates(tokens, &streams, most);
                tiles.extend(
                    any.into_iter().map(|tile| sm90::group::suited(tile, tokens, &streams, most)),
                );
            }
            for (shard, weights) in shards.iter().flat_map(|s| (2..=room).map(move |n| (s, n))) {
                let shape = (shard.rows, shard.cols);
                let tile = sm90::group::tile(weights, shape, tokens, &streams, sm_count, most);
                tiles.extend(tile.filter(|tile| !tiles.contains(tile)));
            }
        }
        for (tile, device_step) in tiles.iter().flat_map(|t| steps.iter().map(|s| (*t, *s))) {
            let one = Specialisation {
                mode,
                tile,
                accumulator,
                whole_draws: true,
                device_step,
                segments: 1,
                group: false,
            };
            let (rows, cols, scheme_name) =
                (policy::TILE_ROWS, tile.cols, specialise::name(scheme));
            let what = format!("grouped {name}, tiles of {rows}×{cols}, {scheme_name}");
            let defines = sm90::group::specialisation(one).defines(scheme);
            list.add(Need::new(sources::WGRAD_SM90, defines, what));
        }
    }
}

/// The updates of many small weights in one launch.
fn grouped(list: &mut List, target: &Target, work: &Work, mainloop: Mainloop) {
    let scheme = &work.scheme;
    if mainloop == Mainloop::Panel {
        return;
    }
    let small = work.shards.iter().filter(|s| group::is_small(s, target.sm_count, mainloop));
    let mut runs: Vec<bool> = small.map(elementwise::has_runs).collect();
    if work.shards.is_empty() {
        runs = vec![true, false];
    }
    let limits = target.limits();
    // Few of them, or many.
    let mut heights = [0, u64::MAX].map(|tiles| sm80::rows_for(tiles, &limits)).to_vec();
    heights.dedup();
    for (mode, accumulator, name) in FUSED.into_iter().filter(|(m, ..)| *m == Mode::Update) {
        for (vector, tile_rows) in runs.iter().flat_map(|v| heights.iter().map(move |h| (*v, *h))) {
            let special =
                sm80::Specialisation { mode, tile_rows, accumulator, vector, group: true };
            let ragged = if vector { "" } else { " (ragged rows)" };
            let name_of = specialise::name(scheme);
            let what = format!("grouped {name}, tiles of {tile_rows}×128{ragged}, {name_of}");
            list.add(Need::new(sources::WGRAD_SM80, special.defines(scheme), what));
        }
    }
}

/// The tiles that the policy may choose; `shards` empty: for any shape.
fn tiles(
    target: &Target,
    shards: &[&Shard],
    tokens: Option<u64>,
    streams: &Streams,
) -> Vec<policy::Tile> {
    let Target { sm_count, shared_memory_per_block: most, .. } = *target;
    let shapes: BTreeSet<(usize, usize)> = shards.iter().map(|s| (s.rows, s.cols)).collect();
    let tokens = tokens.map_or_else(|| policy::token_counts(streams), |t| vec![t]);
    let mut tiles = Vec::new();
    for tokens in tokens {
        if shapes.is_empty() {
            tiles.extend(policy::candidates(tokens, streams, most));
        }
        for (rows, cols) in &shapes {
            let (rows, cols) = (*rows as u64, *cols as u64);
            tiles.extend(policy::choose(rows, cols, tokens, streams, sm_count, most));
        }
    }
    tiles
}
