//! The C ABI as C and C++ programs see it: each program of `tests/c` is compiled with warnings as
//! errors, linked against `libforge.a` and run; the shared library exports `forge_*` alone; and what
//! `scripts/install.sh` installs can be built against.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// What `libforge.a` needs of the system, as `rustc --print native-static-libs` says; the same list
/// is in `forge.pc.in`.
const SYSTEM_LIBRARIES: &[&str] = &["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl", "-lc"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Cargo's target directory: the one that holds `tmp`, wherever it was configured to be.
fn target_directory() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("tmp is inside the target directory")
}

/// Runs a command to its end; its output is shown, and is the message where it fails.
fn run(command: &mut Command) -> String {
    let shown = format!("{command:?}");
    let output = command.output().unwrap_or_else(|e| panic!("{shown}: {e}"));
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    print!("{stdout}");
    assert!(output.status.success(), "{shown}: {}\n{stdout}\n{stderr}", output.status);
    stdout
}

fn exists(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success())
}

/// The directory with an up-to-date release `libforge.a` and `libforge.so`. `cargo test` builds only
/// the rlib; it holds no lock while tests run, so that a cargo started here does not wait for it.
fn library_directory() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        run(Command::new(env!("CARGO"))
            .args(["build", "--release", "--lib", "--quiet", "--target-dir"])
            .arg(target_directory())
            .current_dir(root()));
        target_directory().join("release")
    })
}

/// The compiler and the strict flags of a source file, by its suffix.
fn compiler(source: &Path) -> Command {
    let warnings = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-O1"];
    let (variable, fallback, standard) = if source.extension().is_some_and(|e| e == "cpp") {
        ("CXX", "c++", "-std=c++17")
    } else {
        ("CC", "cc", "-std=c99")
    };
    let mut command = Command::new(std::env::var(variable).unwrap_or_else(|_| fallback.into()));
    command.arg(standard).args(warnings).arg("-pthread").arg(source);
    command
}

/// Compiles a program of `tests/c` against the static library and runs it.
fn build_and_run(file: &str) -> String {
    let library = library_directory();
    let source = root().join("tests/c").join(file);
    let directory = scratch_directory(&format!("program-{file}"));
    let program = directory.join("program");
    run(compiler(&source)
        .arg("-I")
        .arg(root().join("include"))
        .arg(library.join("libforge.a"))
        .args(SYSTEM_LIBRARIES)
        .arg("-o")
        .arg(&program));
    run(&mut Command::new(program))
}

/// A fresh directory of this name.
fn scratch_directory(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if path.exists() {
        std::fs::remove_dir_all(&path).unwrap();
    }
    std::fs::create_dir_all(&path).unwrap();
    path
}

#[test]
fn abi() {
    let version = env!("CARGO_PKG_VERSION");
    assert!(build_and_run("abi.c").contains(&format!("forge {version}, ABI 1")));
}

#[test]
fn train_two_layer() {
    build_and_run("train_two_layer.c");
}

#[test]
fn fp32_products() {
    build_and_run("fp32_products.c");
}

#[test]
fn update_group() {
    build_and_run("update_group.c");
}

#[test]
fn deferred_clip() {
    build_and_run("deferred_clip.c");
}

/// The example that docs/c-api.md shows.
#[test]
fn doc_example() {
    build_and_run("doc_example.c");
}

#[test]
fn user_rule() {
    build_and_run("user_rule.c");
}

#[test]
fn errors() {
    build_and_run("errors.c");
}

#[test]
fn host_comm() {
    build_and_run("host_comm.cpp");
}

#[test]
fn threads() {
    build_and_run("threads.c");
}

#[test]
fn fork() {
    build_and_run("fork.c");
}

/// Not linked against the library: it opens it itself.
#[cfg(target_os = "linux")]
#[test]
fn unload() {
    let library = library_directory().join("libforge.so");
    let program = scratch_directory("program-unload.c").join("program");
    run(compiler(&root().join("tests/c/unload.c"))
        .arg("-I")
        .arg(root().join("include"))
        .args(["-ldl", "-o"])
        .arg(&program));
    run(Command::new(program).arg(&library));
    let dynamic = run(Command::new("readelf").arg("-d").arg(&library));
    assert!(dynamic.contains("NODELETE"), "dlclose would unmap it:\n{dynamic}");
}

#[test]
fn every_program_is_a_test() {
    let mut programs: Vec<_> = std::fs::read_dir(root().join("tests/c"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".c") || name.ends_with(".cpp"))
        .collect();
    programs.sort();
    let tested = [
        "abi.c",
        "deferred_clip.c",
        "doc_example.c",
        "errors.c",
        "fork.c",
        "fp32_products.c",
        "host_comm.cpp",
        "threads.c",
        "train_two_layer.c",
        "unload.c",
        "update_group.c",
        "user_rule.c",
    ];
    assert_eq!(programs, tested);
}

