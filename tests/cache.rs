//! The cache of compiled images: what it gives back, whom it trusts, how much it keeps.

use forge::backend::cuda::cache::Cache;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, SystemTime};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// A directory of a test, empty at first and removed in the end.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("forge-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }

    fn cache(&self) -> Cache {
        Cache::with_limit(Some(self.0.clone()), 1 << 30)
    }

    fn files(&self) -> Vec<PathBuf> {
        fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().path()).collect()
    }

    fn mode(&self, mode: u32) {
        fs::set_permissions(&self.0, fs::Permissions::from_mode(mode)).unwrap();
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn images_come_back_and_damaged_ones_do_not() {
    let directory = Directory::new("damaged");
    let cache = directory.cache();
    assert_eq!(fs::metadata(&directory.0).unwrap().permissions().mode() & 0o777, 0o700);
    let image: Vec<u8> = (0..100_000u32).map(|i| (i * 7) as u8).collect();
    assert_eq!(cache.load("key"), None);
    cache.store("key", &image);
    assert_eq!(cache.load("key"), Some(image.clone()));
    let file = directory.files().pop().unwrap();
    let whole = fs::read(&file).unwrap();
    for cut in [0, 7, 8, 39, 40, whole.len() - 1] {
        fs::write(&file, &whole[..cut]).unwrap();
        assert_eq!(cache.load("key"), None, "{cut} bytes");
    }
    for at in [0, 8, 39, 40, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&file, &bytes).unwrap();
        assert_eq!(cache.load("key"), None, "byte {at}");
    }
    cache.store("key", &image);
    assert_eq!(cache.load("key"), Some(image));
}

