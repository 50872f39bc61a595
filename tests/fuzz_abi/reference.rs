//! What a successful call must have computed, in fp64 from the header's words alone. Factors and
//! weights are small fractions, so that all sums are exact in fp32, too, and any order of summation
//! gives the same.

use super::call::{Call, Op, Role};
use super::memory::load;
use super::world::World;
use forge::ffi::types::forge_step_scalars;

/// `[rows, cols]`.
struct Grid {
    cols: usize,
    values: Vec<f64>,
}

impl Grid {
    fn at(&self, row: usize, col: usize) -> f64 {
        self.values[row * self.cols + col]
    }
}

struct View<'a> {
    call: &'a Call,
    world: &'a World,
    before: &'a [Vec<u8>],
    after: &'a [Vec<u8>],
}

fn close(what: &str, got: f64, wanted: f64, relative: f64) {
    let bound = relative * wanted.abs().max(1e-6);
    assert!((got - wanted).abs() <= bound, "{what}: got {got}, wanted {wanted}");
}

/// Checks a successful call; says whether there was something to compare.
pub fn check(call: &Call, world: &World, before: &[Vec<u8>], after: &[Vec<u8>]) -> bool {
    if !call.finite {
        return false;
    }
    // Under a fuzzer's instrumentation a product of the largest shapes takes seconds.
    let tokens: u64 = call.batches.iter().map(|b| b.tokens).sum();
    if cfg!(forge_asan) && world.layout.out_local * world.layout.in_local * tokens > 1_000_000 {
        return false;
    }
    let view = View { call, world, before, after };
    match call.op {
        Op::Backward | Op::Dgrad => {
            view.check_dx();
            view.check_dbias();
            match (call.op, call.mode) {
                (Op::Backward, 0) => view.check_update(),
                (Op::Backward, 1) => view.check_accumulator(),
                (Op::Backward, _) if call.keeps_norm() => view.check_norm(),
                _ => true,
            }
        }
        Op::Update => view.check_update(),
        Op::Accumulate => view.check_accumulator(),
        Op::Norm | Op::NormAsync => view.check_norm(),
        Op::CheckStep => false,
        Op::ExportWeight | Op::ImportWeight => view.check_weight_image(),
        Op::ExportState | Op::ImportState => view.check_state_image(),
    }
}

