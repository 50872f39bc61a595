//! `forge_linear`: creation, layout, plan.

use super::boundary::{boundary, check_out_struct, check_pointer, handle, read_struct};
use super::comm::forge_comm;
use super::context::forge_context;
use super::enums::forge_backward_mode;
use super::types::{
    forge_array_layout, forge_layout, forge_linear_config, forge_plan, forge_plan_request,
};
use super::{dtype_code, enums};
use crate::backend::{Fp32Products, Scheme};
use crate::comm::Comm;
use crate::error::{Result, bail, forge_status};
use crate::format::{Dtype, StateFormat};
use crate::linear::{ArrayLayout, DataParallel, Layout, Linear, PlanRequest, Shape};
use crate::rule::{self, MAX_STATES};
use std::ffi::c_char;

/// A sharded linear. Opaque; immutable, so that threads may share it.
pub struct forge_linear {
    pub(super) linear: Linear,
    pub(super) layout: Layout,
}

pub(super) fn flag(name: &str, value: u32) -> Result<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => bail!(FORGE_ERROR_ENUM, "{name}: {value} is neither 0 nor 1"),
    }
}

/// # Safety
/// `config.rule` is NULL or NUL-terminated.
pub(super) unsafe fn scheme(config: &forge_linear_config) -> Result<Scheme> {
    // SAFETY: as promised by the caller.
    let rule = unsafe { super::rule::find(config.rule)? };
    rule::check_flags(rule, config.rule_flags)?;
    let factor_dtype = match enums::dtype("factor_dtype", config.factor_dtype)? {
        Some(dtype @ (Dtype::F32 | Dtype::Bf16 | Dtype::F16)) => dtype,
        other => {
            bail!(FORGE_ERROR_UNSUPPORTED, "factor_dtype: {other:?}; factors are F32, BF16 or F16")
        }
    };
    let fp32_products = enums::fp32_products("fp32_products", config.fp32_products)?;
    if fp32_products != Fp32Products::Exact && factor_dtype != Dtype::F32 {
        bail!(
            FORGE_ERROR_UNSUPPORTED,
            "fp32_products: {fp32_products:?} with factors of {factor_dtype:?}, which are multiplied as they \
             are; set it to 0"
        );
    }
    let n_states = rule.states(config.rule_flags).len();
    let mut state_formats = [StateFormat::F32; MAX_STATES];
    for (k, format) in state_formats[..n_states].iter_mut().enumerate() {
        let name = format!("state_formats[{k}]");
        *format = enums::state_format(&name, config.state_formats[k])?;
    }
    Ok(Scheme {
        rule,
        flags: config.rule_flags,
        n_states,
        weight_format: enums::weight_format("weight_format", config.weight_format)?,
        weight_rounding: enums::rounding("weight_rounding", config.weight_rounding)?,
        state_formats,
        state_rounding: enums::rounding("state_rounding", config.state_rounding)?,
        factor_dtype,
        fp32_products,
        parameter_id: config.parameter_id,
    })
}

/// Makes a linear. It keeps what it needs of context and communicator, which may be freed before it.
/// Nothing is allocated that grows with W.
///
/// Errors: FORGE_ERROR_RULE (no such rule, a flag that it does not take), FORGE_ERROR_ENUM, FORGE_ERROR_SHAPE
/// (features of 0), FORGE_ERROR_OVERFLOW, FORGE_ERROR_SHARD (features that do not divide by the ranks),
/// FORGE_ERROR_UNSUPPORTED (factors of another dtype; fp32_products of 16-bit factors; sequence parallelism
/// without parallelism).
///
/// # Safety
/// `context` and `comm` are live, `config` points to a struct of its `struct_size` whose `rule` is
/// NUL-terminated, `out_linear` points to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_new(
    context: *mut forge_context,
    comm: *mut forge_comm,
    config: *const forge_linear_config,
    out_linear: *mut *mut forge_linear,
) -> forge_status {
    // SAFETY: as promised by the caller.
    boundary(|| unsafe { new(context, comm, None, config, out_linear) })
}

