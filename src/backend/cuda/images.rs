//! From a need of the backend ([`Need`]) to an image: from the cache, or compiled and kept there. Knows
//! no device, so that a machine without a GPU can fill a cache for one that has one.

use super::cache::{self, Cache};
use super::compile::{Nvrtc, options};
use super::sources::{HEADERS, Source};
use crate::error::Result;
use std::path::PathBuf;

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
    /// The compiler.
    pub nvrtc: Nvrtc,
    /// Where images are kept.
    pub cache: Cache,
    /// `sm_90a` and its like.
    pub architecture: String,
}

impl Images {
    /// The cache's key of an image. The only place that says what it is, for runs and for warming.
    pub fn key(&self, source: Source, defines: &[String]) -> String {
        image_key(&self.nvrtc, source, &options(&self.architecture, defines))
    }

    /// Where it is kept; None where the cache is not used.
    pub fn path(&self, source: Source, defines: &[String]) -> Option<PathBuf> {
        self.cache.path(&self.key(source, defines))
    }

    /// The image if it is in the cache, undamaged.
    pub fn find(&self, source: Source, defines: &[String]) -> Option<Vec<u8>> {
        self.cache.load(&self.key(source, defines))
    }

    /// Compiles it; [`Images::keep`] is the caller's to call, once it knows that the image is good.
    pub fn compile(&self, source: Source, defines: &[String], what: &str) -> Result<Vec<u8>> {
        Ok(self.nvrtc.compile(source, &options(&self.architecture, defines), what)?.bytes)
    }

    /// Keeps an image for later runs. An error is the cache's; the image is as good without.
    pub fn keep(&self, source: Source, defines: &[String], image: &[u8]) -> Result<()> {
        self.cache.try_store(&self.key(source, defines), image)
    }
}

/// The cache's key: everything that an image is made from.
pub fn image_key(nvrtc: &Nvrtc, source: Source, options: &[String]) -> String {
    let version = format!("NVRTC {}.{}", nvrtc.version.0, nvrtc.version.1);
    let headers = HEADERS.iter().flat_map(|h| [h.name, h.text]);
    let parts = [version.as_str(), source.name, source.text].into_iter().chain(headers);
    cache::key(parts.chain(options.iter().map(String::as_str)))
}
