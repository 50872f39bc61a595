//! Where CUDA's libraries may lie when the loader does not find them by name.

use std::path::{Path, PathBuf};

/// Directories of the CUDA libraries that this process has mapped, and those of pip's wheel `wheel`
/// (`nvidia/<wheel>/lib`, as CUDA 12's wheels have it; CUDA 13's share one directory) beside them.
pub fn directories(wheel: &str) -> Vec<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut out: Vec<PathBuf> = Vec::new();
    let mut add = |path: PathBuf| {
        if !out.contains(&path) {
            out.push(path);
        }
    };
    for line in maps.lines() {
        let Some(path) = line.find('/').map(|at| Path::new(&line[at..])) else { continue };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let known = ["libcudart.so", "libcublas", "libnvrtc", "libcudnn"];
        if let (Some(directory), true) = (path.parent(), known.iter().any(|k| name.starts_with(k)))
        {
            add(directory.to_path_buf());
            if let Some(wheels) = directory.parent().and_then(Path::parent) {
                add(wheels.join(wheel).join("lib"));
            }
        }
    }
    add("/usr/local/cuda/lib64".into());
    out
}

/// The loader's own words, which libloading keeps as the error's source.
pub fn why(error: libloading::Error) -> String {
    let source = std::error::Error::source(&error).map(ToString::to_string);
    source.unwrap_or_else(|| error.to_string())
}
