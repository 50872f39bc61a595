//! Updates of many small weights in few launches: a weight with fewer tiles than the GPU works on at once
//! leaves most of it idle, and so does the time between two launches. Weights of one shape share launches of
//! 9.0's kernel there ([`sm90::group`]); others, and all on other GPUs, those of [`sm80`].

use super::super::{GroupEntry, Scheme, Shard, StepSource, Stream};
use super::driver::{DevicePtr, parameters};
use super::gpu::{Gpu, Kernel};
use super::mainloop::Mainloop;
use super::parameters::{KernelStep, Region};
use super::reduce::{self, MOST_REPORTS, ReportOf};
use super::sm80::{self, FactorPair, Launch, Limits, Mode, Problem, Specialisation};
use super::sm90;
use super::workspace::{MOST_PARTIALS, Workspace};
use super::{grid, sources, specialise};
use crate::error::Result;
use crate::format::Dtype;
use crate::rule::MAXIMIZE;

/// Problems and segments share them; with the rest [`Params`] is 32760 bytes, of the 32764 that a driver
/// takes since CUDA 12.1.
const POOL_WORDS: usize = 4082;
const PROBLEM_WORDS: usize = size_of::<Problem>() / 8;
const SEGMENT_WORDS: usize = size_of::<FactorPair>() / 8;

/// `forge::Params` of a kernel that is compiled for groups.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Params {
    step: KernelStep,
    n_problems: u32,
    pool: [u64; POOL_WORDS],
}

// The reports of a launch fit one, too.
const _: () = assert!(POOL_WORDS / (PROBLEM_WORDS + SEGMENT_WORDS) <= MOST_REPORTS);
const _: () = assert!(size_of::<Params>() == 32760 && size_of::<Problem>() == 128);

/// Rows of a tile, while weights are put together.
const SMALL_ROWS: u32 = 64;

/// Whether a shard is too small to fill a GPU alone: it has fewer than two tiles for each multiprocessor, or
/// one where 9.0's own kernel with its larger ones would take it.
pub fn is_small(shard: &Shard, sm_count: u32, mainloop: Mainloop) -> bool {
    let tiles = Region::whole(shard).tiles();
    match mainloop {
        Mainloop::Sm80 => tiles < u64::from(2 * sm_count),
        Mainloop::Sm90 => tiles < u64::from(sm_count),
        Mainloop::Panel => false,
    }
}

/// Whether two updates have the scalars of a step in common, but for the parameter: by value, or from one
/// place in device memory.
fn same_scalars(a: &GroupEntry, b: &GroupEntry) -> bool {
    let maximize = |e: &GroupEntry| e.scheme.flags & MAXIMIZE;
    maximize(a) == maximize(b)
        && match (a.step, b.step) {
            (StepSource::Value(ours), StepSource::Value(theirs)) => ours.scalars == theirs.scalars,
            (StepSource::Device(ours), StepSource::Device(theirs)) => ours == theirs,
            _ => false,
        }
}

/// One launch, while it is put together.
pub struct Group {
    /// What the kernel is compiled for.
    pub specialisation: Specialisation,
    /// Blocks: one for each tile of each weight.
    pub blocks: u32,
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    step: KernelStep,
    problems: Vec<Problem>,
    segments: Vec<FactorPair>,
}

impl Group {
    /// A launch for weights that are updated as this one; it is not yet added.
    pub fn for_launches_like(launch: &Launch) -> Self {
        Self {
            specialisation: Specialisation { group: true, ..launch.specialisation },
            blocks: 0,
            shared_bytes: launch.shared_bytes,
            step: *launch.params.step(),
            problems: Vec::new(),
            segments: Vec::new(),
        }
    }

    /// Weights that it updates.
    pub fn len(&self) -> usize {
        self.problems.len()
    }

    /// Whether it updates none.
    pub fn is_empty(&self) -> bool {
        self.problems.is_empty()
    }

    /// Whether the same kernel with the same scalars does this one's work. Schemes are the caller's to
    /// compare.
    pub fn takes(&self, launch: &Launch) -> bool {
        let wanted = Specialisation { group: true, ..launch.specialisation };
        let step = launch.params.step();
        self.specialisation == wanted
            && self.step.device == step.device
            && self.step.value.same_step(&step.value)
    }

