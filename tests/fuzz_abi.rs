//! Random and adversarial calls through the C ABI: nothing crashes, nothing outside the buffers is
//! written, a refused call changes nothing and says why, and a call that succeeds has computed what
//! it should.
//!
//! A run makes a million calls, in pieces that run beside each other; `FORGE_FUZZ_CALLS` (125,000)
//! chooses the calls of a piece, `FORGE_FUZZ_SEED` (0) the first piece's seed. What is declared to
//! the library is true unless it must be refused before any memory is looked at: a NULL, a misaligned
//! pointer, sizes that overflow, buffers that overlap.

#[path = "fuzz_abi/mod.rs"]
mod machinery;

use forge::error::forge_status::{self, *};
use machinery::memory::Random;
use machinery::world::{Context, World};
use machinery::{Tally, data_call, hostile, images, objects, sequence};
use std::path::Path;

/// Statuses that no call on the CPU can be made to give: a thread pool that the system refuses, a
/// bug, and what only a GPU has.
const NOT_THE_CALLERS: &[forge_status] = &[
    FORGE_ERROR_RULE_FUNCTION,
    FORGE_ERROR_THREADS,
    FORGE_ERROR_PANIC,
    FORGE_ERROR_WORKSPACE,
    FORGE_ERROR_MEMORY,
    FORGE_ERROR_DEVICE,
    FORGE_ERROR_COMPILE,
    FORGE_ERROR_CACHE,
    FORGE_ERROR_NO_NCCL,
];

/// Calls that one linear is used for.
const CALLS_OF_A_LINEAR: usize = 8;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name}={v} is not a number")))
}

/// One of the pieces that a million calls are cut into.
fn random_and_adversarial_calls(piece: u64) {
    let calls = setting("FORGE_FUZZ_CALLS", 125_000) as usize;
    let seed = setting("FORGE_FUZZ_SEED", 0).wrapping_add(piece);
    println!("piece {piece}: FORGE_FUZZ_SEED={} FORGE_FUZZ_CALLS={calls}", seed - piece);
    let mut random = Random::seeded(seed);
    let mut tally = Tally::default();
    let contexts = [Context::new(1), Context::new(2)];
    while tally.total() < calls {
        let context = &contexts[random.below(contexts.len())];
        let world = World::new(context, &mut random);
        for _ in 0..CALLS_OF_A_LINEAR {
            match random.below(10) {
                0..=5 => data_call(&world, &mut random, &mut tally),
                6 => hostile::data_call(&world, &mut random, &mut tally),
                7 => hostile::object(&contexts[0], &world, &mut random, &mut tally),
                _ => objects::random_call(&contexts, &world, &mut random, &mut tally),
            }
        }
    }

    println!("{} calls, {} results compared with the reference", tally.total(), tally.compared);
    for (status, count) in &tally.statuses {
        let status = forge_status::ALL.iter().find(|s| **s as u32 == *status);
        println!("{count:>7}  {:?}", status.expect("a status of the ABI"));
    }
    // A test that never reached a check would show nothing.
    assert!(tally.compared > 0);
    for status in forge_status::ALL {
        let count = tally.statuses.get(&(*status as u32)).copied().unwrap_or(0);
        assert_eq!(count > 0, !NOT_THE_CALLERS.contains(status), "{status:?}: {count} calls");
    }
}

macro_rules! pieces {
    ($($name:ident = $piece:expr,)*) => {
        $(#[test]
        fn $name() {
            random_and_adversarial_calls($piece);
        })*
    };
}

pieces! {
    adversarial_calls_1 = 1,
    adversarial_calls_2 = 2,
    adversarial_calls_3 = 3,
    adversarial_calls_4 = 4,
    adversarial_calls_5 = 5,
    adversarial_calls_6 = 6,
    adversarial_calls_7 = 7,
    adversarial_calls_8 = 8,
}

/// Every input of a committed corpus, each of which reached something new when it was found, and
/// the reproducers of what was found.
fn replay(target: &str, run: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut inputs = 0;
    for entry in std::fs::read_dir(&directory).expect("the corpus is committed") {
        let path = entry.expect("readable").path();
        println!("{}", path.display());
        run(&std::fs::read(path).expect("readable"));
        inputs += 1;
    }
    assert!(inputs >= 10, "{inputs} inputs in {}", directory.display());
}

#[test]
fn corpus_of_the_c_abi() {
    replay("c_abi", sequence::run);
}

#[test]
fn corpus_of_state_import() {
    replay("state_import", images::run);
}

/// The fuzzers and the pieces above call every function that the header declares.
#[test]
fn every_function_of_the_header_is_called() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let header = std::fs::read_to_string(root.join("include/forge.h")).unwrap();
    let mut machinery = String::new();
    for entry in std::fs::read_dir(root.join("tests/fuzz_abi")).unwrap() {
        machinery += &std::fs::read_to_string(entry.unwrap().path()).unwrap();
    }
    let words = |text: &str| -> Vec<String> {
        let split = text.split(|c: char| !(c.is_alphanumeric() || c == '_'));
        split.map(str::to_string).collect()
    };
    let known = words(&machinery);
    let mut functions = 0;
    for line in header.lines().filter(|l| !l.starts_with("//") && l.contains('(')) {
        let name = words(line.split('(').next().unwrap()).pop().unwrap();
        if name.starts_with("forge_") && !line.contains("(*") {
            functions += 1;
            assert!(known.contains(&name), "{name} is not called");
        }
    }
    assert!(functions >= 30, "{functions} functions found");
}
