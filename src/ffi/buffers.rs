//! Checks of a call's buffers: not NULL, aligned, of the right size, and none that is written
//! overlaps another one. Everything is checked before anything is written.

use super::boundary::{check_pointer, check_reserved, read_struct};
use super::types::{forge_buffer, forge_const_buffer, forge_parameter, forge_segment};
use crate::backend::{Accumulator, Arrays, Backend, Factors, Matrix, Shard};
use crate::error::{Result, bail};
use crate::format::Dtype;
use crate::linear::{ArrayLayout, Layout, Linear, Shape};
use crate::rule::MAX_STATES;

/// What a pointer may be: bytes `first..last`, written or only read.
struct Range {
    name: String,
    first: usize,
    last: usize,
    written: bool,
}

/// The buffers of one call.
pub struct Checker<'a> {
    backend: &'a dyn Backend,
    ranges: Vec<Range>,
    /// Whose buffers the next ones are, before their names in [`Checker::finish`]'s message.
    pub owner: String,
}

impl<'a> Checker<'a> {
    pub fn new(backend: &'a dyn Backend) -> Self {
        Self { backend, ranges: Vec::new(), owner: String::new() }
    }

    /// Checks one buffer of `bytes` bytes of `dtype` in the backend's memory and remembers it.
    pub fn buffer(
        &mut self,
        name: &str,
        data: *const u8,
        bytes: u64,
        dtype: Dtype,
        written: bool,
    ) -> Result<()> {
        self.range(name, data, bytes, dtype, written)?;
        if bytes > 0 { self.backend.check_memory(name, data) } else { Ok(()) }
    }

    /// As [`Checker::buffer`], of memory that may be the host's.
    pub fn range(
        &mut self,
        name: &str,
        data: *const u8,
        bytes: u64,
        dtype: Dtype,
        written: bool,
    ) -> Result<()> {
        if data.is_null() {
            bail!(FORGE_ERROR_NULL, "{name}: data is NULL");
        }
        let alignment = self.backend.alignment(dtype.bytes());
        if !(data as usize).is_multiple_of(alignment) {
            bail!(
                FORGE_ERROR_MISALIGNED,
                "{name}: {data:p} is not aligned to {alignment} bytes, its element's size; pass an \
                 aligned copy"
            );
        }
        let first = data as usize;
        let Some(last) = usize::try_from(bytes).ok().and_then(|n| first.checked_add(n)) else {
            bail!(
                FORGE_ERROR_OVERFLOW,
                "{name}: {bytes} bytes from {data:p} pass the address space"
            );
        };
        let name = format!("{}{name}", self.owner);
        self.ranges.push(Range { name, first, last, written });
        Ok(())
    }

    /// An array that must have exactly its layout's size.
    pub fn array(
        &mut self,
        name: &str,
        data: *const u8,
        bytes: u64,
        layout: &ArrayLayout,
        written: bool,
    ) -> Result<()> {
        let Some(dtype) = layout.dtype else {
            if !data.is_null() {
                bail!(
                    FORGE_ERROR_UNSUPPORTED,
                    "{name}: given, but this linear's formats have no such array; \
                     see forge_linear_layout"
                );
            }
            return Ok(());
        };
        if data.is_null() {
            bail!(FORGE_ERROR_NULL, "{name}: data is NULL; see forge_linear_layout");
        }
        let (needed, rows, cols) = (layout.bytes() as u64, layout.rows, layout.cols);
        if bytes != needed {
            bail!(
                FORGE_ERROR_BUFFER_SIZE,
                "{name}: {bytes} bytes, {needed} needed for [{rows}, {cols}] of {dtype:?}"
            );
        }
        self.buffer(name, data, bytes, dtype, written)
    }

