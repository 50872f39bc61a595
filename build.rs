//! Names the shared library, and leaves the C header (as plain declarations, which is what cffi
//! reads) where maturin looks for it: the wheel's bindings come from the checked-in header.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=include/forge.h");
    println!("cargo:rerun-if-changed=build.rs");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        let major = env::var("CARGO_PKG_VERSION_MAJOR").expect("cargo sets it");
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libforge.so.{major}");
        // An unload would take the code away from under threads that end later, and from under what
        // they have registered for their end (thread-local values): dlclose leaves it in place.
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
    let header = fs::read_to_string("include/forge.h").expect("include/forge.h is checked in");
    let target = target_directory();
    fs::write(target.join("header.h"), declarations(&header)).expect("target/ can be written");
}

/// The directory that holds `release/` and `debug/`: above OUT_DIR's `<profile>/build/<crate>/out`.
fn target_directory() -> PathBuf {
    if let Some(dir) = env::var_os("CARGO_TARGET_DIR") {
        return dir.into();
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    out.ancestors().nth(4).map(Path::to_path_buf).expect("OUT_DIR is four levels down")
}

/// The header as C99 sees it, without preprocessor lines other than plain numeric `#define`s. All of
/// its conditions are about C++ and C23, which are not taken, and its own include guard, which is.
fn declarations(header: &str) -> String {
    let mut out = String::new();
    let mut taken = vec![true];
    for line in header.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("#if" | "#ifdef") => taken.push(false),
            Some("#ifndef") => taken.push(true),
            Some("#else") => {
                let condition = taken.last_mut().expect("#else follows #if");
                *condition = !*condition;
            }
            Some("#endif") => {
                taken.pop();
            }
            Some("#define") if words.nth(1).is_none_or(|w| w.parse::<u64>().is_err()) => {}
            Some("#include") => {}
            _ if taken.iter().all(|t| *t) => {
                out.push_str(line);
                out.push('\n');
            }
            _ => {}
        }
    }
    out
}
