//! What a definition must be before a compiler or a weight sees it: so that a mistake is named in the
//! user's own words, and a loop that never ends never reaches a GPU.

use super::{Definition, GIVEN, LR, MAX_HYPER, MAX_STATES, STEP, WEIGHT_DECAY};
use crate::error::{Result, bail};

/// Bytes of a rule's text: a few lines, and room.
const MOST_TEXT: usize = 64 << 10;
/// Iterations of a loop: it runs for each element.
const MOST_ITERATIONS: i64 = 1024;
/// Bytes of a name.
const MOST_NAME: usize = 64;

/// Words that C++ keeps for itself and that are likely names.
const KEYWORDS: &[&str] = &[
    "and",
    "asm",
    "auto",
    "bool",
    "break",
    "case",
    "char",
    "class",
    "const",
    "constexpr",
    "continue",
    "default",
    "delete",
    "do",
    "double",
    "else",
    "enum",
    "extern",
    "float",
    "for",
    "goto",
    "if",
    "inline",
    "int",
    "long",
    "namespace",
    "new",
    "not",
    "operator",
    "or",
    "private",
    "public",
    "register",
    "return",
    "short",
    "signed",
    "sizeof",
    "static",
    "struct",
    "switch",
    "template",
    "this",
    "try",
    "typedef",
    "union",
    "unsigned",
    "using",
    "virtual",
    "void",
    "volatile",
    "while",
    "xor",
];

const BOUND: &str = "a loop needs a bound that is a number: for (int i = 0; i < 8; ++i)";
const ALONE: &str = "a rule sees one element, and neither its place nor other threads";

/// Words that a rule cannot mean, each with the reason.
const REFUSED: &[(&str, &str)] = &[
    ("while", BOUND),
    ("do", BOUND),
    ("goto", BOUND),
    ("asm", "a rule is plain C over one element"),
    ("threadIdx", ALONE),
    ("blockIdx", ALONE),
    ("__syncthreads", ALONE),
    ("__syncwarp", ALONE),
    ("__shared__", ALONE),
    ("atomicAdd", ALONE),
];

pub(super) fn definition(d: &Definition) -> Result<()> {
    identifier("name", &d.name)?;
    counts(d)?;
    names(d)?;
    ranges(d)?;
    if d.cuda.is_none() && d.cpu.is_none() {
        bail!(FORGE_ERROR_RULE, "cuda_source, cpu_function: rule '{}' has neither", d.name);
    }
    match &d.cuda {
        Some(source) => cuda(d, source),
        None if d.per_step.is_empty() => Ok(()),
        None => bail!(
            FORGE_ERROR_RULE,
            "per_step_names: they are for cuda_source, which is NULL; a CPU function computes its own"
        ),
    }
}

fn counts(d: &Definition) -> Result<()> {
    let (hyper, states, values) = (d.hyper.len(), d.states.len(), d.per_step.len());
    if states > MAX_STATES {
        bail!(FORGE_ERROR_RULE, "n_states: {states}; a rule has at most {MAX_STATES}");
    }
    if hyper > MAX_HYPER || hyper + values > STEP {
        bail!(FORGE_ERROR_RULE, "n_hyper: {hyper}, n_per_step: {values}; at most {STEP} together");
    }
    Ok(())
}

fn names(d: &Definition) -> Result<()> {
    let is_named = |i: usize, name: &str| d.hyper.get(i).is_some_and(|h| h.name == name);
    if !(is_named(LR, "lr") && is_named(WEIGHT_DECAY, "weight_decay")) {
        bail!(
            FORGE_ERROR_RULE,
            "hyper_names: must begin with 'lr' and 'weight_decay', which every optimizer sets"
        );
    }
    let mut taken = GIVEN.to_vec();
    let all = (d.hyper.iter().map(|h| ("hyper_names", &h.name)))
        .chain(d.states.iter().map(|(name, _)| ("state_names", name)))
        .chain(d.per_step.iter().map(|value| ("per_step_names", &value.name)));
    for (argument, name) in all {
        identifier(argument, name)?;
        if taken.contains(&name.as_str()) {
            bail!(
                FORGE_ERROR_RULE,
                "{argument}: '{name}' is taken; names must differ, and g, w and step are given"
            );
        }
        taken.push(name);
    }
    Ok(())
}