/// The header is C99 and C++17 by itself, whatever was included before it.
#[test]
fn the_header_stands_alone() {
    let directory = scratch_directory("header-alone");
    for (file, standards) in [("a.c", &["-std=c99", "-std=c11"][..]), ("a.cpp", &["-std=c++17"])] {
        let source = directory.join(file);
        std::fs::write(&source, "#include \"forge.h\"\nint unused_so_not_empty;\n").unwrap();
        for standard in standards {
            run(compiler(&source)
                .arg(standard)
                .arg("-fsyntax-only")
                .arg("-I")
                .arg(root().join("include")));
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_shared_library_exports_forge_alone_and_has_its_soname() {
    let library = library_directory().join("libforge.so");
    let symbols = run(Command::new("nm").args(["-D", "--defined-only"]).arg(&library));
    let names: Vec<_> = symbols.lines().filter_map(|l| l.split_whitespace().last()).collect();
    let strangers: Vec<_> = names.iter().filter(|n| !n.starts_with("forge_")).collect();
    assert!(strangers.is_empty(), "exported besides forge_*: {strangers:?}");

    // Every function of the header is there, and nothing that the header does not know.
    let header = std::fs::read_to_string(root().join("include/forge.h")).unwrap();
    let mut declared: Vec<_> = header
        .split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '('))
        .filter_map(|word| word.split_once('(').map(|(name, _)| name))
        .filter(|name| name.starts_with("forge_"))
        .collect();
    declared.sort_unstable();
    declared.dedup();
    let mut exported = names.clone();
    exported.sort_unstable();
    assert_eq!(exported, declared);

    let dynamic = run(Command::new("readelf").arg("-d").arg(&library));
    let soname = format!("[libforge.so.{}]", env!("CARGO_PKG_VERSION_MAJOR"));
    assert!(
        dynamic.lines().any(|l| l.contains("SONAME") && l.contains(&soname)),
        "no SONAME {soname} in:\n{dynamic}"
    );
}

/// The words of a field of a .pc file with its variables put in, and after it those of
/// `Libs.private` where asked: what `pkg-config` would say.
fn parse_pc(path: &Path, fields: &[&str]) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    let mut variables: Vec<(String, String)> = Vec::new();
    let mut words = Vec::new();
    let expand = |value: &str, variables: &[(String, String)]| {
        variables
            .iter()
            .fold(value.to_string(), |v, (name, to)| v.replace(&format!("${{{name}}}"), to))
    };
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        if let Some((field, value)) = line.split_once(": ") {
            if fields.contains(&field) {
                let value = expand(value, &variables);
                words.extend(value.split_whitespace().map(str::to_string));
            }
        } else if let Some((name, value)) = line.split_once('=') {
            let value = expand(value, &variables);
            variables.push((name.to_string(), value));
        }
    }
    words
}

#[cfg(target_os = "linux")]
#[test]
fn what_is_installed_can_be_built_against() {
    library_directory();
    let prefix = scratch_directory("prefix");
    run(Command::new(root().join("scripts/install.sh"))
        .arg("--prefix")
        .arg(&prefix)
        .env("CARGO", env!("CARGO"))
        .env("CARGO_TARGET_DIR", target_directory())
        .env_remove("DESTDIR"));
    let (lib, version) = (prefix.join("lib"), env!("CARGO_PKG_VERSION"));
    let major = env!("CARGO_PKG_VERSION_MAJOR");
    for (link, to) in [
        ("libforge.so".to_string(), format!("libforge.so.{major}")),
        (format!("libforge.so.{major}"), format!("libforge.so.{version}")),
    ] {
        assert_eq!(std::fs::read_link(lib.join(link)).unwrap(), Path::new(&to));
    }

    let pc = lib.join("pkgconfig/forge.pc");
    let mut shared = parse_pc(&pc, &["Cflags", "Libs"]);
    let mut everything = parse_pc(&pc, &["Cflags", "Libs", "Libs.private"]);
    if exists("pkg-config") {
        let pkg_config = |flags: &[&str]| {
            let mut command = Command::new("pkg-config");
            command.args(flags).arg("forge").env("PKG_CONFIG_PATH", lib.join("pkgconfig"));
            run(&mut command).split_whitespace().map(str::to_string).collect::<Vec<_>>()
        };
        assert_eq!(pkg_config(&["--modversion"]), [version]);
        shared = pkg_config(&["--cflags", "--libs"]);
        everything = pkg_config(&["--cflags", "--libs", "--static"]);
    }
    for library in SYSTEM_LIBRARIES {
        assert!(everything.iter().any(|w| w == library), "{library} is not in Libs.private");
    }

    // Shared: the program finds the library by its SONAME.
    let source = root().join("tests/c/abi.c");
    let program = prefix.join("abi-shared");
    run(compiler(&source).args(&shared).arg("-o").arg(&program));
    run(Command::new(&program).env("LD_LIBRARY_PATH", &lib));
    // Static: runs without it.
    let program = prefix.join("abi-static");
    let archive = lib.join("libforge.a").into_os_string().into_string().unwrap();
    let flags = everything.iter().map(|w| if w == "-lforge" { &archive } else { w });
    run(compiler(&source).args(flags).arg("-o").arg(&program));
    let needed = run(Command::new("readelf").arg("-d").arg(&program));
    assert!(!needed.contains("libforge"), "{needed}");
    run(&mut Command::new(&program));
}
