//! One sharded linear layer, and the order of events of its backward.

mod group;
mod plan;
mod shape;

pub use group::{GroupUpdate, update_group};
pub use plan::{Plan, PlanRequest, Schedule};
pub use shape::{ArrayLayout, Layout, Parallel, Shape};

use crate::backend::{
    Accumulator, Arrays, Backend, Deliver, Factors, Image, Matrix, Norm, NormMethod, Report,
    Scheme, StepSource, Stream,
};
use crate::comm::Comm;
use crate::error::Result;
use std::ffi::c_void;
use std::sync::Arc;

/// A linear: immutable after creation; the arrays are the caller's and come with each call.
pub struct Linear {
    /// Where it runs.
    pub backend: Arc<dyn Backend>,
    /// With whom it shares W.
    pub comm: Arc<dyn Comm>,
    /// Sizes, globally and here.
    pub shape: Shape,
    /// Formats and rule.
    pub scheme: Scheme,
}

/// What a backward does with dW.
#[derive(Clone, Copy)]
// One for each call, on the stack.
#[allow(clippy::large_enum_variant)]
pub enum Mode {
    /// Consume it: the schedule `immediate`, or the last micro-batch of `accumulate`.
    Update {
        /// Scalars of the step.
        step: StepSource,
        /// Earlier micro-batches' sum.
        accumulator: Option<Accumulator>,
    },
    /// Add it to a buffer.
    Accumulate(Accumulator),
    /// Nothing: the caller keeps the factors for later.
    Keep {
        /// A `forge_norm` of them in the backend's memory; null: not wanted.
        norm: *mut c_void,
    },
}

/// One backward.
pub struct Backward {
    /// After gathering.
    pub tokens: usize,
    /// As the layer's neighbours have it: row parallel with SP, this rank's tokens only.
    pub dy: Matrix,
    /// As the layer's neighbours have it: column parallel with SP, this rank's tokens only.
    pub x: Matrix,
    /// Where dX goes; None where nobody needs it.
    pub dx: Option<*mut u8>,
    /// Where dbias goes.
    pub dbias: Option<*mut u8>,
    /// Of [`Shape::workspace_bytes`].
    pub workspace: *mut u8,
    /// The parameter.
    pub arrays: Arrays,
    /// What happens to dW.
    pub mode: Mode,
    /// Where the report of an update is wanted.
    pub deliver: Deliver,
    /// What orders the work.
    pub stream: Stream,
}

/// What the host is told of a backward.
#[derive(Clone, Copy, Debug, Default)]
pub struct Told {
    /// Of an update, if wanted.
    pub report: Option<Report>,
    /// Of kept factors, if wanted, where the backend's memory is the host's.
    pub norm: Option<Norm>,
}

impl Linear {
    /// The whole backward, in the one order there is. Returns what the host is told of it.
    ///
    /// | | before the update | beside it |
    /// |---|---|---|
    /// | column | dX = dY·W | all-reduce dX |
    /// | column + SP | all-gather X ‖ dX = dY·W | reduce-scatter dX |
    /// | row | dX = dY·W | |
    /// | row + SP | all-gather dY, dX = dY·W | |
    ///
    /// # Safety
    /// All pointers are valid for the shapes, and those written overlap no other.
    pub unsafe fn backward(&self, b: &Backward) -> Result<Told> {
        let Self { backend, comm, shape, scheme } = self;
        let (shard, dtype) = (&shape.shard, scheme.factor_dtype);
        let local_tokens = shape.local_tokens(b.tokens);
        let mut factors = Factors { dy: b.dy, x: b.x, tokens: b.tokens };
        let mut reduced_dx = b.workspace;

        // SAFETY: sizes were checked against `Shape::workspace_bytes` and the layouts; operations on
        // one buffer are ordered by `wait`.
        unsafe {
            // 1. Start the gather; only a row-parallel dX needs it at once. Without tokens there is
            //    nothing to communicate, on any rank: they agree on the count.
            let gathered = shape.gathered_features().filter(|_| b.tokens > 0);
            if let Some((features, gathers_x)) = gathered {
                let source = if gathers_x { b.x } else { b.dy };
                comm.all_gather(
                    source.data,
                    b.workspace,
                    local_tokens * features,
                    dtype,
                    b.stream,
                )?;
                let gathered = Matrix { data: b.workspace, stride: features };
                if gathers_x {
                    factors.x = gathered;
                    reduced_dx = b.workspace.add(shape.gathered_bytes(b.tokens, dtype));
                } else {
                    factors.dy = gathered;
                    comm.wait(b.stream)?;
                }
            }
            // 2. dX with W as it was, and its reduction; both before W changes, so that a failed
            //    collective leaves the weights as they were.
            if let Some(dx) = b.dx {
                let partial = if shape.scatters_dx() { reduced_dx } else { dx };
                let w = b.arrays.weight;
                backend.dgrad(scheme, shard, b.tokens, factors.dy, w, partial, b.stream)?;
                comm.wait(b.stream)?;
                if shape.scatters_dx() && b.tokens > 0 {
                    comm.reduce_scatter(partial, dx, local_tokens * shard.cols, dtype, b.stream)?;
                } else if shape.reduces_dx() && b.tokens > 0 {
                    comm.all_reduce(dx, b.tokens * shard.cols, dtype, b.stream)?;
                }
            } else {
                comm.wait(b.stream)?;
            }
            if let Some(dbias) = b.dbias {
                backend.bias_grad(scheme, shard, b.tokens, factors.dy, dbias, b.stream)?;
            }
            // 3. dW, beside the reduction of dX.
            let mut told = Told::default();
            match b.mode {
                Mode::Update { step, accumulator } => {
                    let (arrays, deliver) = (&b.arrays, b.deliver);
                    told.report =
                        self.update(&[factors], accumulator, arrays, &step, deliver, b.stream)?;
                }
                Mode::Accumulate(buffer) => {
                    backend.accumulate(scheme, shard, &[factors], buffer, b.stream)?;
                }
                Mode::Keep { norm } if !norm.is_null() => {
                    let deliver = Deliver { host: false, device: norm };
                    told.norm = self.norm(&[factors], None, NormMethod::Auto, deliver, b.stream)?;
                }
                Mode::Keep { .. } => {}
            }
            comm.wait(b.stream)?;
            Ok(told)
        }
    }

