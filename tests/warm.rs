//! Kernels compiled ahead of time, without a GPU: what is compiled is what a run looks for, once.
//!
//! NVRTC is found through FORGE_NVRTC, which `scripts/test.sh` sets.

mod common;

use common::{STATES, WEIGHTS, scheme};
use forge::backend::Shard;
use forge::backend::cuda::cache::Cache;
use forge::backend::cuda::compile::{Nvrtc, options};
use forge::backend::cuda::images::image_key;
use forge::backend::cuda::needs::{Target, needs};
use forge::backend::cuda::sources;
use forge::backend::cuda::warm::{Elsewhere, capability};
use forge::backend::warm::{Progress, Warmed, Work};
use forge::error::{Result, forge_status};
use forge::format::Dtype;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The only way to an fp32 product is short: eight small kernels.
const SMALL: &str = "sm_80";

fn shard(rows: usize, cols: usize) -> Shard {
    Shard { rows, cols, row_offset: 0, col_offset: 0, global_cols: cols as u64 }
}

/// AdamW over fp32: no fused kernel.
fn small() -> Work {
    Work {
        scheme: scheme("adamw", 0, WEIGHTS[0], STATES[0], Dtype::F32),
        shards: vec![shard(256, 128)],
        tokens: Some(64),
        micro_batches: Some(1),
        device_scalars: false,
    }
}

/// What training on an H200 uses: bf16 weights, q8 states.
fn hopper() -> Work {
    Work {
        scheme: scheme("adamw", 0, WEIGHTS[2], STATES[3], Dtype::Bf16),
        shards: vec![shard(4096, 4096)],
        tokens: Some(4096),
        ..small()
    }
}

struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("forge-warm-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }

    fn files(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        // Beside images there is a note of the compiler.
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !name.ends_with(".version")).collect()
    }

    fn warm(&self, architecture: &str, work: &Work) -> Result<(Warmed, Vec<(String, bool)>)> {
        let mut told = Vec::new();
        let mut tell = |p: Progress| told.push((p.what.to_string(), p.compiled));
        let cache = Elsewhere::new(architecture, 0, Some(self.0.clone()))?;
        let warmed = cache.warm(work, 2, &mut tell)?;
        Ok((warmed, told))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn nvrtc() -> Nvrtc {
    let path = std::env::var_os("FORGE_NVRTC").expect("FORGE_NVRTC names NVRTC");
    Nvrtc::open(Path::new(&path)).unwrap()
}

/// The files that a run on this architecture looks for.
fn expected(architecture: &str, target: Target, work: &Work) -> BTreeSet<String> {
    let nvrtc = nvrtc();
    let key = |defines: &[String], source| {
        format!("{}.cubin", image_key(&nvrtc, source, &options(architecture, defines)))
    };
    needs(&target, work).iter().map(|need| key(&need.defines, need.source)).collect()
}

#[test]
fn a_cache_is_filled_once_with_the_files_that_a_run_looks_for() {
    let directory = Directory::new("hopper");
    let work = hopper();
    let (first, told) = directory.warm("sm_90", &work).unwrap();
    assert_eq!(first.present, 0);
    assert!(told.iter().all(|(_, compiled)| *compiled));
    // `sm_90` is compiled for as the run compiles for it: with the architecture's own instructions.
    let expected = expected("sm_90a", Target::typical((9, 0)), &work);
    assert_eq!(directory.files(), expected);
    assert_eq!(first.compiled, expected.len() as u64);
    for part in ["fused update,", "fused accumulation", "fused norm", "bias", "image of a state"] {
        assert!(told.iter().any(|(what, _)| what.contains(part)), "no {part} in {told:?}");
    }
    let (major, minor) = nvrtc().version;
    assert_eq!(first.compiler as i32, 1000 * major + 10 * minor);

    let (second, told) = directory.warm("sm_90a", &work).unwrap();
    assert_eq!((second.compiled, second.present), (0, first.compiled));
    assert!(told.iter().all(|(_, compiled)| !compiled));
}

#[test]
fn what_is_damaged_is_made_again_and_nothing_else() {
    let directory = Directory::new("damaged");
    let (first, _) = directory.warm(SMALL, &small()).unwrap();
    let file = directory.0.join(directory.files().first().unwrap());
    let whole = fs::read(&file).unwrap();
    let mut wrong = whole.clone();
    *wrong.last_mut().unwrap() ^= 1;
    fs::write(&file, &wrong).unwrap();
    let (second, _) = directory.warm(SMALL, &small()).unwrap();
    assert_eq!((second.compiled, second.present), (1, first.compiled - 1));
    let key = file.file_stem().unwrap().to_str().unwrap();
    let cache = Cache::with_limit(Some(directory.0.clone()), 1 << 30);
    // The header is 40 bytes.
    assert_eq!(cache.load(key).unwrap(), whole[40..]);
}

/// What `processes_that_fill_one_directory_share_the_work` runs, several times at once.
#[test]
#[ignore = "run by processes_that_fill_one_directory_share_the_work"]
fn warm_as_one_of_many() {
    let path = PathBuf::from(std::env::var_os("FORGE_TEST_DIRECTORY").unwrap());
    let mut nothing = |_: Progress| {};
    let warmed =
        Elsewhere::new(SMALL, 0, Some(path)).unwrap().warm(&small(), 1, &mut nothing).unwrap();
    println!("compiled {} present {}", warmed.compiled, warmed.present);
}

#[test]
fn processes_that_fill_one_directory_share_the_work() {
    let directory = Directory::new("processes");
    let start = || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "warm_as_one_of_many", "--ignored", "--nocapture"])
            .env("FORGE_TEST_DIRECTORY", &directory.0)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    };
    let children: Vec<_> = (0..4).map(|_| start()).collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    // Whole entries and nothing else: no part of one is left behind.
    assert_eq!(directory.files(), expected(SMALL, Target::typical((8, 0)), &small()));
    let (after, _) = directory.warm(SMALL, &small()).unwrap();
    assert_eq!(after.compiled, 0);
}

