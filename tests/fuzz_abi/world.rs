//! Live objects to call: contexts, communicators with collectives that fail on demand, linears.

use super::memory::Random;
use forge::error::forge_status;
use forge::ffi::comm::*;
use forge::ffi::context::*;
use forge::ffi::linear::*;
use forge::ffi::rule::*;
use forge::ffi::types::*;
use std::cell::Cell;
use std::ffi::{CStr, c_void};
use std::ptr::null_mut;

/// Twice those that `reference::apply` defines.
pub const RULES: &[&CStr] = &[
    c"sgd",
    c"adam",
    c"adamw",
    c"lion",
    c"sgd",
    c"adam",
    c"adamw",
    c"lion",
    c"adamax",
    c"nadam",
    c"radam",
    c"ademamix",
    c"rmsprop",
    c"adagrad",
    c"adadelta",
    c"rprop",
    c"asgd",
    c"signum",
];

/// A struct of the ABI that starts with its size, the rest zeros.
pub fn sized<T: Copy>() -> T {
    // SAFETY: used for C structs of numbers and nullable pointers, for which zeros are valid, and
    // whose first field is the u32 `struct_size`.
    unsafe {
        let mut value: T = std::mem::zeroed();
        std::ptr::from_mut(&mut value).cast::<u32>().write(size_of::<T>() as u32);
        value
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    None,
    Collective,
    Wait,
}

/// One rank whose peers all hold what it holds, and whose collectives touch every byte that they
/// were promised.
pub struct FakeRank {
    pub rank: usize,
    pub size: usize,
    /// Calls until one fails; None: none does.
    pub fail_after: Cell<Option<usize>>,
    pub failed: Cell<Failure>,
}

impl FakeRank {
    fn fails(&self, how: Failure) -> bool {
        match self.fail_after.get() {
            Some(0) => {
                self.fail_after.set(None);
                self.failed.set(how);
                true
            }
            Some(n) => {
                self.fail_after.set(Some(n - 1));
                false
            }
            None => false,
        }
    }
}

fn element(dtype: u32) -> usize {
    match dtype {
        1 => 4,
        2 | 3 => 2,
        other => panic!("a collective of dtype {other}"),
    }
}

/// The rank that a callback was made for, and the bytes of `count` elements.
///
/// # Safety
/// `user` is the FakeRank given at creation, which outlives the communicator.
unsafe fn called<'a>(user: *mut c_void, count: u64, dtype: u32) -> (&'a FakeRank, usize) {
    // SAFETY: the caller's promise.
    (unsafe { &*user.cast::<FakeRank>() }, count as usize * element(dtype))
}

unsafe extern "C" fn all_gather(
    user: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    count: u64,
    dtype: u32,
) -> i32 {
    // SAFETY: `user` comes from `collectives`; the buffers are as the ABI promises, which is what is
    // tested here.
    unsafe {
        let (this, bytes) = called(user, count, dtype);
        for r in 0..this.size {
            recv.cast::<u8>().add(r * bytes).copy_from(send.cast(), bytes);
        }
        i32::from(this.fails(Failure::Collective)) * 7
    }
}

unsafe extern "C" fn reduce_scatter(
    user: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    count: u64,
    dtype: u32,
) -> i32 {
    // SAFETY: as above. The peers add zeros.
    unsafe {
        let (this, bytes) = called(user, count, dtype);
        // Raw copies: with no tokens at all, both pointers may be NULL.
        let part = send.cast::<u8>().add(this.rank * bytes);
        recv.cast::<u8>().copy_from(part, bytes);
        -i32::from(this.fails(Failure::Collective))
    }
}

unsafe extern "C" fn all_reduce(
    user: *mut c_void,
    buffer: *mut c_void,
    count: u64,
    dtype: u32,
) -> i32 {
    // SAFETY: as above. Rewriting every byte shows that they may be written.
    unsafe {
        let (this, bytes) = called(user, count, dtype);
        for i in 0..bytes {
            let byte = buffer.cast::<u8>().add(i);
            byte.write_volatile(byte.read_volatile());
        }
        i32::from(this.fails(Failure::Collective))
    }
}

unsafe extern "C" fn all_to_all(
    user: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    count: u64,
    dtype: u32,
) -> i32 {
    // SAFETY: as above. The peers send what this rank does.
    unsafe {
        let (this, bytes) = called(user, count, dtype);
        recv.cast::<u8>().copy_from(send.cast(), this.size * bytes);
        i32::from(this.fails(Failure::Collective))
    }
}

unsafe extern "C" fn wait(user: *mut c_void) -> i32 {
    // SAFETY: as above.
    i32::from(unsafe { &*user.cast::<FakeRank>() }.fails(Failure::Wait))
}

pub fn collectives(user: *mut c_void, with_wait: bool) -> forge_host_collectives {
    forge_host_collectives {
        struct_size: size_of::<forge_host_collectives>() as u32,
        reserved: 0,
        user,
        all_gather: Some(all_gather),
        reduce_scatter: Some(reduce_scatter),
        all_reduce: Some(all_reduce),
        wait: with_wait.then_some(wait),
        all_to_all: Some(all_to_all),
    }
}

/// A context that is freed in the end.
pub struct Context(pub *mut forge_context);