fn identifier(argument: &str, name: &str) -> Result<()> {
    let starts = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    let goes_on = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let is_kept = KEYWORDS.contains(&name) || name.starts_with("forge") || name.contains("__");
    if !starts || !goes_on || is_kept || name.len() > MOST_NAME {
        let shown: String = name.escape_default().take(80).collect();
        bail!(
            FORGE_ERROR_RULE,
            "{argument}: '{shown}' cannot be a name: letters, digits and _, at most {MOST_NAME}, no \
             keyword of C++, no __, not beginning with forge"
        );
    }
    Ok(())
}

fn ranges(d: &Definition) -> Result<()> {
    for h in &d.hyper {
        let (name, least, most) = (&h.name, h.least, h.most);
        if !(least <= h.default && h.default <= most) {
            bail!(
                FORGE_ERROR_RULE,
                "hyper_defaults: {name} = {} is not in {least}..={most}",
                h.default
            );
        }
        if !((least as f32).is_finite() && (most as f32).is_finite()) {
            bail!(
                FORGE_ERROR_RULE,
                "hyper_least, hyper_most: {least}..={most} of '{name}' does not fit fp32"
            );
        }
    }
    Ok(())
}

fn cuda(d: &Definition, source: &str) -> Result<()> {
    for value in &d.per_step {
        let argument = format!("per_step_expressions of '{}'", value.name);
        let tokens = tokens(&argument, &value.expression)?;
        if tokens.iter().any(|t| [";", "{", "="].contains(&t.text)) {
            bail!(
                FORGE_ERROR_RULE,
                "{argument}: not one expression of C, such as 1.0 - pow(beta, step)"
            );
        }
    }
    let tokens = tokens("cuda_source", source)?;
    loops(&tokens)?;
    let has = |name: &str| tokens.iter().any(|t| t.text == name);
    if !has("w") {
        bail!(FORGE_ERROR_RULE, "cuda_source: never names w, so it would update nothing");
    }
    if let Some((name, _)) = d.states.iter().find(|(name, _)| !has(name)) {
        bail!(
            FORGE_ERROR_RULE,
            "n_states: {}, but cuda_source never names state '{name}'; use it or leave it out",
            d.states.len()
        );
    }
    Ok(())
}

/// A word, a number or a mark, and its line.
struct Token<'a> {
    text: &'a str,
    line: usize,
}

