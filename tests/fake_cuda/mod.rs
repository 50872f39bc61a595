//! Fake libraries of CUDA, built with the C compiler, and tests that run themselves again under them: what
//! the loader finds is fixed when a process begins.

use forge::error::forge_status;
use forge::ffi::error::forge_last_error;
use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Builds `tests/fake_cuda/<source>` as `directory/<library>`.
pub fn build(directory: &Path, source: &str, library: &str, defines: &[&str]) {
    std::fs::create_dir_all(directory).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_cuda").join(source);
    let mut compiler = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()));
    compiler.args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", "-shared"]);
    compiler.arg("-o").arg(directory.join(library)).args(defines).arg(source);
    let output = compiler.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A fresh directory of this name.
pub fn directory(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// This test binary again, to run its ignored test `name` with the libraries of these directories.
pub fn again(name: &str, libraries: &[&Path]) -> Command {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", name, "--ignored", "--nocapture", "--test-threads", "1"]);
    child.env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap());
    child
}

/// Runs it; both of its outputs. Its failure is the caller's.
pub fn finish(child: &mut Command) -> String {
    let Output { status, stdout, stderr } = child.output().unwrap();
    let text =
        format!("{}\n{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{child:?}: {status}\n{text}");
    text
}

/// A zeroed struct whose `struct_size` is set.
#[allow(dead_code)] // not every test makes calls
pub fn sized<T: Copy>() -> T {
    // SAFETY: the structs of the C ABI are plain data for which zeros are values; the first field is
    // their size.
    unsafe {
        let mut value = std::mem::zeroed::<T>();
        (&raw mut value).cast::<u32>().write(size_of::<T>() as u32);
        value
    }
}

/// Of this thread's last failure.
#[allow(dead_code)]
pub fn last_error() -> String {
    // SAFETY: never NULL, valid until the next failure.
    unsafe { CStr::from_ptr(forge_last_error()) }.to_string_lossy().into_owned()
}

/// Fails with the library's words.
#[allow(dead_code)]
#[track_caller]
pub fn ok(status: forge_status) {
    assert_eq!(status, forge_status::FORGE_OK, "{}", last_error());
}
