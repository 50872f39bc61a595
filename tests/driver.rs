//! What a caller is told where the GPU's environment is broken: each way of being broken has a message of
//! its own, which says what is the matter and what to do. The driver is a fake one (tests/fake_cuda).

mod fake_cuda;

use fake_cuda::{again, build, directory, finish};
use forge::backend::cuda::Cuda;
use forge::error::forge_status::{self, *};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

/// What the tests below run under other libraries: prints the status and the message of a context.
#[test]
#[ignore = "run by the others, under fake libraries"]
fn tell() {
    let device = std::env::var("FORGE_TEST_DEVICE").map_or(0, |d| d.parse().unwrap());
    let cache = std::env::var_os("FORGE_TEST_CACHE").map(Into::into);
    match Cuda::new(device, cache) {
        Ok(_) => println!("\nTOLD none"),
        Err(e) => println!("\nTOLD {} {}", e.status as u32, e.message),
    }
}

fn told(child: &mut Command) -> String {
    let output = finish(child);
    let line = output.lines().find_map(|l| l.strip_prefix("TOLD ")).expect(&output);
    line.to_string()
}

/// Whether this machine has the library, so that its absence cannot be shown here.
fn is_here(name: &str) -> bool {
    // SAFETY: NVIDIA's libraries have no initialisers that need care.
    unsafe { libloading::Library::new(name) }.is_ok()
}

#[test]
fn every_broken_environment_has_its_own_message() {
    let root = directory("driver");
    let (whole, no_init, no_maps, text) =
        (root.join("whole"), root.join("no-init"), root.join("no-maps"), root.join("text"));
    // Under both of the names that it may be loaded by.
    for name in ["libcuda.so", "libcuda.so.1"] {
        build(&whole, "cuda.c", name, &[]);
        build(&no_init, "cuda.c", name, &["-DWITHOUT_INIT"]);
        build(&no_maps, "cuda.c", name, &["-DWITHOUT_TENSOR_MAPS"]);
        fs::create_dir_all(&text).unwrap();
        fs::write(text.join(name), "this is no library, but is long enough for a header".repeat(9))
            .unwrap();
    }
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    let mut expect = |case: &'static str,
                      library: &Path,
                      set: &[(&str, &str)],
                      status: forge_status,
                      parts: &[&str]| {
        let mut child = again("tell", &[library]);
        child.env("FORGE_TEST_CACHE", root.join("cache")).envs(set.iter().copied());
        let message = told(&mut child);
        println!("{case}: {message}");
        assert!(message.starts_with(&format!("{} ", status as u32)), "{case}: {message}");
        for part in parts {
            assert!(message.contains(part), "{case}: no '{part}' in: {message}");
        }
        if let Some(other) = seen.insert(message.clone(), case) {
            panic!("{case} and {other} have one message: {message}");
        }
    };

    let cpu = "FORGE_BACKEND_CPU";
    let none = FORGE_ERROR_NO_BACKEND;
    if !is_here("libcuda.so.1") {
        let nowhere = root.join("nowhere");
        expect("no driver", &nowhere, &[], none, &["no libcuda.so.1", "install", cpu]);
    }
    expect(
        "no library",
        &text,
        &[],
        none,
        &["cannot be loaded", "invalid ELF header", "anew", cpu],
    );
    expect("no cuInit", &no_init, &[], none, &["has no cuInit", "LD_LIBRARY_PATH", cpu]);
    let parts = ["has no cuTensorMapEncodeTiled", "LD_LIBRARY_PATH", cpu];
    expect("no tensor maps", &no_maps, &[], none, &parts);
    let old = [("FAKE_CUDA_VERSION", "11080")];
    // Too old comes first: such a driver lacks functions as well.
    expect("too old", &no_maps, &old, none, &["CUDA 12.1 or newer", "CUDA 11.8", "update", cpu]);
    for (case, code, parts) in [
        ("no device", "100", ["CUDA_ERROR_NO_DEVICE", "CUDA_VISIBLE_DEVICES"]),
        ("mismatch", "803", ["(803)", "reboot"]),
        ("stub", "34", ["(34)", "LD_LIBRARY_PATH"]),
        ("unknown", "999", ["(999)", "nvidia-smi"]),
    ] {
        expect(case, &whole, &[("FAKE_CUDA_INIT", code)], none, &parts);
    }
    let parts = ["device: 3", "there are 1 GPUs", "CUDA_VISIBLE_DEVICES"];
    expect("ordinal", &whole, &[("FORGE_TEST_DEVICE", "3")], FORGE_ERROR_SHAPE, &parts);
    let parts = ["device: -1", "counted from 0"];
    expect("negative", &whole, &[("FORGE_TEST_DEVICE", "-1")], FORGE_ERROR_SHAPE, &parts);
    let parts = ["capability 7.5", "8.0 or newer", cpu];
    expect("old GPU", &whole, &[("FAKE_CUDA_CAPABILITY", "75")], none, &parts);

    let compile = FORGE_ERROR_COMPILE;
    let parts = ["FORGE_NVRTC", "/nowhere/libnvrtc.so", "No such file", "unset it"];
    expect("no NVRTC", &whole, &[("FORGE_NVRTC", "/nowhere/libnvrtc.so")], compile, &parts);
    let driver = whole.join("libcuda.so");
    let set = [("FORGE_NVRTC", driver.to_str().unwrap())];
    expect("not NVRTC", &whole, &set, compile, &["FORGE_NVRTC", "nvrtcVersion", "libnvrtc.so.12"]);
}

#[test]
fn without_any_nvrtc_the_wheel_that_has_it_is_named() {
    if ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].into_iter().any(is_here)
        || Path::new("/usr/local/cuda/lib64").exists()
    {
        println!("this machine has NVRTC where it is looked for: nothing to show");
        return;
    }
    let root = directory("no-nvrtc");
    build(&root, "cuda.c", "libcuda.so.1", &[]);
    // Of its own: with kernels in the cache none is missed.
    let mut child = again("tell", &[&root]);
    child.env_remove("FORGE_NVRTC").env("FORGE_TEST_CACHE", root.join("cache"));
    let message = told(&mut child);
    for part in ["403 NVRTC: libnvrtc.so.13", "pip install nvidia-cuda-nvrtc", "FORGE_NVRTC"] {
        assert!(message.contains(part), "no '{part}' in: {message}");
    }
}
