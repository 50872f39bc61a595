//! One sharded linear layer, and the order of events of its backward.

mod data_parallel;
mod group;
mod plan;
mod shape;

pub use data_parallel::{
    DataParallel, ExchangePlaces, Reduction, exchange_bytes, panel_bytes, reductions,
};
pub use group::{GroupUpdate, update_group};
pub use plan::{Plan, PlanRequest, Schedule};
pub use shape::{ArrayLayout, Layout, Parallel, Shape};

use crate::backend::{
    Accumulator, Arrays, Backend, Deliver, Factors, Image, Matrix, Norm, NormMethod, Report,
    Scheme, StepSource, Stream,
};
use crate::comm::Comm;
use crate::error::{Result, bail};
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
    /// With whom it shares out tokens and the rows that are updated; None where nobody else has this shard.
    pub data_parallel: Option<DataParallel>,
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
    /// With data parallelism factors are exchanged beside dX and its reduction, or panels of dW reduced after it;
    /// after an update W is gathered, which nobody waits for here.
    ///
    /// # Safety
    /// All pointers are valid for the shapes, and those written overlap no other.
    pub unsafe fn backward(&self, b: &Backward) -> Result<Told> {
        // SAFETY: as promised by the caller.
        let done = unsafe { self.enqueue_backward(b) };
        if done.is_err() {
            self.let_go(b.stream);
        }
        done
    }

    /// Comes after what communicators still read and write in the caller's buffers, which may be freed next.
    fn let_go(&self, stream: Stream) {
        // It has failed already; there is nothing to be done about another failure.
        let _ = self.comm.wait(stream);
        if let Some(replicas) = &self.data_parallel {
            let _ = replicas.comm.wait(stream);
        }
    }

    /// # Safety
    /// As [`Linear::backward`].
    unsafe fn enqueue_backward(&self, b: &Backward) -> Result<Told> {
        let Self { backend, comm, shape, scheme, .. } = self;
        let (shard, dtype) = (&shape.shard, scheme.factor_dtype);
        let local_tokens = shape.local_tokens(b.tokens);
        let mut factors = Factors { dy: b.dy, x: b.x, tokens: b.tokens };
        // Of panels ranks may have different numbers of tokens; a rank without any takes part.
        let takes_part = |r: &&DataParallel| b.tokens > 0 || r.reduction == Reduction::Panels;
        let replicas = self.data_parallel.as_ref().filter(takes_part);
        let exchange = replicas.filter(|_| self.exchanges(b.tokens));
        let what = (shape, dtype);
        let keeps = matches!(b.mode, Mode::Keep { .. });
        let reduced = self.reduction_bytes(keeps, b.tokens);

        // SAFETY: sizes were checked against `Linear::workspace_bytes` and the layouts; operations on
        // one buffer are ordered by `wait`.
        unsafe {
            let gathered_at = b.workspace.add(reduced);
            let mut reduced_dx = gathered_at;
            // 1. Start the gather; only a row-parallel dX needs it at once. Without tokens there is
            //    nothing to communicate, on any rank: they agree on the count.
            let gathered = shape.gathered_features().filter(|_| b.tokens > 0);
            let mut x_is_whole = true;
            if let Some((features, gathers_x)) = gathered {
                let source = if gathers_x { b.x } else { b.dy };
                comm.all_gather(
                    source.data,
                    gathered_at,
                    local_tokens * features,
                    dtype,
                    b.stream,
                )?;
                let gathered = Matrix { data: gathered_at, stride: features };
                if gathers_x {
                    factors.x = gathered;
                    reduced_dx = gathered_at.add(shape.gathered_bytes(b.tokens, dtype));
                    x_is_whole = false;
                } else {
                    factors.dy = gathered;
                    comm.wait(b.stream)?;
                }
            }
            if let Some(replicas) = exchange {
                let (dy, to) = (factors.dy, b.workspace);
                replicas.send_dy(&**backend, what, b.tokens, dy, to, b.stream)?;
                if x_is_whole {
                    replicas.gather_x(what, b.tokens, factors.x, to, b.stream)?;
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
            if let Some(replicas) = exchange.filter(|_| !x_is_whole) {
                replicas.gather_x(what, b.tokens, factors.x, b.workspace, b.stream)?;
            }
            if let Some(dbias) = b.dbias {
                backend.bias_grad(scheme, shard, b.tokens, factors.dy, dbias, b.stream)?;
            }
            // 3. dW, beside the reduction of dX.
            if let Some(replicas) = exchange {
                factors = replicas.received(what, b.tokens, b.workspace, b.stream)?;
            } else if self.data_parallel.is_some() && b.tokens == 0 {
                factors = Factors { tokens: 0, ..factors };
            }
            let panels = replicas.filter(|_| exchange.is_none());
            let mut told = Told::default();
            match b.mode {
                Mode::Update { step, accumulator } => {
                    let (arrays, deliver) = (&b.arrays, b.deliver);
                    let own = [factors];
                    let (left, sum) = match panels {
                        Some(_) => {
                            let to = b.workspace;
                            let sum = self.sum_panels(&own, accumulator, false, to, b.stream)?;
                            (&own[..0], Some(sum))
                        }
                        None => (&own[..], accumulator),
                    };
                    told.report = self.update(left, sum, arrays, &step, deliver, b.stream)?;
                }
                Mode::Accumulate(buffer) if panels.is_some() => {
                    self.reduce(&[factors], buffer, b.workspace, b.stream)?;
                }
                Mode::Accumulate(buffer) => self.accumulate(&[factors], buffer, b.stream)?,
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

    /// `accumulator += Σ dYᵀX` of the owned rows and of all ranks, by panels; factors are of all rows of the shard,
    /// of this rank's tokens.
    ///
    /// # Safety
    /// As [`Linear::backward`]; `workspace` has [`Shape::panel_workspace`].
    pub unsafe fn reduce(
        &self,
        factors: &[Factors],
        accumulator: Accumulator,
        workspace: *mut u8,
        stream: Stream,
    ) -> Result<()> {
        // SAFETY: as promised by the caller.
        let done = unsafe { self.sum_panels(factors, Some(accumulator), true, workspace, stream) };
        if done.is_err() {
            self.let_go(stream);
        }
        done.map(|_| ())
    }

    /// The same into the workspace, or where `writes` says so into the accumulator itself.
    ///
    /// # Safety
    /// As [`Linear::reduce`].
    unsafe fn sum_panels(
        &self,
        factors: &[Factors],
        accumulator: Option<Accumulator>,
        writes: bool,
        workspace: *mut u8,
        stream: Stream,
    ) -> Result<Accumulator> {
        let Some(replicas) = &self.data_parallel else {
            bail!(FORGE_ERROR_UNSUPPORTED, "linear: not data parallel; nothing is reduced");
        };
        let (backend, scheme, shape) = (&*self.backend, &self.scheme, &self.shape);
        // SAFETY: as promised by the caller.
        unsafe {
            replicas.reduce_panels(
                backend,
                scheme,
                shape,
                factors,
                accumulator,
                writes,
                workspace,
                stream,
            )
        }
    }

    /// Whether a backward of this many tokens exchanges factors.
    pub fn exchanges(&self, tokens: usize) -> bool {
        let dtype = self.scheme.factor_dtype;
        let chosen = |r: &DataParallel| r.choose(&self.shape, tokens, dtype);
        self.data_parallel.as_ref().map(chosen) == Some(Reduction::Exchange)
    }

    /// Bytes at the start of a workspace that dW's reduction needs.
    fn reduction_bytes(&self, keeps: bool, tokens: usize) -> usize {
        if self.data_parallel.is_none() {
            0
        } else if self.exchanges(tokens) {
            ExchangePlaces::new(&self.shape, tokens, self.scheme.factor_dtype).bytes
        } else if keeps {
            // Factors that stay here.
            0
        } else {
            self.shape.panel_workspace()
        }
    }

    /// Bytes that a backward of this many tokens, which keeps its factors or not, needs beside its buffers.
    pub fn workspace_bytes(&self, keeps: bool, tokens: usize) -> usize {
        let gathered = self.shape.workspace_bytes(tokens, self.scheme.factor_dtype);
        self.reduction_bytes(keeps, tokens) + gathered
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
        let Self { backend, scheme, .. } = self;
        let (shard, own) = (&self.shape.owned(), &self.own(arrays));
        // SAFETY: as promised by the caller.
        let report = unsafe {
            let report =
                backend.update(scheme, shard, factors, accumulator, own, step, deliver, stream)?;
            self.gather_weight(arrays.weight, stream)?;
            report
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
        let shard = &self.shape.owned();
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
        let (scheme, shard) = (&self.scheme, &self.shape.owned());
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
        let (scheme, shard, arrays) = (&self.scheme, &self.shape.owned(), &self.own(arrays));
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
        let (scheme, shard, arrays) = (&self.scheme, &self.shape.owned(), &self.own(arrays));
        // SAFETY: as promised by the caller.
        unsafe { self.backend.import(scheme, shard, arrays, image, values, stream) }
    }
}
