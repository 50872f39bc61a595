//! The panel path, where no fused kernel takes the work: dW of some rows in the workspace, consumed at
//! once, so that no gradient is ever held. cuBLASLt multiplies what it can, [`exact`] the rest.

use super::super::{Accumulator, Factors, Scheme, Shard, Stream};
use super::blas::{Left, Plane, Product};
use super::driver::DevicePtr;
use super::exact;
use super::gpu::Gpu;
use super::parameters::Region;
use super::workspace::{MOST_PARTIALS, PANEL_BYTES, Workspace};
use crate::error::{Result, bail};
use crate::format::Dtype;

/// Where partials go, and how many there are.
pub struct Partials {
    base: DevicePtr,
    count: u64,
}

impl Partials {
    /// Room for `more`.
    pub fn take(&mut self, more: u64) -> Result<DevicePtr> {
        check_partials(self.count + more)?;
        let at = self.base + 16 * self.count;
        self.count += more;
        Ok(at)
    }
}

/// Refuses more tiles than there is room for.
fn check_partials(tiles: u64) -> Result<()> {
    if tiles > MOST_PARTIALS {
        bail!(
            FORGE_ERROR_UNSUPPORTED,
            "shape: {tiles} tiles, more than {MOST_PARTIALS}; shard the weight further"
        );
    }
    Ok(())
}

/// Whether there is nothing to multiply.
pub fn no_tokens(factors: &[Factors]) -> bool {
    factors.iter().all(|f| f.tokens == 0)
}

/// The panels of a shard: rows a multiple of 128, columns too where a row does not fit.
fn panels(shard: &Shard) -> Vec<Region> {
    let (rows, cols) = (shard.rows as u64, shard.cols as u64);
    let elements = PANEL_BYTES / 4;
    let most_cols = elements / 128;
    let width = cols.min(most_cols);
    let height = (elements / width.next_multiple_of(4) / 128 * 128).max(128);
    let mut out = Vec::new();
    for row in (0..rows).step_by(height as usize) {
        for col in (0..cols).step_by(width as usize) {
            out.push(Region {
                row,
                col,
                rows: height.min(rows - row),
                cols: width.min(cols - col),
            });
        }
    }
    out
}

/// `out = addend + Σ dYᵀX` of a region, both fp32 with rows of the given strides.
///
/// # Safety
/// As [`super::super::Backend::update`]; the context is current.
pub unsafe fn products(
    gpu: &Gpu,
    dtype: Dtype,
    factors: &[Factors],
    region: Region,
    addend: Option<Plane>,
    out: Plane,
    workspace: &Workspace,
    stream: Stream,
) -> Result<()> {
    let element = dtype.bytes() as u64;
    let dy = |f: &Factors| f.dy.data as DevicePtr + region.row * element;
    let x = |f: &Factors| f.x.data as DevicePtr + region.col * element;
    let factors = factors.iter().filter(|f| f.tokens > 0);
    let mut addend = addend;
    let mut left_over = Vec::new();
    for f in factors {
        // Once one segment went to the exact kernel the others follow it: they are in order.
        let product = Product {
            m: region.rows as usize,
            n: region.cols as usize,
            k: f.tokens,
            dtype,
            out_dtype: Dtype::F32,
            left: Left { data: dy(f), stride: f.dy.stride, summed_first: true },
            right: Plane { data: x(f), stride: f.x.stride },
            addend,
            out,
        };
        // SAFETY: as promised by the caller.
        let taken = dtype != Dtype::F32
            && left_over.is_empty()
            && unsafe { gpu.blas.enqueue(&product, workspace.blas, stream)? };
        if taken {
            addend = Some(out);
        } else {
            let operand =
                |data, stride: usize| exact::Operand { data, row: 1, depth: stride as u64 };
            left_over.push(exact::Segment {
                left: operand(dy(f), f.dy.stride),
                right: operand(x(f), f.x.stride),
                terms: f.tokens as u64,
            });
        }
    }
    // Without any segment the exact kernel copies the addend, or writes zeros.
    let complete = left_over.is_empty() && addend.is_some_and(|a| a.data == out.data);
    if complete {
        return Ok(());
    }
    let types = exact::Types { left: dtype, right: dtype, out: Dtype::F32 };
    let plane = |p: Plane| exact::Plane { data: p.data, stride: p.stride as u64 };
    let size = (region.rows, region.cols);
    let addend = addend.map(plane);
    // SAFETY: as promised by the caller.
    unsafe { exact::product(gpu, types, &left_over, size, addend, plane(out), stream) }
}

/// The gradient region by region: dW of a panel in the workspace, then `consume(region, panel)`. Where
/// there is nothing to multiply it is all consumed where it lies, in the accumulator, whose type it has;
/// without one it is zeros, and None. Returns how many partials were taken.
///
/// # Safety
/// As [`super::super::Backend::update`]; the context is current.
pub unsafe fn for_each(
    gpu: &Gpu,
    scheme: &Scheme,
    shard: &Shard,
    factors: &[Factors],
    accumulator: Option<Accumulator>,
    workspace: &Workspace,
    stream: Stream,
    mut consume: impl FnMut(Region, Option<Plane>, &mut Partials) -> Result<()>,
) -> Result<u64> {
    let mut partials = Partials { base: workspace.partials, count: 0 };
    if no_tokens(factors) {
        let whole = Region::whole(shard);
        let plane = |a: Accumulator| Plane { data: a.data() as DevicePtr, stride: shard.cols };
        consume(whole, accumulator.map(plane), &mut partials)?;
        return Ok(partials.count);
    }
    let panels = panels(shard);
    // Before the first panel, so that no weight is updated in part.
    check_partials(panels.iter().map(Region::tiles).sum())?;
    for region in panels {
        let stride = (region.cols as usize).next_multiple_of(4);
        let panel = Plane { data: workspace.panel, stride };
        let addend = accumulator.map(|a| plane_of(a, shard, region));
        let dtype = scheme.factor_dtype;
        // SAFETY: as promised by the caller.
        unsafe { products(gpu, dtype, factors, region, addend, panel, workspace, stream)? };
        consume(region, Some(panel), &mut partials)?;
    }
    Ok(partials.count)
}

/// A region of an fp32 buffer of the shard's shape.
pub fn plane_of(buffer: Accumulator, shard: &Shard, region: Region) -> Plane {
    let at = region.row * shard.cols as u64 + region.col;
    Plane { data: buffer.get() as DevicePtr + 4 * at, stride: shard.cols }
}
