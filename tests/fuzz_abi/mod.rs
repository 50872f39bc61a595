//! The machinery of random calls: objects to call, valid calls and ways to spoil them, memory that
//! notices, and what must hold after each. `tests/fuzz_abi.rs` drives it from seeds, the targets in
//! `fuzz/` from a fuzzer's bytes.

pub mod call;
pub mod communicators;
pub mod hostile;
pub mod images;
pub mod memory;
pub mod mutate;
pub mod objects;
pub mod reference;
pub mod rules;
pub mod sequence;
pub mod valid;
pub mod world;

use call::{Call, OPS, Op, Role};
use forge::error::forge_status::{self, *};
use forge::ffi::error::forge_last_error;
use memory::Random;
use mutate::Expected;
use std::collections::BTreeMap;
use std::ffi::CStr;
use world::{Failure, World};

/// What happened so far.
#[derive(Default)]
pub struct Tally {
    pub statuses: BTreeMap<u32, usize>,
    pub compared: usize,
}

impl Tally {
    /// Counts a call; `expected` holds what it was spoiled by, each of which may be reported.
    pub fn count(&mut self, status: forge_status, expected: &[Expected]) {
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

    pub fn total(&self) -> usize {
        self.statuses.values().sum()
    }
}

pub fn last_error() -> String {
    // SAFETY: never NULL, and valid until the next failure on this thread.
    unsafe { CStr::from_ptr(forge_last_error()) }.to_str().expect("a sentence in UTF-8").to_string()
}

/// A call that was made, and all its memories before and after.
pub struct Made {
    pub status: forge_status,
    pub before: Vec<Vec<u8>>,
    pub after: Vec<Vec<u8>>,
    pub failure: Failure,
    pub context: String,
}

/// Makes a call, and checks what must hold of every one.
pub fn make(call: &mut Call, world: &World) -> Made {
    world.rank.failed.set(Failure::None);
    call.prepare();
    let before: Vec<_> = call.memories.iter().map(memory::Guarded::snapshot).collect();
    let status = call.make(world);
    let after: Vec<_> = call.memories.iter().map(memory::Guarded::snapshot).collect();
    world.rank.fail_after.set(None);

    let context = format!("{:?} gave {status:?} ({})", call.op, last_error());
    assert!(call.memories.iter().all(|m| m.guards_are_intact()), "{context}: a guard band");
    assert_ne!(status, FORGE_ERROR_PANIC, "{context}");
    let failure = world.rank.failed.get();
    assert_eq!(failure != Failure::None, status == FORGE_ERROR_COLLECTIVE, "{context}");
    if status == FORGE_OK
        && let (Some(host), Some(device)) = (call.report_value(), call.device_report_value())
    {
        assert_eq!(host.tiles, device.tiles, "{context}");
        assert_eq!(host.sum_of_squares.to_bits(), device.sum_of_squares.to_bits(), "{context}");
    }
    Made { status, before, after, failure, context }
}

/// One call on a linear's data: valid, or spoiled in one or two ways.
pub fn data_call(world: &World, random: &mut Random, tally: &mut Tally) {
    let mut op = random.pick(OPS);
    if world.layout.n_states == 0 && matches!(op, Op::ExportState | Op::ImportState) {
        op = Op::ExportWeight;
    }
    let mut call = Call::valid(world, op, random);
    let mut expected = Vec::new();
    for _ in 0..random.pick(&[0, 0, 1, 1, 1, 2]) {
        expected.push(mutate::spoil(&mut call, world, random));
    }
    world.rank.fail_after.set((random.percent(25)).then(|| random.below(5)));
    let Made { status, before, after, failure, context } = make(&mut call, world);
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