#[test]
fn readers_see_a_whole_image_while_writers_replace_it() {
    let directory = Directory::new("race");
    let (cache, barrier) = (Arc::new(directory.cache()), Arc::new(Barrier::new(6)));
    let threads: Vec<_> = (0..6u8)
        .map(|i| {
            let (cache, barrier) = (cache.clone(), barrier.clone());
            thread::spawn(move || {
                barrier.wait();
                for _ in 0..60 {
                    if i < 3 {
                        cache.store("key", &vec![i; 50_000 + usize::from(i)]);
                    } else if let Some(image) = cache.load("key") {
                        assert!(image.iter().all(|b| *b == image[0]));
                        assert_eq!(image.len(), 50_000 + usize::from(image[0]));
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert_eq!(directory.files().len(), 1, "no part of an image is left behind");
}

#[test]
fn a_directory_that_others_can_write_is_not_used() {
    let directory = Directory::new("shared");
    fs::create_dir_all(&directory.0).unwrap();
    directory.mode(0o777);
    let cache = directory.cache();
    cache.store("key", b"image");
    assert_eq!(cache.load("key"), None);
    assert!(directory.files().is_empty());
}

#[test]
fn a_directory_that_cannot_be_made_or_written_is_no_error() {
    let cache = Cache::new(Some("/proc/no/such/place".into()));
    cache.store("key", b"image");
    assert_eq!(cache.load("key"), None);

    let directory = Directory::new("readonly");
    let cache = directory.cache();
    cache.store("old", b"image");
    directory.mode(0o500);
    cache.store("new", b"image");
    assert_eq!(cache.load("old"), Some(b"image".to_vec()));
    directory.mode(0o700);
}

#[track_caller]
fn assert_refused(cache: &Cache, because: &str) {
    let problem = cache.problem().expect("it should be refused");
    assert!(problem.contains(because), "'{because}' is not in: {problem}");
    cache.store("key", b"image");
    assert_eq!(cache.load("key"), None);
}

#[test]
fn each_reason_to_refuse_a_directory_has_its_own_message() {
    let directory = Directory::new("refused");
    fs::create_dir_all(&directory.0).unwrap();
    directory.mode(0o720);
    assert_refused(&directory.cache(), "chmod 700");

    // A parent that anybody can write, unless it is sticky: the directory could be replaced.
    let inner = directory.0.join("inner");
    let cache = || Cache::with_limit(Some(inner.clone()), 1 << 30);
    directory.mode(0o777);
    assert_refused(&cache(), "replace it");
    directory.mode(0o1777);
    assert_eq!(cache().problem(), None);
    directory.mode(0o700);

    let file = directory.0.join("file");
    fs::write(&file, "").unwrap();
    assert!(Cache::with_limit(Some(file), 1 << 30).problem().is_some());
    assert_refused(&Cache::with_limit(None, 1 << 30), "FORGE_CACHE_DIR");

    // Only root can give a directory away.
    if chown(&inner, Some(12345), None).is_ok() {
        assert_refused(&cache(), "user 12345");
        chown(&inner, Some(0), None).unwrap();
        chown(&directory.0, Some(12345), None).unwrap();
        assert_refused(&cache(), "replace it");
    }
}

#[test]
fn a_link_is_judged_by_where_it_leads() {
    let (directory, target) = (Directory::new("link"), Directory::new("target"));
    fs::create_dir_all(&directory.0).unwrap();
    directory.mode(0o700);
    fs::create_dir_all(&target.0).unwrap();
    target.mode(0o777);
    let link = directory.0.join("cache");
    symlink(&target.0, &link).unwrap();
    assert_refused(&Cache::with_limit(Some(link.clone()), 1 << 30), "chmod 700");
    target.mode(0o700);
    let cache = Cache::with_limit(Some(link), 1 << 30);
    cache.store("key", b"image");
    assert_eq!(cache.load("key"), Some(b"image".to_vec()));
}

#[test]
fn what_was_not_used_for_longest_goes_first() {
    let directory = Directory::new("limit");
    let cache = Cache::with_limit(Some(directory.0.clone()), 100_000);
    let aged = |name: &str, days: u32| {
        let file = fs::File::options().append(true).open(directory.0.join(name)).unwrap();
        file.set_modified(SystemTime::now() - days * DAY).unwrap();
    };
    for (key, days) in [("a", 9), ("b", 8), ("c", 7), ("d", 6)] {
        cache.store(key, &[0; 20_000]);
        aged(&format!("{key}.cubin"), days);
    }
    fs::write(directory.0.join("killed.1.2.part"), "").unwrap();
    aged("killed.1.2.part", 1);
    fs::write(directory.0.join("running.3.4.part"), "").unwrap();
    // The oldest is used again.
    assert!(cache.load("a").is_some());
    cache.store("e", &[0; 30_000]);
    let mut left: Vec<_> =
        directory.files().iter().map(|f| f.file_name().unwrap().to_owned()).collect();
    left.sort();
    // 110 KB of 100: down to 75, by b and c.
    assert_eq!(left, ["a.cubin", "d.cubin", "e.cubin", "running.3.4.part"]);
}

/// What `a_full_disk_costs_time_only` runs in a process that cannot write files of more than 1 or 2 KB.
#[test]
#[ignore = "run by a_full_disk_costs_time_only"]
fn store_where_nothing_fits() {
    let directory = PathBuf::from(std::env::var_os("FORGE_TEST_DIRECTORY").unwrap());
    let cache = Cache::with_limit(Some(directory.clone()), 1 << 30);
    assert_eq!(cache.problem(), None);
    cache.store("key", &[1; 100_000]);
    assert_eq!(cache.load("key"), None);
    cache.store("small", b"image");
    assert_eq!(cache.load("small"), Some(b"image".to_vec()));
    assert_eq!(fs::read_dir(directory).unwrap().count(), 1, "no part of an image is left behind");
}

#[test]
fn a_full_disk_costs_time_only() {
    let directory = Directory::new("full");
    // Writes beyond a file's limit fail like those on a full disk; without the trap by a signal.
    let mut child = Command::new("sh");
    child.args(["-c", r#"trap "" XFSZ; ulimit -f 2; exec "$0" "$@""#]);
    child.arg(std::env::current_exe().unwrap());
    child.args(["--exact", "store_where_nothing_fits", "--ignored", "--nocapture"]);
    child.env("FORGE_TEST_DIRECTORY", &directory.0);
    let output = child.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
