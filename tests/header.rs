//! `include/forge.h` is what cbindgen makes of `src/ffi`. `FORGE_BLESS=1` renews it.

use std::path::Path;

#[test]
fn the_checked_in_header_is_the_generated_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    // The ABI is src/ffi and the status enum; constants of other modules are no business of C.
    let bindings = cbindgen::Builder::new()
        .with_config(config)
        .with_src(root.join("src/error.rs"))
        .with_src(root.join("src/rule/user/tile.rs"))
        .with_src(root.join("src/ffi/mod.rs"))
        .generate()
        .expect("cbindgen reads src/ffi");
    let mut generated = Vec::new();
    bindings.write(&mut generated);
    let generated = String::from_utf8(generated).unwrap();
    let path = root.join("include/forge.h");
    if std::env::var_os("FORGE_BLESS").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        checked_in == generated,
        "include/forge.h is out of date; run `FORGE_BLESS=1 cargo test --test header` and commit it"
    );
}