impl View<'_> {
    fn payload<'a>(&self, snapshots: &'a [Vec<u8>], role: Role) -> Option<&'a [u8]> {
        let slot = self.call.slot(role)?;
        Some(self.call.memories[slot.memory].payload(&snapshots[slot.memory]))
    }

    fn floats(&self, snapshots: &[Vec<u8>], role: Role) -> Option<Vec<f64>> {
        let bytes = self.payload(snapshots, role)?;
        Some((0..bytes.len() / 4).map(|i| load(1, bytes, i)).collect())
    }

    /// A factor as the whole backward sees it: after gathering, where every rank holds the same.
    fn factor(&self, k: usize, of_x: bool) -> Grid {
        let (batch, layout, world) = (&self.call.batches[k], &self.world.layout, self.world);
        let (role, cols, stride, rows, gathered) = if of_x {
            (Role::X(k), layout.in_local, batch.x_stride, batch.x_rows, world.gathers_x())
        } else {
            (Role::Dy(k), layout.out_local, batch.dy_stride, batch.dy_rows, world.gathers_dy())
        };
        let stride = if stride == 0 { cols } else { stride } as usize;
        let bytes = self.payload(self.before, role).expect("every batch has both");
        let mut values = Vec::new();
        let copies = if gathered && self.call.op == Op::Backward { world.ranks() } else { 1 };
        for _ in 0..copies {
            for row in 0..rows as usize {
                for col in 0..cols as usize {
                    values.push(load(world.config.factor_dtype, bytes, row * stride + col));
                }
            }
        }
        Grid { cols: cols as usize, values }
    }

    /// Σ dYᵀX (+ accumulator).
    fn gradient(&self) -> Vec<f64> {
        let layout = &self.world.layout;
        let (out, inn) = (layout.out_local as usize, layout.in_local as usize);
        let narrow = self.call.slot(Role::Accumulator).is_some_and(|slot| slot.element == 2);
        let accumulator = if narrow {
            let bytes = self.payload(self.before, Role::Accumulator).expect("it has a slot");
            let value = |i| load(self.world.config.factor_dtype, bytes, i);
            Some((0..bytes.len() / 2).map(value).collect())
        } else {
            self.floats(self.before, Role::Accumulator)
        };
        let mut dw: Vec<f64> = accumulator.unwrap_or_else(|| vec![0.0; out * inn]);
        for k in 0..self.call.batches.len() {
            let (dy, x) = (self.factor(k, false), self.factor(k, true));
            for t in 0..self.call.batches[k].tokens as usize {
                for o in 0..out {
                    for i in 0..inn {
                        dw[o * inn + i] += dy.at(t, o) * x.at(t, i);
                    }
                }
            }
        }
        dw
    }

    fn check_dx(&self) {
        let (world, layout) = (self.world, &self.world.layout);
        let Some(dx) = self.payload(self.after, Role::Dx) else { return };
        let weight = self.payload(self.before, Role::Weight).expect("dX needs it");
        let dy = self.factor(0, false);
        let inn = layout.in_local as usize;
        let rows = dx.len() / world.element() / inn;
        // Reduce-scattered: this rank's rows. (Its peers add zeros.)
        let scattered = self.call.op == Op::Backward && world.gathers_x();
        let first = if scattered { world.rank.rank * rows } else { 0 };
        let relative = match world.config.factor_dtype {
            1 => 1e-6,
            2 => 1.0 / 256.0,
            _ => 1.0 / 2048.0,
        };
        for row in 0..rows {
            for i in 0..inn {
                let wanted: f64 = (0..layout.out_local as usize)
                    .map(|o| dy.at(first + row, o) * load(layout.weight.dtype, weight, o * inn + i))
                    .sum();
                let got = load(world.config.factor_dtype, dx, row * inn + i);
                close("dx", got, wanted, relative);
            }
        }
    }

    fn check_dbias(&self) {
        let Some(dbias) = self.payload(self.after, Role::Dbias) else { return };
        let dy = self.factor(0, false);
        for o in 0..dy.cols {
            let wanted: f64 = (0..self.call.batches[0].tokens as usize).map(|t| dy.at(t, o)).sum();
            close("dbias", load(self.world.config.factor_dtype, dbias, o), wanted, 1.0 / 256.0);
        }
    }

    fn check_accumulator(&self) -> bool {
        let got = self.floats(self.after, Role::Accumulator).expect("it is required");
        assert_eq!(got, self.gradient(), "accumulator");
        true
    }

    fn check_norm(&self) -> bool {
        let norm = self.call.norm_value();
        let wanted: f64 = self.gradient().iter().map(|g| g * g).sum();
        close("sum_of_squares", norm.sum_of_squares, wanted, 1e-5);
        assert!((1..=2).contains(&norm.method) && norm.nonfinite == 0);
        true
    }

    /// The fp32 master of the weight, where the format has one.
    fn master(&self, snapshots: &[Vec<u8>]) -> Option<Vec<f64>> {
        match self.world.config.weight_format {
            0 => self.floats(snapshots, Role::Weight),
            2 => self.floats(snapshots, Role::Extra),
            3 => {
                let upper = self.payload(snapshots, Role::Weight)?;
                let lower = self.payload(snapshots, Role::Extra)?;
                let half = |b: &[u8], i: usize| u16::from_ne_bytes([b[2 * i], b[2 * i + 1]]);
                let join = |i| {
                    let (u, l) = (half(upper, i), half(lower, i));
                    let top = u.wrapping_sub(l >> 15);
                    f64::from(f32::from_bits(u32::from(top) << 16 | u32::from(l)))
                };
                Some((0..upper.len() / 2).map(join).collect())
            }
            _ => None,
        }
    }

    fn check_update(&self) -> bool {
        let (world, layout) = (self.world, &self.world.layout);
        let dw = self.gradient();
        if let Some(report) = self.call.report_value() {
            let wanted: f64 = dw.iter().map(|g| g * g).sum();
            close("report.sum_of_squares", report.sum_of_squares, wanted, 1e-5);
            assert!(report.tiles > 0 && report.nonfinite_tiles == 0);
        }
        let states = layout.n_states as usize;
        if (0..states).any(|k| layout.states[k].dtype != 1) {
            return false;
        }
        let (Some(old), Some(new)) = (self.master(self.before), self.master(self.after)) else {
            return false;
        };
        let state = |snapshots, k| self.floats(snapshots, Role::State(k)).unwrap_or_default();
        let before: Vec<_> = (0..states).map(|k| state(self.before, k)).collect();
        let after: Vec<_> = (0..states).map(|k| state(self.after, k)).collect();
        let flags = world.config.rule_flags;
        for i in 0..dw.len() {
            let mut s = [0.0; 3];
            for k in 0..states {
                s[k] = before[k][i];
            }
            let scalars = &self.call.scalars;
            let applied = apply(world.rule_name(), flags, scalars, dw[i], old[i], &mut s);
            let Some((w, cancelled)) = applied else {
                continue;
            };
            // The change carries the rounding of fp32 constants; the sum that of fp32 itself.
            let rounding = 1e-5 * (w - old[i]).abs() + 1e-6 * old[i].abs().max(w.abs()) + 1e-6;
            let bound = rounding + cancelled;
            assert!((new[i] - w).abs() <= bound, "weight: {} -> {}, wanted {w}", old[i], new[i]);
            for k in 0..states {
                let (got, wanted) = (after[k][i], s[k]);
                let bound = 1e-5 * (wanted.abs() + before[k][i].abs() + dw[i].abs()) + 1e-6;
                assert!((got - wanted).abs() <= bound, "state {k}: got {got}, wanted {wanted}");
            }
        }
        true
    }

    fn check_weight_image(&self) -> bool {
        let snapshots = if self.call.op == Op::ExportWeight { self.before } else { self.after };
        let Some(master) = self.master(snapshots) else { return false };
        let image = self.floats(self.after, Role::Fp32).expect("it is required");
        assert_eq!(image, master, "weight image");
        true
    }

    fn check_state_image(&self) -> bool {
        let k = self.call.index as usize;
        if self.world.layout.states[k].dtype != 1 {
            return false;
        }
        let snapshots = if self.call.op == Op::ExportState { self.before } else { self.after };
        let state = self.floats(snapshots, Role::State(k));
        assert_eq!(self.floats(self.after, Role::Fp32), state, "state image");
        true
    }
}

