//! Compiled images on disk, shared by processes and runs.
//!
//! An entry is a file named by the hash of everything that it was made from. It is written beside its
//! place and renamed, so that a reader sees all of it or nothing, and starts with a hash of itself, so
//! that a damaged one is made again. Images are code, so only a directory that nobody else can write
//! is used. A cache that does not work costs time, never a result.

use sha2::{Digest, Sha256};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: &[u8; 8] = b"FORGEv01";
const HEADER: usize = MAGIC.len() + 32;

/// A directory of images.
pub struct Cache {
    directory: Option<PathBuf>,
}

impl Cache {
    /// The directory asked for; else `$FORGE_CACHE_DIR`, `$XDG_CACHE_HOME/forge`, `~/.cache/forge`.
    pub fn new(directory: Option<PathBuf>) -> Self {
        let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let directory = directory
            .or_else(|| set("FORGE_CACHE_DIR"))
            .or_else(|| set("XDG_CACHE_HOME").map(|d| d.join("forge")))
            .or_else(|| set("HOME").map(|d| d.join(".cache/forge")));
        let usable = directory.filter(|directory| match prepare(directory) {
            Ok(()) => true,
            Err(why) => {
                tracing::debug!(target: "forge", "cache {}: not used: {why}", directory.display());
                false
            }
        });
        Self { directory: usable }
    }

    /// The image of this key, if there is an undamaged one.
    pub fn load(&self, key: &str) -> Option<Vec<u8>> {
        let path = self.path(key)?;
        let mut bytes = fs::read(&path).ok()?;
        let intact = bytes.len() > HEADER
            && bytes[..MAGIC.len()] == *MAGIC
            && bytes[MAGIC.len()..HEADER] == Sha256::digest(&bytes[HEADER..])[..];
        if !intact {
            tracing::debug!(target: "forge", "cache {}: damaged, made again", path.display());
            return None;
        }
        bytes.drain(..HEADER);
        Some(bytes)
    }

    /// Keeps an image.
    pub fn store(&self, key: &str, image: &[u8]) {
        if let Some(path) = self.path(key)
            && let Err(why) = write(&path, image)
        {
            tracing::debug!(target: "forge", "cache {}: not written: {why}", path.display());
        }
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        self.directory.as_ref().map(|d| d.join(format!("{key}.cubin")))
    }
}

/// The hash of all parts, with their lengths, so that no two lists of parts look alike.
pub fn key<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes the directory for its owner alone, or checks that others cannot write it.
fn prepare(directory: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let found = fs::metadata(directory)?;
    // A process's own entry in /proc belongs to the user that it runs as.
    let user = fs::metadata("/proc/self")?.uid();
    let mine = found.uid() == user || found.uid() == 0;
    if !found.is_dir() || !mine || found.mode() & 0o022 != 0 {
        return Err(io::Error::other("others could write it (chmod 700 makes it usable)"));
    }
    Ok(())
}

fn write(path: &Path, image: &[u8]) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let unique = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let part = path.with_extension(format!("{}.{}.part", unique.0, unique.1));
    let result = (|| {
        // A file left by a killed process of the same id is in the way; names are ours alone.
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&part)?;
        file.write_all(MAGIC)?;
        file.write_all(&Sha256::digest(image))?;
        file.write_all(image)?;
        drop(file);
        fs::rename(&part, path)
    })();
    if result.is_err() {
        let _ = fs::remove_file(&part);
    }
    result
}
