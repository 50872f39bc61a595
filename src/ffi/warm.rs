//! Kernels compiled ahead of time: for a context's GPU, or for one that is not here.

use super::boundary::{boundary, check_out_struct, handle, read_struct};
use super::context::{forge_context, path};
use super::enums;
use super::linear::{flag, scheme};
use super::types::{forge_linear_config, forge_warm_config, forge_warm_report};
use crate::backend::Shard;
use crate::backend::warm::{Progress, Tell, Warmed, Work};
use crate::error::{Result, bail, forge_status};
use crate::linear::Shape;
use std::ffi::{CStr, CString, c_char, c_void};

/// Ranks whose shards may be asked for: more than any machine has.
const MOST_RANKS: u32 = 1 << 16;

/// Is told of each kernel that forge_warm or forge_context_warm has made ready: `what` names it and
/// `path` is its file (both valid during the call), `compiled` is 1 where it was compiled, in `seconds`, and 0
/// where it was there. Called by one thread at a time, not always by the one that called FORGE.
pub type forge_warm_callback = Option<
    unsafe extern "C" fn(
        user: *mut c_void,
        what: *const c_char,
        path: *const c_char,
        compiled: u32,
        seconds: f64,
    ),
>;

/// Compiles the kernels that a linear will need into a directory, for a GPU that need not be here: on a
/// login node, for an air-gapped cluster. `config->architecture` must be set. What is there already is
/// left; what is damaged is made again. Several processes may fill one directory at once.
///
/// A run finds what it needs if it has the same version of this library, the same version of NVRTC
/// (`out->nvrtc`) or none at all, and is given the same directory or a copy of it. What the description leaves open (features, tokens
/// or micro-batches of 0) is compiled for all of its values.
///
/// Errors: FORGE_ERROR_COMPILE (no NVRTC, or one that does not know the architecture),
/// FORGE_ERROR_CACHE (a directory that is refused or cannot be written, a full disk),
/// FORGE_ERROR_UNSUPPORTED (no such architecture, or one below sm_80), those of forge_linear_new.
///
/// # Safety
/// `config` points to a struct of its `struct_size` whose strings are NULL or NUL-terminated and whose
/// `linear` points to a struct of its `struct_size`; `progress` may be called with `user` during the
/// call; `out` points to a struct of its `struct_size`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_warm(
    config: *const forge_warm_config,
    out: *mut forge_warm_report,
) -> forge_status {
    boundary(|| {
        // SAFETY: as promised by the caller.
        unsafe {
            check_out_struct("out", out)?;
            let config = read_struct("config", config)?;
            let work = work(&config)?;
            let Some(architecture) = text("config.architecture", config.architecture)? else {
                bail!(
                    FORGE_ERROR_NULL,
                    "config.architecture: NULL; name the GPUs' architecture (sm_80, sm_90a, sm_100a), \
                     or call forge_context_warm on a machine that has one"
                );
            };
            let cache_dir = path("config.cache_dir", config.cache_dir)?;
            let warmed = crate::backend::cuda::warm::Elsewhere::new(
                architecture,
                config.sm_count,
                cache_dir,
            )?
            .warm(&work, threads(&config), &mut *teller(&config))?;
            *out = report(warmed);
        }
        Ok(())
    })
}

/// As forge_warm, for the context's own GPU and into its cache directory: before the first step, so that
/// this does not wait for a compiler. `config->architecture` and `cache_dir` must be NULL and `sm_count`
/// 0, the context has its own. On the CPU there is nothing to compile and the report is zeros.
///
/// # Safety
/// `context` is live; otherwise as forge_warm.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_context_warm(
    context: *mut forge_context,
    config: *const forge_warm_config,
    out: *mut forge_warm_report,
) -> forge_status {
    boundary(|| {
        // SAFETY: as promised by the caller.
        unsafe {
            check_out_struct("out", out)?;
            let context = handle("context", context.cast_const())?;
            let config = read_struct("config", config)?;
            let given = [
                ("architecture", !config.architecture.is_null()),
                ("cache_dir", !config.cache_dir.is_null()),
                ("sm_count", config.sm_count != 0),
            ];
            if let Some((name, _)) = given.into_iter().find(|(_, given)| *given) {
                bail!(
                    FORGE_ERROR_UNSUPPORTED,
                    "config.{name}: given, but the context has its own; set it to 0, or call forge_warm"
                );
            }
            let work = work(&config)?;
            let backend = &context.backend;
            *out = report(backend.warm(&work, threads(&config), &mut *teller(&config))?);
        }
        Ok(())
    })
}