    /// The fused update over the tokens of all segments.
    ///
    /// # Safety
    /// As [`Linear::backward`].
    pub unsafe fn update(
        &self,
        factors: &[Factors],
        accumulator: Option<Accumulator>,
        arrays: &Arrays,
        step: &StepSource,
        deliver: Deliver,
        stream: Stream,
    ) -> Result<Option<Report>> {
        let Self { backend, shape, scheme, .. } = self;
        let shard = &shape.shard;
        // SAFETY: as promised by the caller.
        let report = unsafe {
            backend.update(scheme, shard, factors, accumulator, arrays, step, deliver, stream)?
        };
        self.warn_of(report);
        Ok(report)
    }

    /// Says so where an update has left something out.
    fn warn_of(&self, report: Option<Report>) {
        if let Some(report) = report.filter(|r| r.nonfinite_tiles > 0) {
            tracing::warn!(
                target: "forge",
                "parameter {}: {} of {} tiles had a non-finite gradient and were left as they were",
                self.scheme.parameter_id,
                report.nonfinite_tiles,
                report.tiles
            );
        }
    }

    /// `accumulator += Σ dYᵀX`.
    ///
    /// # Safety
    /// As [`Linear::backward`].
    pub unsafe fn accumulate(
        &self,
        factors: &[Factors],
        accumulator: Accumulator,
        stream: Stream,
    ) -> Result<()> {
        let shard = &self.shape.shard;
        // SAFETY: as promised by the caller.
        unsafe { self.backend.accumulate(&self.scheme, shard, factors, accumulator, stream) }
    }

    /// `‖Σ dYᵀX (+ accumulator)‖²` of this shard.
    ///
    /// # Safety
    /// As [`Linear::backward`].
    pub unsafe fn norm(
        &self,
        factors: &[Factors],
        accumulator: Option<Accumulator>,
        method: NormMethod,
        deliver: Deliver,
        stream: Stream,
    ) -> Result<Option<Norm>> {
        let (scheme, shard) = (&self.scheme, &self.shape.shard);
        // SAFETY: as promised by the caller.
        unsafe { self.backend.norm(scheme, shard, factors, accumulator, method, deliver, stream) }
    }

    /// `dX = dY · W`, no communication.
    ///
    /// # Safety
    /// As [`Linear::backward`].
    pub unsafe fn dgrad(
        &self,
        tokens: usize,
        dy: Matrix,
        weight: *const u8,
        dx: *mut u8,
        stream: Stream,
    ) -> Result<()> {
        let (scheme, shard) = (&self.scheme, &self.shape.shard);
        // SAFETY: as promised by the caller.
        unsafe { self.backend.dgrad(scheme, shard, tokens, dy, weight, dx, stream) }
    }

    /// An array as fp32.
    ///
    /// # Safety
    /// As [`Linear::backward`].
    pub unsafe fn export(
        &self,
        arrays: &Arrays,
        image: Image,
        out: *mut f32,
        stream: Stream,
    ) -> Result<()> {
        let (scheme, shard) = (&self.scheme, &self.shape.shard);
        // SAFETY: as promised by the caller.
        unsafe { self.backend.export(scheme, shard, arrays, image, out, stream) }
    }

    /// An array from fp32.
    ///
    /// # Safety
    /// As [`Linear::backward`].
    pub unsafe fn import(
        &self,
        arrays: &Arrays,
        image: Image,
        values: *const f32,
        stream: Stream,
    ) -> Result<()> {
        let (scheme, shard) = (&self.scheme, &self.shape.shard);
        // SAFETY: as promised by the caller.
        unsafe { self.backend.import(scheme, shard, arrays, image, values, stream) }
    }
}