    /// Adds a weight whose work [`Group::takes`]; false where there is no room.
    pub fn add(&mut self, launch: &Launch) -> bool {
        let (mut problem, segments) = (*launch.params.problem(), launch.params.segments());
        let words = (self.problems.len() + 1) * PROBLEM_WORDS
            + (self.segments.len() + segments.len()) * SEGMENT_WORDS;
        if words > POOL_WORDS {
            return false;
        }
        problem.first_block = self.blocks;
        problem.first_segment = self.segments.len() as u32;
        self.problems.push(problem);
        self.segments.extend_from_slice(segments);
        // Small ones only: far from an overflow.
        self.blocks += launch.blocks as u32;
        true
    }

    /// The kernel's only parameter.
    pub fn params(&self) -> Params {
        let n_problems = self.problems.len() as u32;
        let mut params = Params { step: self.step, n_problems, pool: [0; POOL_WORDS] };
        let (problems, segments) = params.pool.split_at_mut(self.problems.len() * PROBLEM_WORDS);
        // SAFETY: whole words, as many as `add` saw room for; both structs want the alignment of a u64.
        unsafe {
            let from = self.problems.as_ptr();
            from.copy_to_nonoverlapping(problems.as_mut_ptr().cast(), self.problems.len());
            let from = self.segments.as_ptr();
            from.copy_to_nonoverlapping(segments.as_mut_ptr().cast(), self.segments.len());
        }
        params
    }

    /// Enqueues the kernel.
    ///
    /// # Safety
    /// As [`super::super::Backend::update`], of all its weights; the context is current.
    unsafe fn run(&self, gpu: &Gpu, scheme: &Scheme, stream: Stream) -> Result<()> {
        let kernel = Kernel {
            source: sources::WGRAD_SM80,
            defines: &self.specialisation.defines(scheme),
            name: "forge_wgrad_sm80",
            what: &specialise::name(scheme),
            grid: grid(self.blocks.into())?,
            block: sm80::THREADS,
            shared_bytes: self.shared_bytes,
        };
        let params = self.params();
        // SAFETY: as promised by the caller; the kernel declares this parameter.
        unsafe { gpu.run(kernel, &mut parameters!(params), stream) }
    }
}

/// Weights that one kernel can update with the same scalars.
struct Bucket<'a> {
    first: GroupEntry<'a>,
    /// The scheme's part of them.
    defines: Vec<String>,
    /// Decides who is taken.
    like: Group,
    launches: Vec<(usize, Launch)>,
}

impl Bucket<'_> {
    /// Cuts all weights into the tiles that suit as many as they are; small ones together are as good as a
    /// large one.
    fn cut(mut self, limits: &Limits) -> Self {
        let tiles = self.launches.iter().map(|(_, l)| sm80::tall_tiles(&l.whole)).sum();
        let rows = sm80::rows_for(tiles, limits);
        let cut = |(index, launch): (usize, Launch)| (index, launch.cut(rows));
        self.launches = self.launches.into_iter().map(cut).collect();
        self
    }
}

/// An entry's launch, where it is one for a group.
fn plan(gpu: &Gpu, mainloop: Mainloop, entry: &GroupEntry, scalars: DevicePtr) -> Option<Launch> {
    let limits = Limits::of(gpu);
    if !is_small(entry.shard, limits.sm_count, mainloop) {
        return None;
    }
    let call = sm80::Call {
        scheme: entry.scheme,
        shard: entry.shard,
        factors: entry.factors,
        accumulator: entry.accumulator,
        arrays: Some(entry.arrays),
        mode: Mode::Update,
        step: reduce::step_at(entry.scheme, entry.step, scalars),
        partials: 0,
    };
    call.plan_with(SMALL_ROWS).filter(|l| l.shared_bytes <= limits.shared_memory_per_block)
}