/// As forge_linear_new, of a linear whose W the ranks of `data_parallel` have as well, with other tokens. Each rank
/// owns as many of its rows: it has their states, and updates them over the tokens of all; no rank ever has a whole
/// gradient. `reduction` (a forge_reduction) says how dW is summed; a backward and an update start to gather W, and
/// forge_comm_wait of `data_parallel` comes before W is read. Ranks make the same calls with as many tokens each; with
/// FORGE_REDUCTION_PANELS their numbers of tokens may differ, and be 0.
///
/// `micro_batches` is how many backwards a step has, at least 1: FORGE_REDUCTION_AUTO compares factors that are
/// exchanged in each with panels that are reduced when the factors that wait outgrow the accumulator. A gradient is
/// the sum over ranks: divide by their number with grad_scale where the loss is a mean.
///
/// Errors: as forge_linear_new; FORGE_ERROR_SHARD (rows that do not divide by the ranks of `data_parallel`);
/// FORGE_ERROR_NULL (collectives of the caller's without `all_to_all`).
///
/// # Safety
/// As forge_linear_new; `data_parallel` is live, and of the same context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_new_data_parallel(
    context: *mut forge_context,
    comm: *mut forge_comm,
    data_parallel: *mut forge_comm,
    reduction: u32,
    micro_batches: u32,
    config: *const forge_linear_config,
    out_linear: *mut *mut forge_linear,
) -> forge_status {
    boundary(|| {
        // SAFETY: as promised by the caller.
        let replicas = unsafe { handle("data_parallel", data_parallel)? };
        let reduction = enums::reduction("reduction", reduction)?;
        replicas.comm.check_complete()?;
        if micro_batches == 0 {
            bail!(FORGE_ERROR_SHAPE, "micro_batches: 0; a step has at least one");
        }
        let replicas = replicas.comm.clone();
        let data_parallel = DataParallel { comm: replicas, reduction, micro_batches };
        // SAFETY: as promised by the caller.
        unsafe { new(context, comm, Some(data_parallel), config, out_linear) }
    })
}

/// # Safety
/// As forge_linear_new.
unsafe fn new(
    context: *mut forge_context,
    comm: *mut forge_comm,
    data_parallel: Option<DataParallel>,
    config: *const forge_linear_config,
    out_linear: *mut *mut forge_linear,
) -> Result<()> {
    check_pointer("out_linear", out_linear)?;
    // SAFETY: as promised by the caller.
    let (context, comm, config, scheme) = unsafe {
        let config = read_struct("config", config)?;
        let scheme = scheme(&config)?;
        (handle("context", context)?, handle("comm", comm)?, config, scheme)
    };
    let (backend, comm) = (context.backend.clone(), comm.comm.clone());
    backend.check_scheme(&scheme)?;
    let mut shape = Shape::new(
        config.out_features,
        config.in_features,
        enums::parallel("parallel", config.parallel)?,
        flag("sequence_parallel", config.sequence_parallel)?,
        flag("reduce_dgrad", config.reduce_dgrad)?,
        comm.rank(),
        comm.size(),
    )?;
    let copies = |c: &dyn Comm| c.is_of_host_memory() && !backend.memory_is_host();
    if shape.gathered_features().is_some() && copies(&*comm) {
        bail!(
            FORGE_ERROR_UNSUPPORTED,
            "sequence_parallel: one rank alone has nothing to share out on a GPU; set it to 0"
        );
    }
    if data_parallel.as_ref().is_some_and(|r| copies(&*r.comm)) {
        bail!(
            FORGE_ERROR_UNSUPPORTED,
            "data_parallel: one rank alone shares nothing out on a GPU; use forge_linear_new"
        );
    }
    if let Some(replicas) = &data_parallel {
        shape = shape.replicated(replicas.comm.rank(), replicas.comm.size())?;
    }
    let layout = Layout::new(&scheme, &shape.shard, &shape.owned());
    let linear = Linear { backend, comm, shape, scheme, data_parallel };
    // SAFETY: checked above.
    unsafe { *out_linear = Box::into_raw(Box::new(forge_linear { linear, layout })) };
    Ok(())
}

/// Frees a linear; NULL is allowed. The parameter's arrays are the caller's.
///
/// # Safety
/// `linear` is NULL or was made by forge_linear_new and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_free(linear: *mut forge_linear) {
    if !linear.is_null() {
        boundary(|| {
            // SAFETY: as promised by the caller.
            drop(unsafe { Box::from_raw(linear) });
            Ok(())
        });
    }
}

