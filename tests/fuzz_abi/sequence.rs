//! A whole program from a fuzzer's bytes: contexts, communicators and linears are made, used and
//! freed in any order that the ABI allows, with calls of every kind between.

use super::memory::Random;
use super::world::{Context, World};
use super::{Tally, data_call, hostile, objects};

/// Objects of a kind that are alive at once.
const MOST: usize = 4;

/// Runs the program; panics where something that must hold does not.
pub fn run(input: &[u8]) {
    let mut random = Random::from_bytes(input);
    let mut tally = Tally::default();
    let mut contexts = vec![Context::new(1)];
    let mut worlds: Vec<World> = Vec::new();
    while !random.is_used_up() {
        if contexts.is_empty() {
            contexts.push(Context::new(random.pick(&[1, 2])));
        }
        if worlds.is_empty() {
            let context = &contexts[random.below(contexts.len())];
            worlds.push(World::new(context, &mut random));
        }
        let (c, w) = (random.below(contexts.len()), random.below(worlds.len()));
        match random.below(16) {
            0 if contexts.len() < MOST => contexts.push(Context::new(random.pick(&[1, 1, 2, 3]))),
            // Its linears and communicators live on, and are used.
            1 => drop(contexts.swap_remove(c)),
            2 if worlds.len() < MOST => worlds.push(World::new(&contexts[c], &mut random)),
            3 => drop(worlds.swap_remove(w)),
            4 => worlds[w].free_comm(),
            5 | 6 => hostile::object(&contexts[c], &worlds[w], &mut random, &mut tally),
            7 | 8 => objects::random_call(&contexts[c..], &worlds[w], &mut random, &mut tally),
            9..=11 => data_call(&worlds[w], &mut random, &mut tally),
            _ => hostile::data_call(&worlds[w], &mut random, &mut tally),
        }
    }
}
