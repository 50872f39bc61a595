//! Checkpoints at the C ABI: any fp32 image is taken into any format and comes out again, any bits
//! may stand in a state's codes and scales, and what does not fit is refused with nothing changed.

use super::last_error;
use super::memory::{Guarded, Random};
use super::world::{Context, World, sized};
use forge::error::forge_status::{self, *};
use forge::ffi::run::*;
use forge::ffi::types::*;
use std::ptr::{null, null_mut};

/// fp32 values that formats differ about: zeros, denormals, the ends of the range, NaN of both kinds.
const EDGES: &[u32] = &[
    0x0000_0000,
    0x8000_0000,
    0x0000_0001,
    0x8000_0001,
    0x007F_FFFF,
    0x0080_0000,
    0x7F7F_FFFF,
    0xFF7F_FFFF,
    0x7F80_0000,
    0xFF80_0000,
    0x7F80_0001,
    0x7FC0_0000,
    0xFFFF_FFFF,
    0x3F80_0000,
    0x3F80_8000,
    0x3F7F_FFFF,
    0x7F7F_8000,
    0x0DA2_4260,
    0x5F80_0000,
];

/// The arrays of a parameter in guarded memory, and an image.
struct Parameter<'a> {
    world: &'a World,
    weight: Guarded,
    extra: Guarded,
    states: [Guarded; 3],
    scales: [Guarded; 3],
    image: Guarded,
}

impl<'a> Parameter<'a> {
    fn new(world: &'a World) -> Self {
        let layout = &world.layout;
        let array = |a: &forge_array_layout| Guarded::new(a.bytes as usize);
        Self {
            world,
            weight: array(&layout.weight),
            extra: array(&layout.weight_extra),
            states: layout.states.each_ref().map(array),
            scales: layout.scales.each_ref().map(array),
            image: array(&layout.accumulator),
        }
    }

    fn memories(&self) -> impl Iterator<Item = &Guarded> {
        let arrays = [&self.weight, &self.extra].into_iter();
        arrays.chain(&self.states).chain(&self.scales).chain([&self.image])
    }

    fn snapshot(&self) -> Vec<Vec<u8>> {
        self.memories().map(Guarded::snapshot).collect()
    }

    fn value(&self) -> forge_parameter {
        let buffer = |m: &Guarded| {
            let data = if m.bytes() == 0 { null_mut() } else { m.ptr().cast() };
            forge_buffer { data, bytes: m.bytes() as u64 }
        };
        let mut p = sized::<forge_parameter>();
        p.weight = buffer(&self.weight);
        p.weight_extra = buffer(&self.extra);
        p.states = self.states.each_ref().map(buffer);
        p.scales = self.scales.each_ref().map(buffer);
        p
    }

    fn image_buffer(&self) -> forge_buffer {
        forge_buffer { data: self.image.ptr().cast(), bytes: self.image.bytes() as u64 }
    }

    /// Exports or imports the weight (`state` None) or a state.
    fn transfer(
        &self,
        export: bool,
        state: Option<u32>,
        p: *const forge_parameter,
        image: forge_buffer,
    ) -> forge_status {
        let linear = self.world.linear;
        let constant = forge_const_buffer { data: image.data, bytes: image.bytes };
        // SAFETY: the linear lives; what is declared of memory is true, or must be refused before
        // it is looked at.
        unsafe {
            match (export, state) {
                (true, None) => forge_linear_export_weight(linear, p, image, null_mut()),
                (true, Some(k)) => forge_linear_export_state(linear, p, k, image, null_mut()),
                (false, None) => forge_linear_import_weight(linear, p, constant, null_mut()),
                (false, Some(k)) => forge_linear_import_state(linear, p, k, constant, null_mut()),
            }
        }
    }

    fn export(&self, state: Option<u32>) -> Vec<f32> {
        let status = self.transfer(true, state, &self.value(), self.image_buffer());
        assert_eq!(status, FORGE_OK, "{}", last_error());
        let snapshot = self.image.snapshot();
        let words = self.image.payload(&snapshot).chunks_exact(4);
        words.map(|b| f32::from_ne_bytes(b.try_into().expect("four"))).collect()
    }