/// What to allocate for this rank's part of the parameter: bytes, rows, columns, dtype and alignment of each
/// array, and which rows and columns of W it is.
///
/// # Safety
/// `linear` is live, `out` points to a struct of its `struct_size`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_layout(
    linear: *const forge_linear,
    out: *mut forge_layout,
) -> forge_status {
    boundary(|| {
        // SAFETY: as promised by the caller.
        let forge_linear { linear, layout } = unsafe {
            check_out_struct("out", out)?;
            handle("linear", linear)?
        };
        let array = |a: &ArrayLayout| {
            a.dtype.map_or_else(forge_array_layout::default, |dtype| forge_array_layout {
                bytes: a.bytes() as u64,
                rows: a.rows as u64,
                cols: a.cols as u64,
                dtype: dtype_code(dtype),
                alignment: linear.backend.alignment(dtype.bytes()) as u32,
            })
        };
        let (shard, owned) = (&linear.shape.shard, linear.shape.owned());
        let value = forge_layout {
            struct_size: size_of::<forge_layout>() as u32,
            n_states: linear.scheme.n_states as u32,
            out_local: shard.rows as u64,
            in_local: shard.cols as u64,
            row_offset: shard.row_offset,
            col_offset: shard.col_offset,
            out_owned: owned.rows as u64,
            owned_offset: owned.row_offset - shard.row_offset,
            weight: array(&layout.weight),
            weight_extra: array(&layout.extra),
            states: layout.states.each_ref().map(array),
            scales: layout.scales.each_ref().map(array),
            accumulator: array(&layout.accumulator),
        };
        // SAFETY: checked above.
        unsafe { *out = value };
        Ok(())
    })
}

/// Bytes of workspace that a forge_linear_backward of this mode (a forge_backward_mode) and of this many (gathered)
/// tokens needs: 0 without sequence parallelism and data parallelism. Not the context's workspace.
///
/// Errors: FORGE_ERROR_OVERFLOW, FORGE_ERROR_SHARD (tokens that do not divide by the ranks).
///
/// # Safety
/// `linear` is live, `out_bytes` points to a u64.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_workspace(
    linear: *const forge_linear,
    mode: u32,
    tokens: u64,
    out_bytes: *mut u64,
) -> forge_status {
    boundary(|| {
        check_pointer("out_bytes", out_bytes)?;
        // SAFETY: as promised by the caller.
        let linear = unsafe { &handle("linear", linear)?.linear };
        linear.shape.check_tokens(tokens)?;
        let keeps = enums::backward_mode("mode", mode)? == forge_backward_mode::FORGE_BACKWARD_KEEP;
        let bytes = linear.workspace_bytes(keeps, tokens as usize);
        // SAFETY: checked above.
        unsafe { *out_bytes = bytes as u64 };
        Ok(())
    })
}

/// Chooses a schedule by predicted bytes, or checks the one asked for, and says why.
///
/// Errors: FORGE_ERROR_UNSUPPORTED (`immediate` where it is not possible; the message has the way out).
///
/// # Safety
/// `linear` is live, `request` and `out` point to structs of their `struct_size`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_plan(
    linear: *const forge_linear,
    request: *const forge_plan_request,
    out: *mut forge_plan,
) -> forge_status {
    boundary(|| {
        // SAFETY: as promised by the caller.
        let (linear, request) = unsafe {
            check_out_struct("out", out)?;
            (&handle("linear", linear)?.linear, read_struct("request", request)?)
        };
        let plan = linear.plan(&PlanRequest {
            schedule: enums::schedule("schedule", request.schedule)?,
            tokens_per_micro_batch: request.tokens_per_micro_batch,
            micro_batches: request.micro_batches,
            needs_norm: flag("needs_norm", request.needs_norm)?,
        })?;
        let mut reason = [0 as c_char; 256];
        for (to, from) in reason[..255].iter_mut().zip(plan.reason.bytes()) {
            *to = from as c_char;
        }
        let value = forge_plan {
            struct_size: size_of::<forge_plan>() as u32,
            schedule: enums::schedule_code(plan.schedule),
            factor_bytes: plan.factor_bytes,
            accumulator_bytes: plan.accumulator_bytes,
            gradient_bytes: plan.gradient_bytes,
            wire_bytes: plan.wire_bytes,
            reduction: plan.reduction.map_or(0, enums::reduction_code),
            reserved: 0,
            reason,
        };
        // SAFETY: checked above.
        unsafe { *out = value };
        Ok(())
    })
}
