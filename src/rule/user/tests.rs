use super::*;

fn hyper(name: &str, default: f64) -> HyperDefinition {
    HyperDefinition { name: name.into(), default, least: 0.0, most: 1e3 }
}

/// Momentum, with an average that is corrected at first.
fn momentum(name: &str) -> Definition {
    Definition {
        name: name.into(),
        hyper: vec![hyper("lr", 0.1), hyper("weight_decay", 0.0), hyper("beta", 0.9)],
        states: vec![("momentum".into(), StateKind::Signed)],
        per_step: vec![PerStep { name: "bias".into(), expression: "1.0 - pow(beta, step)".into() }],
        cuda: Some(
            "momentum += (1.0f - beta) * (g - momentum);\nw -= lr / bias * momentum;".into(),
        ),
        cpu: None,
    }
}

fn refusal(change: impl FnOnce(&mut Definition)) -> String {
    let mut definition = momentum("refused");
    change(&mut definition);
    match register(definition) {
        Ok(_) => panic!("was registered"),
        Err(e) => e.message,
    }
}

fn refusal_of(source: &str) -> String {
    refusal(|d| d.cuda = Some(source.into()))
}

#[test]
fn a_rule_is_found_and_described_as_the_others() {
    let rule = register(momentum("momentum_found")).unwrap();
    let found = super::super::find("momentum_found").unwrap();
    assert_eq!(found.info().name, c"momentum_found");
    assert_eq!(found.states(0)[0].name, c"momentum");
    assert_eq!(super::super::default_hyper(found)[..3], [0.1, 0.0, 0.9]);
    assert!(std::ptr::eq(rule, register(momentum("momentum_found")).unwrap()), "the same again");
    let mut other = momentum("momentum_found");
    other.hyper[2].default = 0.8;
    let error = register(other).map(|_| ()).unwrap_err();
    assert!(error.message.contains("choose another name"), "{error}");
    let error = register(momentum("adamw")).map(|_| ()).unwrap_err();
    assert!(error.message.contains("'adamw' is a built-in rule"), "{error}");
}

#[test]
fn threads_that_register_at_once_get_one_rule_of_each_name() {
    let name = |i: usize| format!("raced_{i}");
    let all = || (0..64).map(|i| register(momentum(&name(i))).unwrap() as *const _ as usize);
    let rules: Vec<Vec<usize>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| all().collect())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(rules.iter().all(|r| *r == rules[0]));
    let listed = registered().filter(|r| r.definition.name.starts_with("raced_"));
    assert_eq!(listed.map(|r| r as *const _ as usize).collect::<Vec<_>>(), rules[0]);
}

#[test]
fn names_counts_and_ranges_are_checked() {
    type Change<'a> = &'a dyn Fn(&mut Definition);
    let cases: &[(&str, Change)] = &[
        ("name: '1st' cannot be a name", &|d| d.name = "1st".into()),
        ("name: 'a b' cannot be a name", &|d| d.name = "a b".into()),
        ("hyper_names: 'while' cannot be a name", &|d| d.hyper[2].name = "while".into()),
        ("hyper_names: 'forge_c' cannot be a name", &|d| d.hyper[2].name = "forge_c".into()),
        ("hyper_names: 'w' is taken", &|d| d.hyper[2].name = "w".into()),
        ("state_names: 'beta' is taken", &|d| d.states[0].0 = "beta".into()),
        ("per_step_names: 'lr' is taken", &|d| d.per_step[0].name = "lr".into()),
        ("must begin with 'lr' and 'weight_decay'", &|d| d.hyper.swap(0, 1)),
        ("n_states: 4; a rule has at most 3", &|d| d.states = vec![d.states[0].clone(); 4]),
        ("n_hyper: 15, n_per_step: 1; at most 15", &|d| d.hyper.resize(15, d.hyper[2].clone())),
        ("hyper_defaults: beta = 2000 is not in 0..=1000", &|d| d.hyper[2].default = 2e3),
        ("hyper_defaults: beta = NaN", &|d| d.hyper[2].default = f64::NAN),
        ("does not fit fp32", &|d| d.hyper[2].most = 1e39),
        ("cuda_source, cpu_function: rule 'refused' has neither", &|d| d.cuda = None),
        ("not one expression of C", &|d| d.per_step[0].expression = "1; int x = 2".into()),
    ];
    for (expected, change) in cases {
        let message = refusal(change);
        assert!(message.contains(expected), "{message}\nis not: {expected}");
    }
}

#[test]
fn a_source_that_cannot_be_a_rule_is_refused_with_its_line() {
    let cases = [
        ("", "cuda_source: empty"),
        ("float x = g;\nmomentum = x;", "never names w"),
        ("w -= lr * g;", "n_states: 1, but cuda_source never names state 'momentum'"),
        ("w -= momentum;\nwhile (w > 0.0f) w -= lr;", "line 2: 'while': a loop needs a bound"),
        ("do { w -= momentum; } while (w > 0.0f);", "line 1: 'do': a loop needs a bound"),
        ("again: w -= momentum; goto again;", "'goto': a loop needs a bound"),
        ("for (;;) w -= momentum;", "line 1: 'for': a loop needs a bound"),
        ("for (int i = 0; i < step; ++i) w -= momentum;", "'for': a loop needs a bound"),
        ("for (int i = 0; i < 8; --i) w -= momentum;", "'for': a loop needs a bound"),
        ("for (int i = 0; i < 99999; ++i) w -= momentum;", "a loop of 99999 iterations"),
        ("for (int i = 0; i <= 1024; ++i) w -= momentum;", "a loop of 1025 iterations"),
        (
            "for (int i = 0; i < 8; ++i) {\nw -= momentum;\ni = 0; }",
            "line 3: 'i' counts the loop of line 1",
        ),
        ("for (int i = 0; i < 8; ++i) w -= momentum * i--;", "'i' counts the loop"),
        ("for (int i = 0; i < 8; ++i) { int *p = &i; w -= momentum; }", "'i' counts the loop"),
        ("w -= momentum;\n}", "line 2: '}' closes nothing"),
        ("w -= (momentum;", "line 1: '(' is never closed"),
        ("w -= momentum; /* so", "a comment without an end"),
        ("#include <cmath>\nw -= momentum;", "no preprocessor lines"),
        ("asm(\"trap;\"); w -= momentum;", "'asm': a rule is plain C"),
        ("__syncthreads(); w -= momentum;", "a rule sees one element"),
        ("w -= momentum * threadIdx.x;", "'threadIdx': a rule sees one element"),
    ];
    for (source, expected) in cases {
        let message = refusal_of(source);
        assert!(message.contains(expected), "{source}\n{message}\nis not: {expected}");
    }
}

#[test]
fn comments_and_bounded_loops_are_fine() {
    let source = "// while (this) is a comment\n/* so is } */ for (int i = 0; i < 3; ++i) w -= momentum;\n\
                  for (int i = 1; i <= 4; i++) { w *= 0.5f; }";
    let mut definition = momentum("looping");
    definition.cuda = Some(source.into());
    let rule = register(definition).unwrap();
    let header = rule.header().unwrap();
    assert!(header.contains("float &momentum = forge_s[0];"), "{header}");
    assert!(header.contains("#line 1 \"rule 'looping'\"\n// while"), "{header}");
    assert!(
        header.contains("const double bias = (1.0 - pow(beta, step));\nforge_c[3]"),
        "{header}"
    );
}