#[test]
fn every_rank_and_every_number_left_open_is_compiled_for() {
    let target = Target::typical((9, 0));
    let defines = |work: &Work| -> BTreeSet<Vec<String>> {
        needs(&target, work).into_iter().map(|need| need.defines).collect()
    };
    let one = defines(&hopper());
    // Any number of segments, tokens, any shape: each only adds.
    let any_segments = defines(&Work { micro_batches: None, ..hopper() });
    let any_tokens = defines(&Work { tokens: None, ..hopper() });
    let any = defines(&Work { tokens: None, micro_batches: None, shards: vec![], ..hopper() });
    for more in [&any_segments, &any_tokens] {
        assert!(more.is_superset(&one) && more.len() > one.len());
        assert!(any.is_superset(more) && any.len() > more.len());
    }
    // The second of two row-parallel ranks begins in the middle of a block of draws.
    let scheme = scheme("adamw", 0, WEIGHTS[2], STATES[2], Dtype::Bf16);
    let cols = 96 * 2;
    let rank = |r: u64| Shard { col_offset: 96 * r, global_cols: cols, ..shard(128, 96) };
    let of = |shards: Vec<Shard>| defines(&Work { scheme, shards, ..hopper() });
    let (first, second) = (of(vec![rank(0)]), of(vec![rank(1)]));
    assert_ne!(first, second);
    assert_eq!(of(vec![rank(0), rank(1)]), first.union(&second).cloned().collect());
}

#[test]
fn the_scalars_of_captured_graphs_are_asked_for() {
    let target = Target::typical((9, 0));
    let work = Work { device_scalars: true, ..hopper() };
    let has = |work: &Work, source| needs(&target, work).iter().any(|n| n.source == source);
    assert!(has(&work, sources::PROLOGUE) && !has(&hopper(), sources::PROLOGUE));
    let step = |work: &Work, value: &str| {
        needs(&target, work)
            .iter()
            .any(|n| n.defines.contains(&format!("FORGE_DEVICE_STEP={value}")))
    };
    assert!(step(&work, "0") && step(&work, "1") && !step(&hopper(), "1"));
}

#[test]
fn architectures_are_those_of_nvrtc() {
    assert_eq!(capability("sm_80").unwrap(), (8, 0));
    assert_eq!(capability("sm_90a").unwrap(), (9, 0));
    assert_eq!(capability("sm_100a").unwrap(), (10, 0));
    for (name, part) in [("sm_75", "8.0 or newer"), ("hopper", "sm_90a"), ("sm_", "sm_90a")] {
        let error = capability(name).unwrap_err();
        assert_eq!(error.status, forge_status::FORGE_ERROR_UNSUPPORTED);
        assert!(error.message.contains(name) && error.message.contains(part), "{}", error.message);
    }
    // A number that looks like one, but that NVRTC does not know.
    let directory = Directory::new("unknown");
    let error = directory.warm("sm_990", &small()).unwrap_err();
    assert_eq!(error.status, forge_status::FORGE_ERROR_COMPILE);
    assert!(error.message.contains("gpu-architecture"), "{}", error.message);
}

#[test]
fn a_directory_that_is_not_used_is_an_error_here() {
    let directory = Directory::new("refused");
    fs::create_dir_all(&directory.0).unwrap();
    fs::set_permissions(&directory.0, fs::Permissions::from_mode(0o777)).unwrap();
    let error = directory.warm(SMALL, &small()).unwrap_err();
    assert_eq!(error.status, forge_status::FORGE_ERROR_CACHE);
    assert!(error.message.contains("chmod 700"), "{}", error.message);
    assert!(directory.files().is_empty());
}
