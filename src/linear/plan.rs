//! Which schedule a layer gets, from bytes.

use super::{Linear, Reduction, exchange_bytes, panel_bytes, reductions};
use crate::error::{Result, bail};

/// When the update happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// The cheapest in memory that the request allows.
    Auto,
    /// Inside the backward.
    Immediate,
    /// At the step, from kept factors.
    Deferred,
    /// At the step, from an fp32 buffer and, where they are smaller than it, the last micro-batch's
    /// factors.
    Accumulate,
}

/// What a step looks like.
#[derive(Clone, Copy, Debug)]
pub struct PlanRequest {
    /// `Auto`, or the one that the user asked for.
    pub schedule: Schedule,
    /// After gathering.
    pub tokens_per_micro_batch: u64,
    /// In a step.
    pub micro_batches: u32,
    /// Whether the update must wait for all gradients: clipping, an all-or-nothing check.
    pub needs_norm: bool,
}

/// The decision and what it costs.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Never `Auto`.
    pub schedule: Schedule,
    /// Kept from the backward to the step.
    pub factor_bytes: u64,
    /// Of the fp32 buffer; 0 where the step never needs it.
    pub accumulator_bytes: u64,
    /// What a stock fp32 gradient takes.
    pub gradient_bytes: u64,
    /// How dW is summed over data-parallel ranks; None where there is one.
    pub reduction: Option<Reduction>,
    /// Received for that in a step.
    pub wire_bytes: u64,
    /// One sentence.
    pub reason: String,
}

impl Linear {
    /// Chooses a schedule, or checks the one asked for.
    pub fn plan(&self, request: &PlanRequest) -> Result<Plan> {
        self.shape.check_tokens(request.tokens_per_micro_batch)?;
        let (micro_batches, needs_norm) = (request.micro_batches, request.needs_norm);
        if micro_batches == 0 {
            bail!(FORGE_ERROR_SHAPE, "micro_batches: 0; a step has at least one");
        }
        let (shard, owned, tokens) =
            (&self.shape.shard, self.shape.owned(), request.tokens_per_micro_batch);
        let gradient_bytes = (owned.rows * owned.cols * 4) as u64;
        let dtype = self.scheme.factor_dtype;
        let replicas = self.data_parallel.as_ref();
        let reduction = replicas.map(|r| r.choose(&self.shape, tokens as usize, dtype));
        let panels = reduction == Some(Reduction::Panels);
        // Exchanged factors are of the tokens of all data-parallel ranks and of the owned rows, others of this rank's
        // and of all its rows.
        let (of_tokens, rows) =
            if panels { (1, shard.rows) } else { (self.shape.replicas, owned.rows) };
        let per_token = (of_tokens * (rows + shard.cols) * dtype.bytes()) as u64;
        // u128: nothing bounds the number of micro-batches.
        let one = u128::from(tokens) * u128::from(per_token);
        let all = one * u128::from(micro_batches);
        let saturate = |bytes: u128| u64::try_from(bytes).unwrap_or(u64::MAX);
        let immediate_is_possible = micro_batches == 1 && !needs_norm;
        // The last micro-batch joins the update's own pass, unless its factors outgrow the buffer.
        let last = if one <= u128::from(gradient_bytes) { one } else { 0 };
        // What panels are reduced to is a buffer under any schedule.
        let buffered = u128::from(gradient_bytes) + if panels { 0 } else { last };

        let (schedule, reason) = match request.schedule {
            Schedule::Immediate if !immediate_is_possible => bail!(
                FORGE_ERROR_UNSUPPORTED,
                "schedule: 'immediate' updates inside the backward and takes one micro-batch and no \
                 clipping (asked: {micro_batches} micro-batches, clipping {}); \
                 use 'deferred', 'accumulate' or 'auto'",
                if needs_norm { "on" } else { "off" }
            ),
            Schedule::Auto if immediate_is_possible => {
                (Schedule::Immediate, "one micro-batch, no clipping: nothing is kept".to_string())
            }
            Schedule::Auto if all <= buffered => (
                Schedule::Deferred,
                format!("factors of the step ({all} B) are no more than a buffer ({buffered} B)"),
            ),
            Schedule::Auto => (
                Schedule::Accumulate,
                format!("factors of the step ({all} B) would outgrow a buffer ({buffered} B)"),
            ),
            asked => (asked, "as asked".to_string()),
        };
        let (factor_bytes, accumulator_bytes) = match schedule {
            Schedule::Deferred if panels => (saturate(all), gradient_bytes),
            Schedule::Deferred => (saturate(all), 0),
            // As many micro-batches wait for a reduction as are no more than the buffer.
            Schedule::Accumulate if panels => {
                let most = all.min(u128::from(gradient_bytes).max(one));
                (saturate(most), gradient_bytes)
            }
            // The only micro-batch is the last one, and where its factors are kept nothing is left
            // for a buffer.
            Schedule::Accumulate if micro_batches == 1 && last == one => (saturate(one), 0),
            Schedule::Accumulate => (saturate(last), gradient_bytes),
            _ => (0, 0),
        };
        let wire = match reduction {
            None => 0,
            Some(Reduction::Panels) if schedule == Schedule::Deferred => panel_bytes(&self.shape),
            Some(Reduction::Panels) => {
                let times = reductions(&self.shape, tokens, micro_batches, dtype);
                panel_bytes(&self.shape) * u128::from(times)
            }
            Some(_) => exchange_bytes(&self.shape, tokens, dtype) * u128::from(micro_batches),
        };
        let wire_bytes = saturate(wire);
        Ok(Plan {
            schedule,
            factor_bytes,
            accumulator_bytes,
            gradient_bytes,
            reduction,
            wire_bytes,
            reason,
        })
    }
}
