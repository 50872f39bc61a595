//! Compiled images on disk, shared by processes and runs.
//!
//! An entry is a file named by the hash of everything that it was made from. It is written beside its
//! place and renamed, so that a reader sees all of it or nothing, and starts with a hash of itself, so
//! that a damaged one is made again. Images are code, so only a directory that nobody else can write
//! or replace is used. When entries outgrow a limit, those go that were not used for longest. A cache
//! that does not work costs time, never a result.

use crate::error::{Result, bail};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

const MAGIC: &[u8; 8] = b"FORGEv01";
const HEADER: usize = MAGIC.len() + 32;
/// An image takes 30 to 150 KB: thousands of them.
const MOST_BYTES: u64 = 512 << 20;
/// How old the mark of an entry's last use may be: a write for each load would be many.
const MARKED_EVERY: Duration = Duration::from_secs(24 * 3600);
/// A write takes milliseconds: what is older was left by a killed process.
const LEFT_BEHIND: Duration = Duration::from_secs(3600);

/// A directory of images.
pub struct Cache {
    directory: std::result::Result<PathBuf, String>,
    most_bytes: u64,
    has_warned: AtomicBool,
}

impl Cache {
    /// The directory asked for; else `$FORGE_CACHE_DIR`, `$XDG_CACHE_HOME/forge`, `~/.cache/forge`. It
    /// holds at most `$FORGE_CACHE_MAX_MB`, else 512 MB.
    pub fn new(directory: Option<PathBuf>) -> Self {
        let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let directory = directory
            .or_else(|| set("FORGE_CACHE_DIR"))
            .or_else(|| set("XDG_CACHE_HOME").map(|d| d.join("forge")))
            .or_else(|| set("HOME").map(|d| d.join(".cache/forge")));
        let limit = std::env::var("FORGE_CACHE_MAX_MB").ok().and_then(|mb| mb.parse::<u64>().ok());
        Self::with_limit(directory, limit.map_or(MOST_BYTES, |mb| mb << 20))
    }

    /// As [`Cache::new`], in this directory and of at most so many bytes.
    pub fn with_limit(directory: Option<PathBuf>, most_bytes: u64) -> Self {
        let directory = match directory {
            None => Err("no cache: neither FORGE_CACHE_DIR nor HOME is set".to_string()),
            Some(directory) => prepare(&directory)
                .map_err(|why| format!("cache {}: not used: {why}", directory.display())),
        };
        if let Err(why) = &directory {
            tracing::warn!(target: "forge", "{why}; kernels are compiled anew by each process");
        }
        Self { directory, most_bytes, has_warned: AtomicBool::new(false) }
    }

    /// Why nothing is kept, if so.
    pub fn problem(&self) -> Option<&str> {
        self.directory.as_ref().err().map(String::as_str)
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
        mark_used(&path);
        Some(bytes)
    }

    /// Keeps an image, or says in the log why not: a run goes on without.
    pub fn store(&self, key: &str, image: &[u8]) {
        if self.directory.is_err() {
            return; // said when the cache was opened
        }
        if let Err(error) = self.try_store(key, image)
            // A full disk stays full: said once.
            && !self.has_warned.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(target: "forge", "{}", error.message);
        }
    }

    /// As [`Cache::store`], for callers to whom a cache that is not written is an error.
    pub fn try_store(&self, key: &str, image: &[u8]) -> Result<()> {
        let directory = match &self.directory {
            Ok(directory) => directory,
            Err(why) => bail!(FORGE_ERROR_CACHE, "{why}"),
        };
        if let Err(why) = write(&entry(directory, key), image) {
            bail!(
                FORGE_ERROR_CACHE,
                "cache {}: not written: {why}{}",
                directory.display(),
                way_out(&why)
            );
        }
        trim(directory, self.most_bytes);
        Ok(())
    }

    /// The directory, where it really is.
    pub fn directory(&self) -> Option<&Path> {
        self.directory.as_ref().ok().map(PathBuf::as_path)
    }

    /// Leaves a note of the compiler that filled the cache, `nvrtc-13.0.version`: a run without one takes its
    /// images.
    pub fn note_compiler(&self, (major, minor): (i32, i32)) {
        if let Some(directory) = self.directory() {
            let shared = fs::metadata(directory).map_or(0, |d| d.mode() & 0o044);
            let mut options = fs::OpenOptions::new();
            options.write(true).create(true).truncate(false).mode(0o600 | shared);
            // Where images cannot be written either, that was an error.
            let _ = options.open(directory.join(format!("nvrtc-{major}.{minor}.version")));
        }
    }

    /// The compilers that left a note, the newest first.
    pub fn compilers(&self) -> Vec<(i32, i32)> {
        let entries = self.directory().and_then(|d| fs::read_dir(d).ok()).into_iter().flatten();
        let mut versions: Vec<(i32, i32)> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let version = name.to_str()?.strip_prefix("nvrtc-")?.strip_suffix(".version")?;
                let (major, minor) = version.split_once('.')?;
                Some((major.parse().ok()?, minor.parse().ok()?))
            })
            .collect();
        versions.sort_unstable_by(|a, b| b.cmp(a));
        versions
    }

    /// The file of an image, whether it is there or not; None where nothing is kept.
    pub fn path(&self, key: &str) -> Option<PathBuf> {
        self.directory().map(|directory| entry(directory, key))
    }
}