    /// A factor: `rows` rows of `cols` elements, `stride` apart.
    pub fn factor(
        &mut self,
        name: &str,
        buffer: &forge_const_buffer,
        rows: u64,
        cols: u64,
        stride: u64,
        dtype: Dtype,
    ) -> Result<Matrix> {
        let data = buffer.data.cast::<u8>();
        if stride != 0 && stride < cols {
            bail!(FORGE_ERROR_SHAPE, "{name}_stride: {stride} is below the row's {cols} elements");
        }
        let stride = if stride == 0 { cols } else { stride };
        // The last row needs no padding behind it.
        let elements = match rows.checked_sub(1) {
            None => Some(0),
            Some(before) => before.checked_mul(stride).and_then(|n| n.checked_add(cols)),
        };
        let needed = elements
            .and_then(|n| n.checked_mul(dtype.bytes() as u64))
            .filter(|n| *n <= i64::MAX as u64);
        let Some(needed) = needed else {
            bail!(FORGE_ERROR_OVERFLOW, "{name}: {rows} rows, {stride} elements apart, overflow");
        };
        if rows == 0 {
            return Ok(Matrix { data, stride: stride as usize });
        }
        if data.is_null() {
            bail!(FORGE_ERROR_NULL, "{name}: data is NULL");
        }
        if buffer.bytes < needed {
            bail!(
                FORGE_ERROR_BUFFER_SIZE,
                "{name}: {} bytes, {needed} needed for [{rows}, {cols}] of {dtype:?} with rows \
                 {stride} elements apart",
                buffer.bytes
            );
        }
        self.buffer(name, data, needed, dtype, false)?;
        Ok(Matrix { data, stride: stride as usize })
    }

    /// An optional output of exactly `count` elements.
    pub fn output(
        &mut self,
        name: &str,
        buffer: &forge_buffer,
        count: u64,
        dtype: Dtype,
    ) -> Result<Option<*mut u8>> {
        if buffer.data.is_null() {
            return Ok(None);
        }
        let needed = count * dtype.bytes() as u64;
        if buffer.bytes != needed {
            bail!(
                FORGE_ERROR_BUFFER_SIZE,
                "{name}: {} bytes, {needed} needed for {count} elements of {dtype:?}",
                buffer.bytes
            );
        }
        self.buffer(name, buffer.data.cast(), needed, dtype, true)?;
        Ok(Some(buffer.data.cast()))
    }

    /// An optional buffer of W's shape that is only read: fp32, or where it is the whole gradient also of the
    /// factors' type, which its size tells.
    pub fn addend(
        &mut self,
        buffer: &forge_const_buffer,
        layout: &Layout,
        factor: Dtype,
        n_segments: u32,
    ) -> Result<Option<Accumulator>> {
        let (data, bytes) = (buffer.data.cast::<u8>(), buffer.bytes);
        let narrow = ArrayLayout { dtype: Some(factor), ..layout.accumulator };
        if data.is_null()
            || n_segments != 0
            || factor == Dtype::F32
            || bytes != narrow.bytes() as u64
        {
            return self.accumulator(data, bytes, layout, false);
        }
        self.array("accumulator", data, bytes, &narrow, false)?;
        Ok(Some(Accumulator::gradient(data, factor)))
    }

    /// An optional fp32 buffer of W's shape.
    pub fn accumulator(
        &mut self,
        data: *const u8,
        bytes: u64,
        layout: &Layout,
        written: bool,
    ) -> Result<Option<Accumulator>> {
        if data.is_null() {
            return Ok(None);
        }
        self.array("accumulator", data, bytes, &layout.accumulator, written)?;
        Ok(Some(Accumulator::fp32(data.cast_mut().cast())))
    }

