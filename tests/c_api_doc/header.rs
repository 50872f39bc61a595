//! The header as a list of what it declares, each with its comment. It reads what cbindgen writes, no more.

/// A comment's lines without their slashes.
pub type Comment = Vec<String>;

/// One declaration.
pub struct Item {
    /// Its name.
    pub name: String,
    /// What stands above it.
    pub comment: Comment,
    /// What it is.
    pub kind: Kind,
}

impl Item {
    /// What of it has no comment.
    pub fn uncommented(&self) -> Vec<String> {
        let mut out = Vec::new();
        if self.comment.is_empty() {
            out.push(self.name.clone());
        }
        let mut part = |name: &str, comment: &Comment| {
            if comment.is_empty() {
                out.push(format!("{}.{name}", self.name));
            }
        };
        match &self.kind {
            Kind::Struct(fields) => fields.iter().for_each(|(name, c)| part(name, c)),
            Kind::Enum(variants) => variants.iter().for_each(|(name, _, c)| part(name, c)),
            _ => {}
        }
        out
    }
}

/// What a declaration is.
pub enum Kind {
    /// The prototype, as the header has it.
    Function(String),
    /// A function type.
    Callback(String),
    /// Fields: declaration and comment.
    Struct(Vec<(String, Comment)>),
    /// A struct without fields that the caller sees.
    Opaque,
    /// Names, numbers and comments.
    Enum(Vec<(String, String, Comment)>),
    /// Its value.
    Constant(String),
}

/// A cursor over the lines.
struct Lines<'a> {
    lines: std::iter::Peekable<std::str::Lines<'a>>,
    comment: Comment,
}

impl<'a> Lines<'a> {
    /// The next line that is no comment; comments before it are kept, an empty line forgets them.
    fn next(&mut self) -> Option<&'a str> {
        loop {
            let line = self.lines.next()?;
            let trimmed = line.trim_start();
            if let Some(text) = trimmed.strip_prefix("//") {
                self.comment.push(text.strip_prefix(' ').unwrap_or(text).to_string());
            } else if trimmed.is_empty() {
                self.comment.clear();
            } else {
                return Some(line);
            }
        }
    }

    fn take_comment(&mut self) -> Comment {
        std::mem::take(&mut self.comment)
    }

    /// The rest of a declaration that begins with this line: up to its semicolon.
    fn declaration(&mut self, first: &str) -> String {
        let mut text = first.to_string();
        while !text.trim_end().ends_with(';') {
            text.push('\n');
            text.push_str(self.next().expect("a declaration ends"));
        }
        text
    }
}

/// Everything that the header declares, in its order.
pub fn parse(header: &str) -> Vec<Item> {
    let mut lines = Lines { lines: header.lines().peekable(), comment: Vec::new() };
    let mut items = Vec::new();
    while let Some(line) = lines.next() {
        let comment = lines.take_comment();
        let mut add = |name: &str, kind| {
            items.push(Item { name: name.to_string(), comment: comment.clone(), kind });
        };
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["#define", name, value] => add(name, Kind::Constant(value.to_string())),
            ["enum", name] => add(name, Kind::Enum(variants(&mut lines))),
            ["typedef", "struct", "{"] => {
                let (fields, name) = fields(&mut lines);
                add(&name, Kind::Struct(fields));
            }
            ["typedef", "struct", name, _] => add(name, Kind::Opaque),
            ["typedef", ..] if line.contains("(*") => {
                let text = lines.declaration(line);
                let name = text.split("(*").nth(1).and_then(|t| t.split(')').next());
                add(name.expect("a function type has a name"), Kind::Callback(text.clone()));
            }
            _ if line.contains('(') && line.contains("forge_") && !line.starts_with('#') => {
                let text = lines.declaration(line);
                let before = text.split('(').next().unwrap_or_default();
                let name = before.rsplit([' ', '*']).next().unwrap_or_default().to_string();
                add(&name, Kind::Function(text));
            }
            _ => {}
        }
    }
    items
}

fn variants(lines: &mut Lines) -> Vec<(String, String, Comment)> {
    let mut out = Vec::new();
    while let Some(line) = lines.next() {
        let comment = lines.take_comment();
        if line.starts_with("};") {
            break;
        }
        if let Some((name, value)) = line.trim().trim_end_matches(',').split_once(" = ") {
            out.push((name.to_string(), value.to_string(), comment));
        }
    }
    out
}

fn fields(lines: &mut Lines) -> (Vec<(String, Comment)>, String) {
    let mut out = Vec::new();
    while let Some(line) = lines.next() {
        let comment = lines.take_comment();
        if let Some(name) = line.strip_prefix("} ") {
            return (out, name.trim_end_matches(';').to_string());
        }
        let text = lines.declaration(line);
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        out.push((text.trim_end_matches(';').to_string(), comment));
    }
    panic!("a struct ends");
}