fn buckets<'a>(
    gpu: &Gpu,
    entries: &[GroupEntry<'a>],
    mainloop: impl Fn(&GroupEntry) -> Mainloop,
    scalars: DevicePtr,
    taken: &[bool],
) -> Vec<Bucket<'a>> {
    let mut buckets: Vec<Bucket> = Vec::new();
    let limits = Limits::of(gpu);
    for (index, entry) in entries.iter().enumerate().filter(|(index, _)| !taken[*index]) {
        let Some(launch) = plan(gpu, mainloop(entry), entry, scalars) else { continue };
        let defines = specialise::update(entry.scheme);
        let dtype = entry.scheme.factor_dtype;
        let same = |b: &&mut Bucket| {
            b.like.takes(&launch)
                && same_scalars(&b.first, entry)
                && b.first.scheme.factor_dtype == dtype
                && b.defines == defines
        };
        if let Some(bucket) = buckets.iter_mut().find(same) {
            bucket.launches.push((index, launch));
        } else {
            let like = Group::for_launches_like(&launch);
            let launches = vec![(index, launch)];
            buckets.push(Bucket { first: *entry, defines, like, launches });
        }
    }
    buckets.into_iter().map(|bucket| bucket.cut(&limits)).collect()
}

/// Reports that are due: their partials are kept until they have been made.
struct Due {
    base: DevicePtr,
    partials: u64,
    reports: Vec<ReportOf>,
    stream: Stream,
}

impl Due {
    /// Where to leave this many partials for a report at `target`; 0: nowhere, since nobody asked.
    fn add(&mut self, count: u64, target: DevicePtr) -> DevicePtr {
        if target == 0 {
            return 0;
        }
        let partials = self.base + 16 * self.partials;
        self.partials += count;
        self.reports.push(ReportOf { partials, count, target });
        partials
    }

    /// The same for each of some weights, one behind the other; 0 where nobody asked for any.
    fn add_all(&mut self, each: u64, targets: &[DevicePtr]) -> DevicePtr {
        if targets.iter().all(|target| *target == 0) {
            return 0;
        }
        let first = self.base + 16 * self.partials;
        for (target, k) in targets.iter().zip(0..).filter(|(target, _)| **target != 0) {
            let partials = first + 16 * each * k;
            self.reports.push(ReportOf { partials, count: each, target: *target });
        }
        self.partials += each * targets.len() as u64;
        first
    }

    /// Whether one more launch of weights with so many tiles may not fit.
    fn is_full_for(&self, tiles: u64, reports: usize) -> bool {
        self.partials + tiles > MOST_PARTIALS || self.reports.len() + reports > MOST_REPORTS
    }

    /// Enqueues them.
    ///
    /// # Safety
    /// As [`enqueue`].
    unsafe fn make(&mut self, gpu: &Gpu) -> Result<()> {
        // SAFETY: as promised by the caller.
        unsafe { reduce::reports(gpu, &self.reports, self.stream)? };
        self.reports.clear();
        self.partials = 0;
        Ok(())
    }
}

/// Weights that one launch of the kernel of 9.0 can have.
struct Alike<'a> {
    first: GroupEntry<'a>,
    defines: Vec<String>,
    dtype: Dtype,
    ones: Vec<(usize, sm90::group::One<'a>)>,
}

/// What the kernel of 9.0 takes: weights of one shape.
fn alike<'a>(
    gpu: &'a Gpu,
    entries: &[GroupEntry<'a>],
    mainloop: impl Fn(&GroupEntry) -> Mainloop,
    scalars: DevicePtr,
) -> Vec<Alike<'a>> {
    let mut kinds: Vec<Alike> = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let small = is_small(entry.shard, gpu.properties().sm_count, Mainloop::Sm90);
        if !small || mainloop(entry) != Mainloop::Sm90 {
            continue;
        }
        let step = reduce::step_at(entry.scheme, entry.step, scalars);
        let Some(one) = sm90::group::One::new(gpu, entry, step) else { continue };
        let (defines, dtype) = (specialise::update(entry.scheme), entry.scheme.factor_dtype);
        let like = |k: &&mut Alike| {
            k.dtype == dtype
                && same_scalars(&k.first, entry)
                && k.ones[0].1.is_like(&one)
                && k.defines == defines
        };
        match kinds.iter_mut().find(like) {
            Some(kind) => kind.ones.push((index, one)),
            None => kinds.push(Alike { first: *entry, defines, dtype, ones: vec![(index, one)] }),
        }
    }
    kinds.retain(|kind| kind.ones.len() > 1);
    kinds
}