impl Context {
    pub fn new(threads: u32) -> Self {
        let mut config = sized::<forge_context_config>();
        config.threads = threads;
        let mut context = null_mut();
        // SAFETY: both pointers are to live values.
        let status = unsafe { forge_context_new(&config, &mut context) };
        assert_eq!(status, forge_status::FORGE_OK);
        Self(context)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by forge_context_new.
        unsafe { forge_context_free(self.0) };
    }
}

/// A random linear and what it was made of.
pub struct World {
    pub rank: Box<FakeRank>,
    pub comm: *mut forge_comm,
    pub linear: *mut forge_linear,
    pub config: forge_linear_config,
    pub layout: forge_layout,
    pub rule: forge_rule_info,
}

impl World {
    pub fn new(context: &Context, random: &mut Random) -> Self {
        let size = random.pick(&[1, 1, 2, 2, 3, 4]);
        let rank = Box::new(FakeRank {
            rank: random.below(size),
            size,
            fail_after: Cell::new(None),
            failed: Cell::new(Failure::None),
        });
        let user = std::ptr::from_ref(&*rank).cast_mut().cast();
        let host = collectives(user, random.percent(60));
        let mut comm = null_mut();
        let (mut config, name) = random_config(random, size);
        config.rule = name.as_ptr();
        let mut linear = null_mut();
        let mut layout = sized::<forge_layout>();
        let mut rule = sized::<forge_rule_info>();
        // SAFETY: all pointers are to live values; the callbacks get the FakeRank, which is boxed and
        // dropped after the linear.
        unsafe {
            let ok = forge_status::FORGE_OK;
            if size == 1 && random.percent(50) {
                assert_eq!(forge_comm_new_solo(context.0, &mut comm), ok);
            } else {
                let (r, n) = (rank.rank as u32, size as u32);
                assert_eq!(forge_comm_new_host(context.0, r, n, &host, &mut comm), ok);
            }
            assert_eq!(forge_linear_new(context.0, comm, &config, &mut linear), ok);
            assert_eq!(forge_linear_layout(linear, &mut layout), ok);
            assert_eq!(forge_rule_find(config.rule, config.rule_flags, &mut rule), ok);
        }
        Self { rank, comm, linear, config, layout, rule }
    }

    /// Frees the communicator before the linear, which lives on without it.
    pub fn free_comm(&mut self) {
        // SAFETY: made by a `_new` function; NULL from now on.
        unsafe { forge_comm_free(std::mem::replace(&mut self.comm, null_mut())) };
    }

    pub fn rule_name(&self) -> &'static str {
        // SAFETY: one of RULES.
        unsafe { CStr::from_ptr(self.config.rule) }.to_str().expect("RULES are ASCII")
    }

    /// Ranks that share W.
    pub fn ranks(&self) -> usize {
        if self.config.parallel == 0 { 1 } else { self.rank.size }
    }

    pub fn gathers_x(&self) -> bool {
        self.config.sequence_parallel == 1 && self.config.parallel == 1
    }

    pub fn gathers_dy(&self) -> bool {
        self.config.sequence_parallel == 1 && self.config.parallel == 2
    }

    /// Bytes of a factor's element.
    pub fn element(&self) -> usize {
        element(self.config.factor_dtype)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // SAFETY: made by the `_new` functions and not freed. Any order is allowed.
        unsafe {
            forge_comm_free(self.comm);
            forge_linear_free(self.linear);
        }
    }
}

/// A valid configuration for this many ranks, its rule's name apart.
pub fn random_config(random: &mut Random, size: usize) -> (forge_linear_config, &'static CStr) {
    let name = random.pick(RULES);
    let mut c = sized::<forge_linear_config>();
    c.rule_flags = random.pick(match name.to_bytes() {
        b"sgd" => &[0, 1, 4, 5, 6, 7],
        b"adam" | b"adamw" => &[0, 1, 8, 9],
        b"rmsprop" => &[0, 4, 16, 20, 21],
        b"nadam" | b"radam" => &[0, 1, 32, 33],
        _ => &[0, 1],
    });
    c.factor_dtype = random.pick(&[1, 1, 2, 3]);
    c.parallel = random.pick(&[0, 1, 2]);
    c.sequence_parallel = if c.parallel == 0 { 0 } else { random.pick(&[0, 1]) };
    c.reduce_dgrad = random.pick(&[0, 1]);
    c.weight_format = random.pick(&[0, 1, 2, 3]);
    c.weight_rounding = random.pick(&[0, 1]);
    c.state_rounding = random.pick(&[0, 1]);
    // Half of them all fp32: those are the ones that the reference can follow.
    let all_f32 = random.percent(50);
    c.state_formats = [(); 3].map(|()| if all_f32 { 0 } else { random.pick(&[0, 1, 2]) });
    c.parameter_id = random.next() as u32;
    // Now and then more than one block of 128 columns and more than one tile.
    let most = if random.percent(6) { 300 } else { 40 };
    c.out_features = 1 + random.below(most) as u64;
    c.in_features = 1 + random.below(most) as u64;
    match c.parallel {
        1 => c.out_features = c.out_features.div_ceil(size as u64) * size as u64,
        2 => c.in_features = c.in_features.div_ceil(size as u64) * size as u64,
        _ => {}
    }
    (c, name)
}
