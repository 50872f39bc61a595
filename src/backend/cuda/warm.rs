//! Images made ready ahead of time: on the machine of a GPU, or for one that is not here.

use super::cache::Cache;
use super::compile::{Nvrtc, architecture};
use super::images::{Images, Need};
use super::needs::{Target, needs};
use crate::backend::warm::{Progress, Tell, Warmed, Work};
use crate::error::{Error, Result, bail};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

/// The newest CUDA whose NVRTC is looked for, where no driver says which it wants.
const NEWEST_CUDA: i32 = 13;

/// `sm_80`, `sm_90` or `sm_90a` and their like to a compute capability. A run on a GPU compiles for
/// [`architecture`], so that is what `sm_90` stands for as well.
pub fn capability(name: &str) -> Result<(i32, i32)> {
    let digits = name.strip_prefix("sm_").map(|n| n.trim_end_matches('a')).unwrap_or_default();
    let number = digits.parse::<i32>().ok().filter(|n| (10..1000).contains(n));
    match number.map(|n| (n / 10, n % 10)) {
        Some(capability) if capability.0 >= 8 => Ok(capability),
        Some((major, minor)) => bail!(
            FORGE_ERROR_UNSUPPORTED,
            "architecture: '{name}' is compute capability {major}.{minor}; the kernels need 8.0 or \
             newer (sm_80)"
        ),
        None => bail!(
            FORGE_ERROR_UNSUPPORTED,
            "architecture: '{name}' is none; name one as NVRTC does: sm_80, sm_90a, sm_100a"
        ),
    }
}

/// A cache that is filled for a GPU which need not be here.
pub struct Elsewhere {
    target: Target,
    images: Images,
}

impl Elsewhere {
    /// For GPUs of this architecture, with this many multiprocessors (0: as most have).
    pub fn new(name: &str, sm_count: u32, cache_dir: Option<PathBuf>) -> Result<Self> {
        let mut target = Target::typical(capability(name)?);
        if sm_count != 0 {
            target.sm_count = sm_count;
        }
        let nvrtc = Ok(Nvrtc::load(NEWEST_CUDA)?);
        let architecture = architecture(target.capability);
        Ok(Self { target, images: Images::new(nvrtc, Cache::new(cache_dir), architecture)? })
    }

    /// Makes ready what the calls need.
    pub fn warm(&self, work: &Work, threads: usize, tell: &mut Tell) -> Result<Warmed> {
        warm(&self.images, &needs(&self.target, work), threads, tell)
    }
}

/// Makes each of these images ready. Several processes may do so at once: each begins elsewhere in the
/// list, so that they share the work; an entry that two of them make is written whole twice.
pub fn warm(images: &Images, needs: &[Need], threads: usize, tell: &mut Tell) -> Result<Warmed> {
    if let Some(why) = images.cache.problem() {
        bail!(FORGE_ERROR_CACHE, "{why}");
    }
    let (major, minor) = images.compiler()?;
    let first = std::process::id() as usize % needs.len().max(1);
    let (next, compiled) = (AtomicUsize::new(0), AtomicU64::new(0));
    let (tell, failure) = (Mutex::new(tell), Mutex::new(None::<Error>));
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= needs.len() || lock(&failure).is_some() {
                return;
            }
            let need = &needs[(first + index) % needs.len()];
            let begin = Instant::now();
            match ready(images, need) {
                Ok(was_compiled) => {
                    compiled.fetch_add(u64::from(was_compiled), Ordering::Relaxed);
                    let seconds = begin.elapsed().as_secs_f64();
                    let path = images.path(need.source, &need.defines).unwrap_or_default();
                    let (what, path) = (need.what.as_str(), path.as_path());
                    lock(&tell)(Progress { what, path, compiled: was_compiled, seconds });
                }
                Err(error) => {
                    lock(&failure).get_or_insert(error);
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads.clamp(1, needs.len().max(1)) {
            scope.spawn(work);
        }
        work();
    });
    if let Some(error) = lock(&failure).take() {
        return Err(error);
    }
    images.cache.note_compiler((major, minor));
    let compiled = compiled.into_inner();
    let compiler = (1000 * major + 10 * minor) as u32;
    Ok(Warmed { compiled, present: needs.len() as u64 - compiled, compiler })
}

/// Compiles and keeps an image that is not there; whether it had to.
fn ready(images: &Images, need: &Need) -> Result<bool> {
    let Need { source, defines, what } = need;
    if images.find(*source, defines).is_some() {
        return Ok(false);
    }
    let image = images.compile(*source, defines, what)?;
    images.keep(*source, defines, &image)?;
    Ok(true)
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What a panicking callback leaves behind is whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