/// # Safety
/// `text` is NULL or NUL-terminated.
unsafe fn text<'a>(name: &str, text: *const c_char) -> Result<Option<&'a str>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: as promised by the caller.
    match unsafe { CStr::from_ptr(text) }.to_str() {
        Ok(text) => Ok(Some(text)),
        Err(_) => bail!(FORGE_ERROR_UNSUPPORTED, "{name}: not UTF-8"),
    }
}

fn threads(config: &forge_warm_config) -> usize {
    match config.threads {
        0 => std::thread::available_parallelism().map_or(1, Into::into),
        n => n as usize,
    }
}

/// # Safety
/// `config.linear` is NULL, misaligned, or points to a struct of its `struct_size`.
unsafe fn work(config: &forge_warm_config) -> Result<Work> {
    // SAFETY: as promised by the caller.
    let (linear, scheme) = unsafe {
        let linear = read_struct("config.linear", config.linear)?;
        (linear, scheme(&linear)?)
    };
    Ok(Work {
        scheme,
        shards: shards(&linear, config.ranks.max(1))?,
        tokens: Some(config.tokens).filter(|t| *t != 0),
        micro_batches: Some(config.micro_batches).filter(|n| *n != 0),
        device_scalars: flag("config.device_scalars", config.device_scalars)?,
    })
}

/// The shards of all ranks; none where the features are left open.
fn shards(linear: &forge_linear_config, ranks: u32) -> Result<Vec<Shard>> {
    let parallel = enums::parallel("parallel", linear.parallel)?;
    if ranks > MOST_RANKS {
        bail!(FORGE_ERROR_RANK, "config.ranks: {ranks} is above {MOST_RANKS}");
    }
    match (linear.out_features, linear.in_features) {
        (0, 0) => return Ok(Vec::new()),
        (0, _) | (_, 0) => bail!(
            FORGE_ERROR_SHAPE,
            "out_features, in_features: {} and {}; name both, or set both to 0 for any shape",
            linear.out_features,
            linear.in_features
        ),
        _ => {}
    }
    let shard = |rank: u32| {
        let (out, inn) = (linear.out_features, linear.in_features);
        let ranks = ranks as usize;
        Shape::new(out, inn, parallel, false, false, rank as usize, ranks).map(|s| s.shard)
    };
    let mut shards: Vec<Shard> = (0..ranks).map(shard).collect::<Result<_>>()?;
    shards.dedup();
    Ok(shards)
}

/// The caller's callback; nothing where there is none.
fn teller(config: &forge_warm_config) -> Box<Tell<'static>> {
    /// The caller's pointer, only handed back to its own callback.
    struct User(*mut c_void);
    // SAFETY: only handed back.
    unsafe impl Send for User {}
    impl User {
        fn get(&self) -> *mut c_void {
            self.0
        }
    }
    let user = User(config.user);
    match config.progress {
        None => Box::new(|_| {}),
        Some(progress) => Box::new(move |p: Progress| {
            let what = CString::new(p.what).unwrap_or_default();
            let path = CString::new(p.path.as_os_str().as_encoded_bytes()).unwrap_or_default();
            let compiled = u32::from(p.compiled);
            // SAFETY: the caller promises a callback that may be called during the call, from any
            // thread; the strings live as long.
            unsafe { progress(user.get(), what.as_ptr(), path.as_ptr(), compiled, p.seconds) }
        }),
    }
}

fn report(warmed: Warmed) -> forge_warm_report {
    forge_warm_report {
        struct_size: size_of::<forge_warm_report>() as u32,
        nvrtc: warmed.compiler,
        compiled: warmed.compiled,
        present: warmed.present,
    }
}
