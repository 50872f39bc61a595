//! `docs/c-api.md` is `docs/c-api.in.md` with the header's declarations and comments put in where it names
//! them. `FORGE_BLESS=1` renews it.
//!
//! A line of the template that begins with `@` is replaced:
//! - `@functions NAME…`, `@types NAME…`: a section for each, in this order;
//! - `@constants`: a table of all;
//! - `@code FILE`: the file in a block of code.
//!
//! Every function and type must be named once, and everything must have a comment.

#[path = "c_api_doc/header.rs"]
mod header;
#[path = "c_api_doc/render.rs"]
mod render;

use header::{Item, Kind, parse};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

const NOTE: &str = "<!-- Generated from include/forge.h and docs/c-api.in.md; do not edit. \
                    `FORGE_BLESS=1 cargo test --test c_api_doc` renews it. -->\n\n";

/// The document, or what is wrong with template or header.
fn generate(template: &str, header: &str, code: impl Fn(&str) -> String) -> Result<String, String> {
    let items = parse(header);
    let mut left: BTreeMap<&str, &Item> = items
        .iter()
        .filter(|i| !matches!(i.kind, Kind::Constant(_)))
        .map(|i| (i.name.as_str(), i))
        .collect();
    let uncommented: Vec<String> = items.iter().flat_map(Item::uncommented).collect();
    if !uncommented.is_empty() {
        return Err(format!("without a comment in include/forge.h: {}", uncommented.join(", ")));
    }
    let mut out = NOTE.to_string();
    for line in template.lines() {
        let Some(order) = line.strip_prefix('@') else {
            out.push_str(line);
            out.push('\n');
            continue;
        };
        let mut words = order.split_whitespace();
        match words.next() {
            Some("functions" | "types") => {
                let mut sections = Vec::new();
                for name in words {
                    let Some(item) = left.remove(name) else {
                        return Err(format!("{name}: not in the header, or named twice"));
                    };
                    sections.push(render::section(item));
                }
                out.push_str(&sections.join("\n"));
            }
            Some("constants") => {
                let all: Vec<&Item> = items.iter().collect();
                out.push_str(&render::constants(&all));
            }
            Some("code") => {
                let file = words.next().ok_or("@code: no file")?;
                out.push_str(&format!("```c\n{}```\n", code(file)));
            }
            other => return Err(format!("{other:?}: no such order")),
        }
    }
    if !left.is_empty() {
        let names: Vec<&str> = left.into_keys().collect();
        return Err(format!("not in docs/c-api.in.md: {}", names.join(", ")));
    }
    Ok(out)
}

#[test]
fn the_checked_in_document_is_the_generated_one() {
    let generated = generate(&read("docs/c-api.in.md"), &read("include/forge.h"), read).unwrap();
    let path = root().join("docs/c-api.md");
    if std::env::var_os("FORGE_BLESS").is_some() {
        fs::write(&path, &generated).unwrap();
    }
    assert!(
        read("docs/c-api.md") == generated,
        "docs/c-api.md is out of date; run `FORGE_BLESS=1 cargo test --test c_api_doc` and commit it"
    );
}

/// Whatever the generator does not understand would be missing silently.
#[test]
fn every_name_of_the_header_is_in_the_document() {
    let header = read("include/forge.h");
    let document = generate(&read("docs/c-api.in.md"), &header, read).unwrap();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut found = 0;
    // The block comment at its top speaks of other things.
    let (_, header) = header.split_once("*/").unwrap();
    for line in header.lines().filter(|l| !l.trim_start().starts_with("//") && !l.starts_with('#'))
    {
        for word in line.split(|c| !is_name(c)) {
            if word.to_ascii_lowercase().starts_with("forge_") {
                found += 1;
                assert!(document.contains(word), "{word}");
            }
        }
    }
    assert!(found > 200, "{found}");
}

const HEADER: &str = "\
#ifndef FORGE_H
#define FORGE_H
// Most | least.
#define FORGE_MOST 3

// A number.
enum forge_number
#if defined(__cplusplus)
  : uint32_t
#endif
 {
  // One.
  FORGE_ONE = 1,
};

// Hidden.
typedef struct forge_hidden forge_hidden;

// Some fields.
typedef struct {
  // Called
  // back.
  int32_t (*call)(void *user,
                  uint32_t n);
} forge_fields;

// Does it.
//
// # Safety
// `out` is live.
const char *forge_do(forge_fields *out,
                     uint32_t n);
#endif
";

#[test]
fn comments_become_tables_and_paragraphs() {
    let template = "Before.\n\n@functions forge_do\n@types forge_fields forge_number forge_hidden\n\
                    @constants\n@code x.c\n";
    let code = |_: &str| "int x;\n".to_string();
    let made = generate(template, HEADER, code).unwrap();
    for part in [
        "Before.\n",
        "### `forge_do`\n\n```c\nconst char *forge_do(forge_fields *out,\n                     uint32_t n);\n```\n",
        "Does it.\n\n**The caller promises:** `out` is live.\n",
        "| `int32_t (*call)(void *user, uint32_t n)` | Called back. |",
        "| `FORGE_ONE` | 1 | One. |",
        "### `forge_hidden`\n\nHidden.\n",
        "| `FORGE_MOST` | 3 | Most \\| least. |",
        "```c\nint x;\n```\n",
    ] {
        assert!(made.contains(part), "no '{part}' in:\n{made}");
    }
}

#[test]
fn what_is_missing_is_an_error() {
    let code = |_: &str| String::new();
    let wrong = |template: &str, header: &str| generate(template, header, code).unwrap_err();
    let all = "@functions forge_do\n@types forge_fields forge_number forge_hidden\n";
    assert!(wrong("@functions forge_do\n", HEADER).contains("forge_fields, forge_hidden"));
    assert!(wrong(&format!("{all}@functions forge_do\n"), HEADER).contains("named twice"));
    assert!(wrong("@function forge_do\n", HEADER).contains("no such order"));
    for (comment, name) in [("// Hidden.", "forge_hidden"), ("  // One.", "forge_number.FORGE_ONE")]
    {
        let bare = HEADER.replace(&format!("{comment}\n"), "");
        assert!(wrong(all, &bare).contains(&format!("include/forge.h: {name}")), "{comment}");
    }
}