/// Enqueues what the kernel of 9.0 takes of them; which entries that were.
///
/// # Safety
/// As [`enqueue`].
unsafe fn enqueue_sm90(
    gpu: &Gpu,
    entries: &[GroupEntry],
    mainloop: impl Fn(&GroupEntry) -> Mainloop,
    workspace: &Workspace,
    due: &mut Due,
) -> Result<Vec<bool>> {
    let mut taken = vec![false; entries.len()];
    for Alike { first, ones, .. } in &alike(gpu, entries, mainloop, workspace.scalars) {
        let partials = sm90::group::most_partials(&[&ones[0].1]);
        let most = ones[0].1.room().min((MOST_PARTIALS / partials) as usize).max(1);
        let launches = ones.len().div_ceil(most);
        let stream = due.stream;
        // SAFETY: as promised by the caller.
        unsafe { reduce::prologue(gpu, first.scheme, first.step, workspace.scalars, stream)? };
        // About as many in each.
        for now in ones.chunks(ones.len().div_ceil(launches)) {
            let targets: Vec<DevicePtr> =
                now.iter().map(|(index, _)| entries[*index].device_report as DevicePtr).collect();
            let group: Vec<_> = now.iter().map(|(_, one)| one).collect();
            // SAFETY: as promised by the caller. Nothing else of this call is in the panel's place.
            let done = unsafe {
                if due.is_full_for(sm90::group::most_partials(&group), now.len()) {
                    due.make(gpu)?;
                }
                let partials = |each| due.add_all(each, &targets);
                sm90::group::enqueue(&group, partials, workspace.panel, stream)?
            };
            now.iter().for_each(|(index, _)| taken[*index] = done);
        }
    }
    Ok(taken)
}

/// Enqueues what several small weights have in common; which entries that were, by index. The others are left
/// to the caller.
///
/// # Safety
/// As [`super::super::Backend::update_group`]; the context is current.
pub unsafe fn enqueue(
    gpu: &Gpu,
    entries: &[GroupEntry],
    mainloop: impl Fn(&GroupEntry) -> Mainloop,
    workspace: &Workspace,
    stream: Stream,
) -> Result<Vec<bool>> {
    let mut due = Due { base: workspace.partials, partials: 0, reports: Vec::new(), stream };
    // SAFETY: as promised by the caller.
    let mut taken = unsafe { enqueue_sm90(gpu, entries, &mainloop, workspace, &mut due)? };
    for bucket in buckets(gpu, entries, mainloop, workspace.scalars, &taken) {
        if bucket.launches.len() < 2 {
            continue;
        }
        let GroupEntry { scheme, step, .. } = bucket.first;
        // Each bucket's launches come behind its own prologue, so that one place does for all.
        // SAFETY: as promised by the caller.
        unsafe { reduce::prologue(gpu, scheme, step, workspace.scalars, stream)? };
        let mut rest = &bucket.launches[..];
        while !rest.is_empty() {
            let mut group = Group::for_launches_like(&rest[0].1);
            let n = rest.iter().take_while(|(_, launch)| group.add(launch)).count();
            let (now, later) = rest.split_at(n);
            rest = later;
            // SAFETY: as promised by the caller.
            unsafe {
                let tiles = now.iter().map(|(_, launch)| launch.whole.tiles()).sum();
                if due.is_full_for(tiles, n) {
                    due.make(gpu)?;
                }
                for (problem, (index, launch)) in group.problems.iter_mut().zip(now) {
                    let target = entries[*index].device_report as DevicePtr;
                    problem.partials = due.add(launch.whole.tiles(), target);
                    taken[*index] = true;
                }
                group.run(gpu, scheme, stream)?;
            }
        }
    }
    // SAFETY: as promised by the caller.
    unsafe { due.make(gpu)? };
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_is_what_leaves_multiprocessors_idle() {
        let small = |rows, cols, mainloop| {
            let shard =
                Shard { rows, cols, row_offset: 0, col_offset: 0, global_cols: cols as u64 };
            is_small(&shard, 132, mainloop)
        };
        assert!(small(512, 512, Mainloop::Sm80) && small(512, 512, Mainloop::Sm90));
        // 256 tiles.
        assert!(small(2048, 1024, Mainloop::Sm80) && !small(2048, 1024, Mainloop::Sm90));
        assert!(!small(2048, 2048, Mainloop::Sm80) && !small(64, 64, Mainloop::Panel));
    }
}
