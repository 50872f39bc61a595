//! From a need of the backend ([`Need`]) to an image: from the cache, or compiled and kept there. Knows
//! no device, so that a machine without a GPU can fill a cache for one that has one.

use super::cache::{self, Cache};
use super::compile::{Nvrtc, options};
use super::sources::{self, Source};
use crate::error::{Result, bail};
use std::path::{Path, PathBuf};

/// One image: a source, specialised.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Need {
    /// What is compiled.
    pub source: Source,
    /// `NAME=value`.
    pub defines: Vec<String>,
    /// Names it for a person.
    pub what: String,
}

impl Need {
    /// Of these parts.
    pub fn new(source: Source, defines: Vec<String>, what: impl Into<String>) -> Self {
        Self { source, defines, what: what.into() }
    }
}

/// The compiler, the cache and the architecture that images are made for.
pub struct Images {
    /// The compiler; or why there is none, where the cache is all there is.
    nvrtc: Result<Nvrtc>,
    /// Versions of the compiler whose images may be used.
    versions: Vec<(i32, i32)>,
    /// Where images are kept.
    pub cache: Cache,
    architecture: String,
}

impl Images {
    /// Of a compiler and a cache. Without a compiler the cache must have been warmed by one.
    pub fn new(nvrtc: Result<Nvrtc>, cache: Cache, architecture: String) -> Result<Self> {
        let versions = match &nvrtc {
            Ok(nvrtc) => vec![nvrtc.version],
            Err(why) => {
                let versions = cache.compilers();
                if versions.is_empty() {
                    return Err(why.clone());
                }
                tracing::info!(target: "forge", "no NVRTC, the cache alone is used: {}", why.message);
                versions
            }
        };
        Ok(Self { nvrtc, versions, cache, architecture })
    }

    fn key(&self, version: (i32, i32), source: Source, defines: &[String]) -> String {
        key_of(version, source, &options(&self.architecture, defines))
    }

    /// Where an image is kept; None where the cache is not used.
    pub fn path(&self, source: Source, defines: &[String]) -> Option<PathBuf> {
        self.cache.path(&self.key(*self.versions.first()?, source, defines))
    }

    /// The image if it is in the cache, undamaged.
    pub fn find(&self, source: Source, defines: &[String]) -> Option<Vec<u8>> {
        self.versions.iter().find_map(|v| self.cache.load(&self.key(*v, source, defines)))
    }

    /// Compiles it; [`Images::keep`] is the caller's to call, once it knows that the image is good.
    pub fn compile(&self, source: Source, defines: &[String], what: &str) -> Result<Vec<u8>> {
        let nvrtc = match &self.nvrtc {
            Ok(nvrtc) => nvrtc,
            Err(why) => {
                let directory = self.cache.directory().map(Path::display);
                bail!(
                    FORGE_ERROR_COMPILE,
                    "{what}: kernels/{} is not in the cache {} and cannot be compiled: {}; warm the \
                     cache for this rule, these formats and this GPU (python -m forge_train warm)",
                    source.name,
                    directory.map_or(String::new(), |d| d.to_string()),
                    why.message
                )
            }
        };
        Ok(nvrtc.compile(source, &options(&self.architecture, defines), what)?.bytes)
    }

    /// Keeps an image for later runs. An error is the cache's; the image is as good without.
    pub fn keep(&self, source: Source, defines: &[String], image: &[u8]) -> Result<()> {
        match &self.nvrtc {
            Ok(nvrtc) => self.cache.try_store(&self.key(nvrtc.version, source, defines), image),
            Err(_) => Ok(()), // nothing was compiled
        }
    }

    /// As [`Images::keep`], for a run: it goes on without, and the log says why.
    pub fn keep_quietly(&self, source: Source, defines: &[String], image: &[u8]) {
        if let Ok(nvrtc) = &self.nvrtc {
            self.cache.store(&self.key(nvrtc.version, source, defines), image);
        }
    }

    /// The compiler's version, if there is one.
    pub fn compiler(&self) -> Result<(i32, i32)> {
        self.nvrtc.as_ref().map(|nvrtc| nvrtc.version).map_err(Clone::clone)
    }
}

/// The cache's key: everything that an image is made from.
pub fn image_key(nvrtc: &Nvrtc, source: Source, options: &[String]) -> String {
    key_of(nvrtc.version, source, options)
}

fn key_of((major, minor): (i32, i32), source: Source, options: &[String]) -> String {
    let version = format!("NVRTC {major}.{minor}");
    let headers = sources::headers(options);
    let headers = headers.iter().flat_map(|h| [h.name, h.text]);
    let parts = [version.as_str(), source.name, source.text].into_iter().chain(headers);
    cache::key(parts.chain(options.iter().map(String::as_str)))
}
