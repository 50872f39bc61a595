//! Declarations as Markdown.

use super::header::{Comment, Item, Kind};
use std::fmt::Write as _;

/// A comment as one line of a table.
fn cell(comment: &Comment) -> String {
    comment.join(" ").replace('|', "\\|")
}

/// A comment as paragraphs; what Rust calls "Safety" are the caller's duties.
fn paragraphs(comment: &Comment) -> String {
    let mut out = String::new();
    let mut duties = false;
    for line in comment {
        if line == "# Safety" {
            duties = true;
        } else if duties {
            let _ = write!(out, "**The caller promises:** {line}");
            out.push('\n');
            duties = false;
        } else {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

/// One function, struct, enum or function type, under a heading.
pub fn section(item: &Item) -> String {
    let mut out = format!("### `{}`\n\n", item.name);
    match &item.kind {
        Kind::Function(text) => {
            let _ = write!(out, "```c\n{text}\n```\n\n{}", paragraphs(&item.comment));
        }
        Kind::Callback(text) => {
            let _ = write!(out, "```c\n{text}\n```\n\n{}", paragraphs(&item.comment));
        }
        Kind::Opaque => out.push_str(&paragraphs(&item.comment)),
        Kind::Struct(fields) => {
            let _ = write!(out, "{}\n| field | |\n|---|---|\n", paragraphs(&item.comment));
            for (text, comment) in fields {
                let _ = writeln!(out, "| `{text}` | {} |", cell(comment));
            }
        }
        Kind::Enum(variants) => {
            let _ =
                write!(out, "{}\n| name | value | |\n|---|---|---|\n", paragraphs(&item.comment));
            for (name, value, comment) in variants {
                let _ = writeln!(out, "| `{name}` | {value} | {} |", cell(comment));
            }
        }
        Kind::Constant(_) => unreachable!("constants go into one table"),
    }
    out
}

/// All constants in one table.
pub fn constants(items: &[&Item]) -> String {
    let mut out = "| name | value | |\n|---|---|---|\n".to_string();
    for item in items {
        if let Kind::Constant(value) = &item.kind {
            let _ = writeln!(out, "| `{}` | {value} | {} |", item.name, cell(&item.comment));
        }
    }
    out
}