    /// Imports what is in the image, which must stay as it is.
    fn import(&self, state: Option<u32>) {
        let image = self.image.snapshot();
        let status = self.transfer(false, state, &self.value(), self.image_buffer());
        assert_eq!(status, FORGE_OK, "{}", last_error());
        assert_eq!(self.image.snapshot(), image, "an import changed its image");
    }

    fn codes(&self) -> Vec<Vec<u8>> {
        self.states.iter().map(Guarded::snapshot).collect()
    }

    fn round_trip(&self, state: Option<u32>) {
        let imported = self.image.snapshot();
        let imported: Vec<f32> = (self.image.payload(&imported).chunks_exact(4))
            .map(|b| f32::from_ne_bytes(b.try_into().expect("four")))
            .collect();
        self.import(state);
        let codes = self.codes();
        let first = self.export(state);
        self.import(state);
        let second = self.export(state);
        let format = state.map_or(0, |k| self.world.config.state_formats[k as usize]);
        if format != 2 {
            // What a format holds, it holds exactly (also which NaN it is).
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&first), bits(&second), "a second round trip changed the image");
            let exact = match state {
                None => self.world.config.weight_format != 1,
                Some(_) => format == 0,
            };
            if exact {
                assert_eq!(bits(&imported), bits(&first), "an exact format changed the image");
            }
            return;
        }
        // q8 has no infinities and no NaN: a checkpoint cannot put one into a state.
        assert!(first.iter().all(|v| v.is_finite()), "{first:?}");
        // A second moment below zero, which no run has, counts for the scale and is then zero.
        let negative = |values: &[f32]| values.iter().any(|v| *v < 0.0);
        if negative(&imported) != negative(&first) {
            return;
        }
        // Codes are a fixed point where the scale is not at the ends of the range.
        if imported.iter().all(|v| *v == 0.0 || (1e-20..1e20).contains(&v.abs())) {
            assert_eq!(codes, self.codes(), "codes drift from checkpoint to checkpoint");
        }
        for (a, b) in first.iter().zip(&second) {
            let bound = 1e-4 * f64::from(a.abs().max(b.abs())) + 1e-30;
            assert!((f64::from(*a) - f64::from(*b)).abs() <= bound, "{a} became {b}");
        }
    }

    /// Any bits into an array.
    fn fill(&self, memory: &Guarded, random: &mut Random) {
        let kind = random.below(5);
        let edge = random.pick(EDGES);
        for i in 0..memory.bytes() / 4 {
            let bits = match kind {
                0 => edge,
                1 => EDGES[(random.next() % EDGES.len() as u64) as usize],
                2 => random.next() as u32,
                3 => random.fraction(64, 32.0).to_bits(),
                _ if random.next().is_multiple_of(16) => edge,
                _ => random.fraction(64, 32.0).to_bits(),
            };
            // SAFETY: within the payload, which is aligned to 8.
            unsafe { memory.ptr().cast::<u32>().add(i).write(bits) };
        }
        for i in memory.bytes() / 4 * 4..memory.bytes() {
            // SAFETY: within the payload.
            unsafe { memory.ptr().add(i).write(random.next() as u8) };
        }
    }

    /// An update of no tokens, or of one: whatever the arrays hold.
    fn update(&self, random: &mut Random) {
        let (world, layout) = (self.world, &self.world.layout);
        let mut step = sized::<forge_step>();
        step.scalars.step = random.pick(&[1, 2, u64::from(u32::MAX)]);
        step.scalars.seed = random.next();
        step.scalars.grad_scale = 1.0;
        step.scalars.hyper = world.rule.hyper_defaults;
        let element = world.element() as u64;
        let dy = Guarded::new((layout.out_local * element) as usize);
        let x = Guarded::new((layout.in_local * element) as usize);
        for factor in [&dy, &x] {
            if random.percent(50) {
                self.fill(factor, random);
            }
        }
        let constant =
            |m: &Guarded| forge_const_buffer { data: m.ptr().cast(), bytes: m.bytes() as u64 };
        let segment = forge_segment {
            dy: constant(&dy),
            x: constant(&x),
            tokens: 1,
            dy_stride: 0,
            x_stride: 0,
        };
        let parameter = self.value();
        let mut update = sized::<forge_update>();
        update.n_segments = random.pick(&[0, 1]);
        update.segments = &segment;
        update.parameter = &parameter;
        update.step = &step;
        let mut report = sized::<forge_report>();
        // SAFETY: everything lives and has the size that it says.
        let status = unsafe { forge_linear_update(world.linear, &update, &mut report, null_mut()) };
        assert_eq!(status, FORGE_OK, "{}", last_error());
        assert!(report.nonfinite_tiles <= report.tiles && report.tiles > 0);
    }

    /// A transfer that does not fit.
    fn misfit(&self, random: &mut Random) {
        let export = random.percent(50);
        let n = self.world.layout.n_states;
        let mut state = (n > 0 && random.percent(60)).then(|| random.below(n as usize) as u32);
        let (mut p, mut image) = (self.value(), self.image_buffer());
        let mut pointer: *const forge_parameter = &p;
        let bytes = image.bytes;
        let expected = match random.below(8) {
            0 => {
                image.bytes = random.pick(&[0, 1, bytes - 1, bytes - 4, bytes / 2]);
                FORGE_ERROR_BUFFER_SIZE
            }
            1 => {
                image.data = image.data.wrapping_byte_add(1 + random.below(3));
                FORGE_ERROR_MISALIGNED
            }
            2 => {
                image.data = null_mut();
                FORGE_ERROR_NULL
            }
            3 => {
                state = Some(n + (random.any() as u32 & 0xFFFF));
                FORGE_ERROR_STATE_INDEX
            }
            4 => {
                p.weight.bytes -= 1;
                FORGE_ERROR_BUFFER_SIZE
            }
            5 if n > 0 => {
                // A state of another format: its size gives it away.
                p.states[0].bytes = random.pick(&[0, p.states[0].bytes / 2, 3]);
                if p.states[0].bytes == self.states[0].bytes() as u64 {
                    p.states[0].bytes = 0;
                }
                FORGE_ERROR_BUFFER_SIZE
            }
            6 if self.weight.bytes() == self.image.bytes() => {
                image.data = p.weight.data;
                FORGE_ERROR_OVERLAP
            }
            6 => {
                p.reserved = 1;
                FORGE_ERROR_UNSUPPORTED
            }
            _ => {
                pointer = null();
                FORGE_ERROR_NULL
            }
        };
        if !pointer.is_null() {
            pointer = &p;
        }
        let before = self.snapshot();
        let status = self.transfer(export, state, pointer, image);
        assert_eq!(status, expected, "{}", last_error());
        assert!(self.snapshot() == before, "a refused transfer changed an array");
    }
}

/// Runs one input; panics where something that must hold does not.
pub fn run(input: &[u8]) {
    let mut random = Random::from_bytes(input);
    let context = Context::new(random.pick(&[1, 1, 1, 2]));
    let world = World::new(&context, &mut random);
    drop(context);
    let parameter = Parameter::new(&world);
    let n = world.layout.n_states;
    while !random.is_used_up() {
        let state = (n > 0 && random.percent(70)).then(|| random.below(n as usize) as u32);
        match random.below(8) {
            0..=2 => {
                parameter.fill(&parameter.image, &mut random);
                parameter.round_trip(state);
            }
            3 | 4 => {
                let all: Vec<_> = parameter.memories().collect();
                parameter.fill(all[random.below(all.len())], &mut random);
                drop(parameter.export(state));
            }
            5 => parameter.update(&mut random),
            _ => parameter.misfit(&mut random),
        }
        assert!(parameter.memories().all(|m| m.guards_are_intact()), "a guard band");
    }
}