/// A rule, from its paper or torch.optim: the weight, and what fp32 may be off by where large terms
/// cancel. None where fp32 and fp64 may take different branches.
fn apply(
    rule: &str,
    flags: u32,
    scalars: &forge_step_scalars,
    dw: f64,
    w: f64,
    s: &mut [f64; 3],
) -> Option<(f64, f64)> {
    let [lr, decay, h2, h3, eps, ..] = scalars.hyper;
    let mut g = dw * scalars.grad_scale;
    if flags & 1 != 0 {
        g = -g;
    }
    let t = scalars.step as f64;
    let mut cancelled = 0.0;
    let w = match rule {
        "sgd" => {
            g += decay * w;
            let momentum = flags & 4 != 0;
            if momentum {
                s[0] = if scalars.step == 1 { g } else { h2 * s[0] + (1.0 - h3) * g };
            }
            let direction = match (momentum, flags & 2 != 0) {
                (true, true) => g + h2 * s[0],
                (true, false) => s[0],
                _ => g,
            };
            w - lr * direction
        }
        "adam" | "adamw" => {
            let coupled = rule == "adam";
            if coupled {
                g += decay * w;
            }
            let largest = s[0].abs() + g.abs();
            s[0] = h2 * s[0] + (1.0 - h2) * g;
            s[1] = h3 * s[1] + (1.0 - h3) * g * g;
            s[2] = s[2].max(s[1]);
            let square = if flags & 8 != 0 { s[2] } else { s[1] };
            let denominator = (square / (1.0 - h3.powf(t))).sqrt() + eps;
            let w = if coupled { w } else { w * (1.0 - lr * decay) };
            let rate = lr / (1.0 - h2.powf(t)) / denominator;
            // m + (1 − β₁)(g − m), as torch has it, rounds at the size of m and g.
            cancelled = rate * largest * f64::from(f32::EPSILON);
            w - rate * s[0]
        }
        "lion" => {
            let u = h2 * s[0] + (1.0 - h2) * g;
            s[0] = h3 * s[0] + (1.0 - h3) * g;
            if u != 0.0 && u.abs() < 1e-5 {
                return None;
            }
            let sign = if u == 0.0 { 0.0 } else { u.signum() };
            w * (1.0 - lr * decay) - lr * sign
        }
        // tests/numerics.rs has their definitions; here it is the calls that are tested.
        _ => return None,
    };
    Some((w, cancelled))
}