    /// All arrays of a parameter.
    pub fn arrays(
        &mut self,
        parameter: &forge_parameter,
        layout: &Layout,
        written: bool,
    ) -> Result<Arrays> {
        let mut check = |name: &str, buffer: &forge_buffer, layout: &ArrayLayout| {
            self.array(name, buffer.data.cast(), buffer.bytes, layout, written)
        };
        check("parameter.weight", &parameter.weight, &layout.weight)?;
        check("parameter.weight_extra", &parameter.weight_extra, &layout.extra)?;
        for k in 0..MAX_STATES {
            let name = format!("parameter.states[{k}]");
            check(&name, &parameter.states[k], &layout.states[k])?;
            let name = format!("parameter.scales[{k}]");
            check(&name, &parameter.scales[k], &layout.scales[k])?;
        }
        Ok(Arrays {
            weight: parameter.weight.data.cast(),
            extra: parameter.weight_extra.data.cast(),
            states: parameter.states.map(|b| b.data.cast()),
            scales: parameter.scales.map(|b| b.data.cast()),
        })
    }

    /// The segments of a call, of the owned rows.
    ///
    /// # Safety
    /// As [`Checker::segments_of`].
    pub unsafe fn segments(
        &mut self,
        linear: &Linear,
        segments: *const forge_segment,
        n: u32,
    ) -> Result<Vec<Factors>> {
        let (shape, dtype) = (&linear.shape, linear.scheme.factor_dtype);
        // SAFETY: as promised by the caller.
        unsafe { self.segments_of(shape, &shape.owned(), dtype, segments, n) }
    }

    /// The segments of a call, of a shard.
    ///
    /// # Safety
    /// `segments` is NULL, misaligned, or readable for `n` elements.
    pub unsafe fn segments_of(
        &mut self,
        shape: &Shape,
        shard: &Shard,
        dtype: Dtype,
        segments: *const forge_segment,
        n: u32,
    ) -> Result<Vec<Factors>> {
        if n == 0 {
            return Ok(Vec::new());
        }
        check_pointer("segments", segments)?;
        // SAFETY: readable for n elements, as promised by the caller.
        let segments = unsafe { std::slice::from_raw_parts(segments, n as usize) };
        let mut out = Vec::with_capacity(segments.len());
        let mut total: u64 = 0;
        for (i, s) in segments.iter().enumerate() {
            total = total.saturating_add(s.tokens);
            shape.check_unsplit_tokens(total)?;
            let name = format!("segments[{i}].dy");
            let dy = self.factor(&name, &s.dy, s.tokens, shard.rows as u64, s.dy_stride, dtype)?;
            let name = format!("segments[{i}].x");
            let x = self.factor(&name, &s.x, s.tokens, shard.cols as u64, s.x_stride, dtype)?;
            out.push(Factors { dy, x, tokens: s.tokens as usize });
        }
        Ok(out)
    }

    /// Refuses a written buffer that overlaps any other. The last check of a call.
    pub fn finish(mut self) -> Result<()> {
        self.ranges.retain(|r| r.first < r.last);
        self.ranges.sort_by_key(|r| r.first);
        // The written one, and any one, that reach furthest so far.
        let mut written: Option<&Range> = None;
        let mut any: Option<&Range> = None;
        for range in &self.ranges {
            let against = if range.written { any } else { written };
            if let Some(other) = against.filter(|o| o.last > range.first) {
                bail!(
                    FORGE_ERROR_OVERLAP,
                    "{}: overlaps {}; a buffer that is written must be apart from all others",
                    range.name,
                    other.name
                );
            }
            let further = |old: Option<&Range>| old.is_none_or(|o| range.last > o.last);
            if further(any) {
                any = Some(range);
            }
            if range.written && further(written) {
                written = Some(range);
            }
        }
        Ok(())
    }
}

/// Reads a parameter struct.
///
/// # Safety
/// As [`read_struct`].
pub unsafe fn read_parameter(parameter: *const forge_parameter) -> Result<forge_parameter> {
    // SAFETY: as promised by the caller.
    let parameter = unsafe { read_struct("parameter", parameter)? };
    check_reserved("parameter", parameter.reserved)?;
    Ok(parameter)
}
