//! Random and adversarial calls through the C ABI: nothing crashes, nothing outside the buffers is
//! written, a refused call changes nothing and says why, and a call that succeeds has computed what
//! it should.
//!
//! `FORGE_FUZZ_CALLS` (20,000) and `FORGE_FUZZ_SEED` (1) choose how many and which. What is declared
//! to the library is true unless it must be refused before any memory is looked at: a NULL, a
//! misaligned pointer, sizes that overflow, buffers that overlap.

#[path = "fuzz_abi/call.rs"]
mod call;
#[path = "fuzz_abi/memory.rs"]
mod memory;
#[path = "fuzz_abi/mutate.rs"]
mod mutate;
#[path = "fuzz_abi/objects.rs"]
mod objects;
#[path = "fuzz_abi/reference.rs"]
mod reference;
#[path = "fuzz_abi/valid.rs"]
mod valid;
#[path = "fuzz_abi/world.rs"]
mod world;

use call::{Call, OPS, Op, Role};
use forge::error::forge_status::{self, *};
use forge::ffi::error::forge_last_error;
use memory::Random;
use mutate::Expected;
use std::collections::BTreeMap;
use std::ffi::CStr;
use world::{Context, Failure, World};

/// Statuses that no call on the CPU can be made to give: a thread pool that the system refuses, a
/// bug, and what only a GPU has.
const NOT_THE_CALLERS: &[forge_status] = &[
    FORGE_ERROR_THREADS,
    FORGE_ERROR_PANIC,
    FORGE_ERROR_WORKSPACE,
    FORGE_ERROR_MEMORY,
    FORGE_ERROR_DEVICE,
    FORGE_ERROR_COMPILE,
    FORGE_ERROR_CACHE,
];

/// Calls that one linear is used for.
const CALLS_OF_A_LINEAR: usize = 8;

/// What happened so far.
#[derive(Default)]
struct Tally {
    statuses: BTreeMap<u32, usize>,
    compared: usize,
}

impl Tally {
    /// Counts a call; `expected` holds what it was spoiled by, each of which may be reported.
    fn count(&mut self, status: forge_status, expected: &[Expected]) {
        *self.statuses.entry(status as u32).or_default() += 1;
        let message = last_error();
        let known = expected.is_empty() || expected.iter().any(|e| e.status == status);
        assert!(known, "{status:?} ({message}), not one of {expected:?}");
        if let [only] = expected {
            assert!(message.contains(&only.naming), "'{}' is not in: {message}", only.naming);
        }
        if status != FORGE_OK {
            assert!(!message.is_empty());
        }
    }

    fn total(&self) -> usize {
        self.statuses.values().sum()
    }
}

fn last_error() -> String {
    // SAFETY: never NULL, and valid until the next failure on this thread.
    unsafe { CStr::from_ptr(forge_last_error()) }.to_str().expect("a sentence in UTF-8").to_string()
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name}={v} is not a number")))
}

/// One call on a linear's data: valid, or spoiled in one or two ways.
fn data_call(world: &World, random: &mut Random, tally: &mut Tally) {
    let mut op = random.pick(OPS);
    if world.layout.n_states == 0 && matches!(op, Op::ExportState | Op::ImportState) {
        op = Op::ExportWeight;
    }
    let mut call = Call::valid(world, op, random);
    let mut expected = Vec::new();
    for _ in 0..random.pick(&[0, 0, 1, 1, 1, 2]) {
        expected.push(mutate::spoil(&mut call, world, random));
    }
    world.rank.failed.set(Failure::None);
    world.rank.fail_after.set((random.percent(25)).then(|| random.below(5)));
    call.prepare();
    let before: Vec<_> = call.memories.iter().map(memory::Guarded::snapshot).collect();
    let status = call.make(world);
    let after: Vec<_> = call.memories.iter().map(memory::Guarded::snapshot).collect();
    world.rank.fail_after.set(None);

    let context = format!("{op:?} gave {status:?} ({})", last_error());
    assert!(call.memories.iter().all(|m| m.guards_are_intact()), "{context}: a guard band");
    let failure = world.rank.failed.get();
    assert_eq!(failure != Failure::None, status == FORGE_ERROR_COLLECTIVE, "{context}");
    for (i, (before, after)) in before.iter().zip(&after).enumerate() {
        let parameter = call.slots.iter().any(|s| {
            let array =
                matches!(s.role, Role::Weight | Role::Extra | Role::State(_) | Role::Scale(_));
            s.memory == i && array
        });
        let may_change = match status {
            FORGE_OK => call.may_write(i),
            // Outputs may be half done; W is not touched by what fails before the last wait.
            FORGE_ERROR_COLLECTIVE => {
                call.may_write(i) && !(parameter && failure == Failure::Collective)
            }
            _ => false,
        };
        assert!(may_change || before == after, "{context}: memory {i} changed");
    }
    tally.count(status, &expected);
    if expected.is_empty() {
        assert!(matches!(status, FORGE_OK | FORGE_ERROR_COLLECTIVE), "{context}");
    }
    if status == FORGE_OK {
        tally.compared += usize::from(reference::check(&call, world, &before, &after));
    }
}

#[test]
fn random_and_adversarial_calls() {
    let calls = setting("FORGE_FUZZ_CALLS", 20_000) as usize;
    let seed = setting("FORGE_FUZZ_SEED", 1);
    println!("FORGE_FUZZ_SEED={seed} FORGE_FUZZ_CALLS={calls}");
    let mut random = Random(seed);
    let mut tally = Tally::default();
    let contexts = [Context::new(1), Context::new(2)];
    while tally.total() < calls {
        let context = &contexts[random.below(contexts.len())];
        let world = World::new(context, &mut random);
        for _ in 0..CALLS_OF_A_LINEAR {
            if random.percent(70) {
                data_call(&world, &mut random, &mut tally);
            } else {
                objects::random_call(&contexts, &world, &mut random, &mut tally);
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
