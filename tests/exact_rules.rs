//! With fp32 factors the CUDA rules give the CPU's bits: kernels/rules is compiled for the host, where
//! IEEE's operations are those of a GPU, and compared with src/rule for every rule and set of flags.

mod common;

use common::{Random, STATES, WEIGHTS, rules, scalars, scheme};
use forge::backend::{Step, cuda::specialise};
use forge::format::{Dtype, StateKind};
use forge::rule::{MAX_STATES, Run};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const COUNT: usize = 4096;
/// Of one element in the program's input and output.
const BYTES: usize = 4 * (2 + MAX_STATES);

fn compile(name: &str, defines: &[String]) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let output = Command::new(compiler)
        .args(["-std=c++17", "-O1", "-ffp-contract=off", "-w"])
        .args(defines.iter().map(|d| format!("-D{d}")))
        .arg("-I")
        .arg(root.join("kernels"))
        .arg(root.join("tests/rules/host.cpp"))
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    program
}

/// The elements after the program's update.
fn run(program: &Path, input: &[u8]) -> Vec<u8> {
    let mut child =
        Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let owned = input.to_vec();
    // The output may fill its pipe before the input is read.
    let writer = std::thread::spawn(move || stdin.write_all(&owned).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success());
    output.stdout
}

/// Numbers of many sizes, some of them zero.
fn values(r: &mut Random, n: usize) -> Vec<f32> {
    (0..n)
        .map(|_| match r.bits() % 8 {
            0 => 0.0,
            1 => r.uniform() * 1e-20,
            2 => r.uniform() * 1e6,
            3 => r.uniform() * 1e-3,
            _ => r.uniform(),
        })
        .collect()
}

#[test]
fn cuda_rules_are_the_cpus_bit_for_bit_in_exact_mode() {
    for (name, flags) in rules() {
        let scheme = scheme(name, flags, WEIGHTS[0], STATES[0], Dtype::F32);
        let defines = specialise::update(&scheme);
        assert!(defines.contains(&"FORGE_EXACT=1".to_string()));
        let program = compile(&format!("rule-{name}-{flags}"), &defines);
        let mut r = Random(u64::from(flags) + name.len() as u64);
        for step in [1, 2, 1000] {
            let mut s = scalars(name, step);
            s.grad_scale = 0.37;
            let step = Step::new(&scheme, &s);
            let (g, mut w) = (values(&mut r, COUNT), values(&mut r, COUNT));
            let mut states: [Vec<f32>; MAX_STATES] = std::array::from_fn(|k| {
                let mut state = values(&mut r, COUNT);
                let non_negative =
                    k < scheme.n_states && scheme.state_kind(k) == StateKind::NonNegative;
                if non_negative {
                    state.iter_mut().for_each(|v| *v = v.abs());
                }
                state
            });
            let mut input = Vec::new();
            step.constants.iter().for_each(|c| input.extend(c.to_le_bytes()));
            input.extend(step.grad_scale.to_le_bytes());
            input.extend((COUNT as u64).to_le_bytes());
            for i in 0..COUNT {
                let element = [g[i], w[i], states[0][i], states[1][i], states[2][i]];
                element.iter().for_each(|x| input.extend(x.to_le_bytes()));
            }
            let output = run(&program, &input);

            let scaled: Vec<f32> = g.iter().map(|g| g * step.grad_scale).collect();
            for at in (0..COUNT).step_by(128) {
                let part = at..at + 128;
                let [s0, s1, s2] = &mut states;
                let s = [&mut s0[part.clone()], &mut s1[part.clone()], &mut s2[part.clone()]];
                let run = Run { g: &scaled[part.clone()], w: &mut w[part], s };
                scheme.rule.apply(flags, &step.constants, run);
            }
            for (i, bytes) in output.chunks_exact(BYTES).enumerate() {
                let float = |k: usize| f32::from_le_bytes(bytes[4 * k..][..4].try_into().unwrap());
                let mut pairs = vec![(w[i], float(1))];
                pairs.extend((0..scheme.n_states).map(|k| (states[k][i], float(2 + k))));
                for (k, (cpu, cuda)) in pairs.into_iter().enumerate() {
                    assert!(
                        cpu.to_bits() == cuda.to_bits() || (cpu.is_nan() && cuda.is_nan()),
                        "{name} {flags:#x} element {i}, array {k}: {cpu:e} on the CPU, {cuda:e} by CUDA; \
                         g = {:e}",
                        g[i]
                    );
                }
            }
        }
    }
}
