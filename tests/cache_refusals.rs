//! What a caller is told of a cache directory that cannot be used or written, by those to whom that is an
//! error (forge_warm): each case has a message of its own. Real file systems where this process may mount
//! them, in a mount namespace of its own.

use forge::backend::cuda::cache::Cache;
use forge::error::forge_status::FORGE_ERROR_CACHE;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the tests below run in other environments: keeps a small image, then a large one, and prints what
/// it is told.
#[test]
#[ignore = "run by every_refusal_has_its_own_message"]
fn tell() {
    let named = std::env::var_os("FORGE_TEST_CACHE").map(PathBuf::from);
    let cache = match named {
        Some(directory) => Cache::with_limit(Some(directory), 1 << 30),
        None => Cache::new(None),
    };
    let stored =
        cache.try_store("small", b"image").and_then(|()| cache.try_store("large", &[1; 1_000_000]));
    match stored {
        Ok(()) => println!("\nTOLD nothing"),
        Err(error) => {
            assert_eq!(error.status, FORGE_ERROR_CACHE);
            println!("\nTOLD {}", error.message);
        }
    }
}

/// What [`tell`] is told in a process that this shell text starts as `"$@"`.
fn told(shell: &str, directory: Option<&Path>) -> String {
    let mut child = Command::new("sh");
    child.args(["-c", shell]).arg("sh").arg(std::env::current_exe().unwrap());
    child.args(["--exact", "tell", "--ignored", "--nocapture"]);
    for name in ["FORGE_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "FORGE_TEST_CACHE"] {
        child.env_remove(name);
    }
    if let Some(directory) = directory {
        child.env("FORGE_TEST_CACHE", directory).env("D", directory);
    }
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find_map(|l| l.strip_prefix("TOLD ")).map(str::to_string);
    line.unwrap_or_else(|| panic!("{shell}: {text}\n{}", String::from_utf8_lossy(&output.stderr)))
}

fn can(command: &str) -> bool {
    Command::new("sh").args(["-c", command]).output().is_ok_and(|o| o.status.success())
}

#[test]
fn every_refusal_has_its_own_message() {
    let root = std::env::temp_dir().join(format!("forge-refusals-{}", std::process::id()));
    let _ = fs::remove_dir_all(&root);
    fs::create_dir_all(&root).unwrap();
    // Others must be able to look in, whatever the umask.
    fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
    let make = |name: &str, mode: u32| {
        let path = root.join(name);
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    };
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    let mut expect = |case: &str, message: String, parts: &[&str]| {
        println!("{case}: {message}");
        for part in parts {
            assert!(message.contains(part), "{case}: no '{part}' in: {message}");
        }
        // The same but for the directory would be the same.
        let generic = message.replace(case, "DIR");
        if let Some(other) = seen.insert(generic, case.to_string()) {
            panic!("{case} and {other} have one message: {message}");
        }
    };
    let plain = r#"exec "$@""#;
    let way_out = "FORGE_CACHE_DIR";

    let good = make("good", 0o700);
    assert_eq!(told(plain, Some(&good)), "nothing");
    expect("none", told(plain, None), &["neither FORGE_CACHE_DIR nor HOME is set"]);
    let file = root.join("file");
    fs::write(&file, "").unwrap();
    expect("file", told(plain, Some(&file)), &["/file", "cannot be made", "File exists", way_out]);
    expect("open", told(plain, Some(&make("open", 0o777))), &["/open", "others", "chmod 700"]);
    let below = make("parent", 0o777).join("below");
    expect("below", told(plain, Some(&below)), &["/below", "replace it", way_out]);
    // A write beyond a process's limit for a file, without the trap by a signal.
    let limited = format!(r#"trap "" XFSZ; ulimit -f 8; {plain}"#);
    let parts = ["/limited", "not written", "File too large", "free some space", way_out];
    expect("limited", told(&limited, Some(&make("limited", 0o700))), &parts);

    if can("unshare -m mount -t tmpfs none /mnt") {
        let mount = |options: &str| {
            format!(
                r#"exec unshare -m sh -c 'mount -t tmpfs -o {options} none "$D" && exec "$@"' sh "$@""#
            )
        };
        let parts = ["/full", "not written", "No space left", "free some space", way_out];
        let full = told(&mount("size=64k,mode=700"), Some(&make("full", 0o700)));
        expect("full", full, &parts);
        let parts = ["/readonly", "not written", "Read-only", "forge_train warm", way_out];
        let readonly = told(&mount("ro,mode=700"), Some(&make("readonly", 0o700)));
        expect("readonly", readonly, &parts);
    } else {
        println!("this process may not mount: a full and a read-only file system are not shown");
    }

    let theirs = make("theirs", 0o755);
    // Only root can give a directory away, or be another user.
    if chown(&theirs, Some(12345), None).is_ok() && can("setpriv --reuid 65534 true") {
        expect("theirs", told(plain, Some(&theirs)), &["/theirs", "user 12345", way_out]);
        // Root's directory is trusted, read, and not written.
        let nobody = format!("exec setpriv --reuid 65534 --clear-groups {}", r#""$@""#);
        let roots = make("roots", 0o755);
        let parts = ["/roots", "not written", "Permission denied", "forge_train warm", way_out];
        expect("roots", told(&nobody, Some(&roots)), &parts);
    } else {
        println!("this process is not root's: directories of other users are not shown");
    }
    fs::remove_dir_all(&root).unwrap();
}

#[test]
fn a_directory_that_all_may_read_has_entries_that_all_may_read() {
    let root = std::env::temp_dir().join(format!("forge-readable-{}", std::process::id()));
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for (directory, entry) in [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600)] {
        fs::create_dir_all(&root).unwrap();
        fs::set_permissions(&root, fs::Permissions::from_mode(directory)).unwrap();
        Cache::with_limit(Some(root.clone()), 1 << 30).try_store("key", b"image").unwrap();
        assert_eq!(mode(root.join("key.cubin")), entry, "{directory:o}");
        fs::remove_dir_all(&root).unwrap();
    }
}