/// The tokens of a text, without comments. Refuses what no rule needs, and brackets that do not match:
/// such a text could end the function around it.
fn tokens<'a>(argument: &str, text: &'a str) -> Result<Vec<Token<'a>>> {
    const PAIRS: &[&str] = &["++", "--", "+=", "-=", "*=", "/=", "<=", ">=", "==", "!="];
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    if text.trim().is_empty() || text.len() > MOST_TEXT || text.contains('\0') {
        bail!(FORGE_ERROR_RULE, "{argument}: empty, longer than {MOST_TEXT} bytes, or with a NUL");
    }
    let mut out: Vec<Token> = Vec::new();
    let mut open: Vec<(char, usize)> = Vec::new();
    let (mut rest, mut line) = (text, 1);
    while let Some(c) = rest.chars().next() {
        let len = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if let Some(comment) = rest.strip_prefix("/*") {
            match comment.find("*/") {
                Some(end) => end + 4,
                None => {
                    bail!(FORGE_ERROR_RULE, "{argument}: line {line}: a comment without an end")
                }
            }
        } else if is_word(c) {
            rest.find(|c| !is_word(c)).unwrap_or(rest.len())
        } else if rest.get(..2).is_some_and(|two| PAIRS.contains(&two)) {
            2
        } else {
            c.len_utf8()
        };
        let (token, behind) = rest.split_at(len);
        rest = behind;
        let at = line;
        line += token.matches('\n').count();
        if c.is_whitespace() || token.starts_with("//") || token.starts_with("/*") {
            continue;
        }
        match token {
            "#" | "\\" => bail!(
                FORGE_ERROR_RULE,
                "{argument}: line {at}: '{c}': a rule has no preprocessor lines; CUDA's mathematical \
                 functions are there without a header"
            ),
            "\"" | "'" => {
                bail!(FORGE_ERROR_RULE, "{argument}: line {at}: {c}: a rule has no texts")
            }
            "(" | "[" | "{" => open.push((c, at)),
            ")" | "]" | "}" => {
                let fits = |o: char| matches!((o, c), ('(', ')') | ('[', ']') | ('{', '}'));
                if !open.pop().is_some_and(|(o, _)| fits(o)) {
                    bail!(FORGE_ERROR_RULE, "{argument}: line {at}: '{c}' closes nothing");
                }
            }
            word => {
                if let Some((_, why)) = REFUSED.iter().find(|(refused, _)| *refused == word) {
                    bail!(FORGE_ERROR_RULE, "{argument}: line {at}: '{word}': {why}");
                }
            }
        }
        out.push(Token { text: token, line: at });
    }
    if let Some((c, at)) = open.pop() {
        bail!(FORGE_ERROR_RULE, "{argument}: line {at}: '{c}' is never closed");
    }
    Ok(out)
}

/// Tokens of `(int i = 0; i < 8; ++i)`.
const HEADER: usize = 13;

/// Refuses loops but `for (int i = 0; i < 8; ++i)` with numbers for bounds, and changes of their `i`.
fn loops(tokens: &[Token]) -> Result<()> {
    let starts: Vec<usize> = (0..tokens.len()).filter(|at| tokens[*at].text == "for").collect();
    for &start in &starts {
        let line = tokens[start].line;
        let Some((name, iterations)) = counted(&tokens[start + 1..]) else {
            bail!(FORGE_ERROR_RULE, "cuda_source: line {line}: 'for': {BOUND}");
        };
        if iterations > MOST_ITERATIONS {
            bail!(
                FORGE_ERROR_RULE,
                "cuda_source: line {line}: a loop of {iterations} iterations for each element; at most \
                 {MOST_ITERATIONS}"
            );
        }
        let is_header = |at: usize| starts.iter().any(|s| (*s..=s + HEADER).contains(&at));
        let changes = |t: &str| ["=", "+=", "-=", "*=", "/=", "++", "--"].contains(&t);
        for at in start..tokens.len() - 1 {
            let (a, b) = (tokens[at].text, tokens[at + 1].text);
            let is_changed =
                (a == name && changes(b)) || (["++", "--", "&"].contains(&a) && b == name);
            if is_changed && !is_header(at) {
                bail!(
                    FORGE_ERROR_RULE,
                    "cuda_source: line {}: '{name}' counts the loop of line {line} and cannot be changed: \
                     where the loop ends would be unknown",
                    tokens[at].line
                );
            }
        }
    }
    Ok(())
}

/// The counter of a loop and how often it runs, if its header says so.
fn counted<'a>(header: &[Token<'a>]) -> Option<(&'a str, i64)> {
    let number = |text: &str| text.trim_end_matches(['u', 'U']).parse::<i64>().ok();
    let texts: Vec<&str> = header.iter().take(HEADER).map(|t| t.text).collect();
    match texts[..] {
        ["(", "int", i, "=", from, ";", j, compare @ ("<" | "<="), to, ";", a, b, ")"]
            if i == j && ((a == "++" && b == i) || (a == i && b == "++")) =>
        {
            let (from, to) = number(from).zip(number(to))?;
            Some((i, to.saturating_sub(from).saturating_add(i64::from(compare == "<="))))
        }
        _ => None,
    }
}