/// The file of an image.
fn entry(directory: &Path, key: &str) -> PathBuf {
    directory.join(format!("{key}.cubin"))
}

/// What to do about a write that failed.
fn way_out(why: &io::Error) -> &'static str {
    match why.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::FileTooLarge | io::ErrorKind::QuotaExceeded => {
            "; free some space, or name another directory in FORGE_CACHE_DIR"
        }
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
            "; fill it where it can be written (python -m forge_train warm), or name another \
             directory in FORGE_CACHE_DIR"
        }
        _ => "; name another directory in FORGE_CACHE_DIR",
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

/// Makes the directory for its owner alone, or checks that others can neither write nor replace it.
/// Where it really is.
fn prepare(directory: &Path) -> io::Result<PathBuf> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|why| {
        io::Error::other(format!("it cannot be made: {why}; name another in FORGE_CACHE_DIR"))
    })?;
    let directory = fs::canonicalize(directory)?;
    let found = fs::metadata(&directory)?;
    // A process's own entry in /proc belongs to the user that it runs as.
    let user = fs::metadata("/proc/self")?.uid();
    let is_trusted = |uid: u32| uid == user || uid == 0;
    if !is_trusted(found.uid()) {
        return Err(io::Error::other(format!(
            "it belongs to user {}, whose code would be run; name another in FORGE_CACHE_DIR",
            found.uid()
        )));
    }
    if found.mode() & 0o022 != 0 {
        return Err(io::Error::other("others could write it (chmod 700 makes it usable)"));
    }
    for parent in directory.ancestors().skip(1) {
        let above = fs::metadata(parent)?;
        // In a sticky directory, such as /tmp, only its owner can rename an entry.
        let is_open = above.mode() & 0o002 != 0 && above.mode() & 0o1000 == 0;
        if is_open || !is_trusted(above.uid()) {
            return Err(io::Error::other(format!(
                "others could replace it, since they can write {}; name another in FORGE_CACHE_DIR",
                parent.display()
            )));
        }
    }
    Ok(directory)
}

fn age(file: &fs::Metadata) -> Duration {
    let modified = file.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    // A file from the future, by another machine's clock, is new.
    SystemTime::now().duration_since(modified).unwrap_or_default()
}

/// The time of an entry's last change says when it was last used.
fn mark_used(path: &Path) {
    if fs::metadata(path).is_ok_and(|file| age(&file) > MARKED_EVERY)
        && let Ok(file) = fs::File::options().append(true).open(path)
    {
        let _ = file.set_modified(SystemTime::now());
    }
}

/// Removes what was not used for longest until a quarter of the room is free again, if there is more
/// than `most_bytes`, and what killed processes left. Another process may do the same.
fn trim(directory: &Path, most_bytes: u64) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    let mut images = Vec::new();
    for entry in entries.flatten() {
        let (path, Ok(file)) = (entry.path(), entry.metadata()) else { continue };
        match path.extension().and_then(|e| e.to_str()) {
            Some("cubin") => images.push((age(&file), file.len(), path)),
            Some("part") if age(&file) > LEFT_BEHIND => {
                let _ = fs::remove_file(path);
            }
            _ => {}
        }
    }
    let mut bytes: u64 = images.iter().map(|(_, len, _)| len).sum();
    if bytes <= most_bytes {
        return;
    }
    images.sort_by_key(|(age, ..)| std::cmp::Reverse(*age));
    for (_, len, path) in images {
        if bytes <= most_bytes / 4 * 3 {
            break;
        }
        bytes -= len;
        let _ = fs::remove_file(path);
    }
}

fn write(path: &Path, image: &[u8]) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let unique = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let part = path.with_extension(format!("{}.{}.part", unique.0, unique.1));
    let result = (|| {
        // A file left by a killed process of the same id is in the way; names are ours alone.
        // Whom the owner lets read the directory may read its entries: a cache shared by users.
        let shared = fs::metadata(path.parent().unwrap_or(path))?.mode() & 0o044;
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600 | shared);
        let mut file = options.open(&part)?;
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
