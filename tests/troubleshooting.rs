//! `docs/troubleshooting.md` quotes messages that the sources have. (That they are shown where they should
//! be, is tested in `driver.rs`, `cache_refusals.rs`, `fake_gpu.rs` and `warm.rs`.)

use std::fs;
use std::path::Path;

/// The text of all files of the backend and the C ABI, with strings that go over several lines joined.
fn sources(directory: &Path, out: &mut String) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else {
            let text = fs::read_to_string(&path).unwrap();
            // A backslash at the end of a line swallows it and the next line's indentation.
            let mut parts = text.split("\\\n");
            out.push_str(parts.next().unwrap_or_default());
            parts.for_each(|part| out.push_str(part.trim_start()));
        }
    }
}

/// The quoted message of a row, if the line is one.
fn message(line: &str) -> Option<&str> {
    let cells: Vec<&str> = line.strip_prefix("| ")?.split(" | ").collect();
    cells.get(1)?.strip_prefix('`')?.strip_suffix('`')
}

#[test]
fn every_quoted_message_is_one_of_the_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut text = String::new();
    sources(&root.join("src"), &mut text);
    // Markdown's quotes cannot hold a message's own.
    let text = text.replace('`', "");
    let document = fs::read_to_string(root.join("docs/troubleshooting.md")).unwrap();
    let mut found = 0;
    for message in document.lines().filter_map(message) {
        found += 1;
        for part in message.split('…') {
            assert!(text.contains(part), "'{part}' of '{message}' is in no source");
        }
    }
    assert!(found > 20, "{found} messages");
}
