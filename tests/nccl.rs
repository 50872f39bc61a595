//! The C ABI's communicators of NCCL, between threads over fake libraries (tests/fake_cuda): what is gathered and
//! reduced, in which order streams get it, and what is said when NCCL or a rank is not there.

mod fake_cuda;

use cudarc::driver::sys;
use fake_cuda::{again, build, directory, finish, last_error, ok, sized};
use forge::error::forge_status::{self, *};
use forge::ffi::comm::*;
use forge::ffi::context::*;
use forge::ffi::data_parallel::*;
use forge::ffi::enums::*;
use forge::ffi::linear::*;
use forge::ffi::run::*;
use forge::ffi::types::*;
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::null_mut;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

const ROWS: u64 = 8;
const COLS: u64 = 16;
const TOKENS: u64 = 6;
const RANKS: u64 = 2;
const KEEP: u32 = forge_backward_mode::FORGE_BACKWARD_KEEP as u32;

#[track_caller]
fn fails(status: forge_status, expected: forge_status, parts: &[&str]) {
    let message = last_error();
    assert_eq!(status, expected, "{message}");
    for part in parts {
        assert!(message.contains(part), "no '{part}' in: {message}");
    }
}

/// Memory of the fake GPU with these numbers; never freed.
fn device(values: &[f32]) -> forge_buffer {
    let bytes = size_of_val(values).max(1);
    let mut address = 0;
    // SAFETY: the result is live; the fake GPU's memory is the host's, and as large as asked for.
    unsafe {
        let status = sys::cuMemAlloc_v2(&mut address, bytes);
        assert_eq!(status, sys::CUresult::CUDA_SUCCESS);
        (address as *mut f32).copy_from_nonoverlapping(values.as_ptr(), values.len());
    }
    forge_buffer { data: address as *mut c_void, bytes: size_of_val(values) as u64 }
}

fn floats(buffer: forge_buffer, count: usize) -> Vec<f32> {
    // SAFETY: the fake GPU's memory is the host's, and was made with so many.
    unsafe { std::slice::from_raw_parts(buffer.data.cast::<f32>(), count) }.to_vec()
}

fn constant(buffer: forge_buffer) -> forge_const_buffer {
    forge_const_buffer { data: buffer.data, bytes: buffer.bytes }
}

/// `rank`'s numbers of some kind.
fn numbers(kind: u64, rank: u64, count: u64) -> Vec<f32> {
    (0..count).map(|i| (1000 * kind + 100 * rank + i) as f32).collect()
}

fn context(backend: forge_backend) -> *mut forge_context {
    let mut config: forge_context_config = sized();
    config.backend = backend as u32;
    let cache = std::ffi::CString::new(std::env::var("FORGE_TEST_CACHE").unwrap()).unwrap();
    config.cache_dir = cache.as_ptr();
    let mut context = null_mut();
    // SAFETY: structs and handles are live; the workspace is memory of the fake GPU.
    unsafe {
        ok(forge_context_new(&config, &mut context));
        let mut bytes = 0;
        ok(forge_context_workspace_bytes(context, &mut bytes));
        if bytes > 0 {
            ok(forge_context_set_workspace(context, device(&vec![0.0; bytes as usize / 4])));
        }
    }
    context
}

fn unique_id() -> [u8; 128] {
    let mut id = [0u8; 128];
    // SAFETY: 128 bytes.
    ok(unsafe { forge_nccl_unique_id(id.as_mut_ptr()) });
    id
}

fn nccl_config(id: [u8; 128], rank: u64, size: u64, timeout_ms: u32) -> forge_nccl_config {
    let mut config: forge_nccl_config = sized();
    (config.id, config.timeout_ms) = (id, timeout_ms);
    (config.rank, config.size) = (rank as u32, size as u32);
    config
}

fn join(
    context: *mut forge_context,
    config: &forge_nccl_config,
) -> (forge_status, *mut forge_comm) {
    let mut comm = null_mut();
    // SAFETY: structs and handles are live.
    (unsafe { forge_comm_new_nccl(context, config, &mut comm) }, comm)
}

/// Runs `work(rank, context, communicator)` on a thread for each rank.
fn on_all_ranks(timeout_ms: u32, work: impl Fn(u64, *mut forge_context, *mut forge_comm) + Sync) {
    let (id, work, ready) = (unique_id(), &work, &Barrier::new(RANKS as usize));
    thread::scope(|scope| {
        for rank in 0..RANKS {
            scope.spawn(move || {
                let context = context(forge_backend::FORGE_BACKEND_CUDA);
                ready.wait();
                let (status, comm) = join(context, &nccl_config(id, rank, RANKS, timeout_ms));
                ok(status);
                work(rank, context, comm);
                // SAFETY: freed once.
                unsafe { forge_comm_free(comm) };
            });
        }
    });
}

/// What the fakes have noted.
fn log() -> String {
    std::fs::read_to_string(std::env::var("FAKE_CUDA_LOG").unwrap()).unwrap_or_default()
}

/// What streams got from this thread, in order: what, and on which stream.
fn order() -> Vec<(String, String)> {
    let own = std::fs::read_link("/proc/thread-self").unwrap();
    let own = own.file_name().unwrap().to_str().unwrap();
    let text = log();
    let lines = text.lines().filter_map(|l| l.strip_prefix("order "));
    let mut out = Vec::new();
    for line in lines {
        let words: Vec<&str> = line.split(' ').collect();
        if words[0] == own {
            out.push((words[1].to_string(), words[words.len() - 1].to_string()));
        }
    }
    out
}

/// A call that keeps factors, and the buffers that it writes.
struct Backward {
    call: forge_backward,
    linear: *mut forge_linear,
    dx: forge_buffer,
    workspace: forge_buffer,
    // What the call points to.
    _parameter: Box<forge_parameter>,
}

fn backward(
    rank: u64,
    context: *mut forge_context,
    comm: *mut forge_comm,
    parallel: forge_parallel,
    sequence: bool,
) -> Backward {
    let mut config: forge_linear_config = sized();
    config.factor_dtype = forge_dtype::FORGE_DTYPE_F32 as u32;
    (config.out_features, config.in_features) = (ROWS, COLS);
    (config.parallel, config.sequence_parallel) = (parallel as u32, u32::from(sequence));
    let column = parallel as u32 == forge_parallel::FORGE_PARALLEL_COLUMN as u32;
    config.reduce_dgrad = u32::from(column && !sequence);
    config.rule = c"sgd".as_ptr();
    let (mut linear, mut layout): (_, forge_layout) = (null_mut(), sized());
    let mut bytes = 0;
    // SAFETY: handles and structs are live.
    unsafe {
        ok(forge_linear_new(context, comm, &config, &mut linear));
        ok(forge_linear_layout(linear, &mut layout));
        ok(forge_linear_workspace(linear, KEEP, TOKENS, &mut bytes));
    }
    let (out, inn) = (layout.out_local, layout.in_local);
    let rows_of = |gathers: bool| if sequence && gathers { TOKENS / RANKS } else { TOKENS };
    let (dy_rows, x_rows) = (rows_of(!column), rows_of(column));
    let mut parameter: Box<forge_parameter> = Box::new(sized());
    parameter.weight = device(&vec![0.0; (out * inn) as usize]);
    let mut call: forge_backward = sized();
    call.mode = forge_backward_mode::FORGE_BACKWARD_KEEP as u32;
    call.tokens = TOKENS;
    call.dy = constant(device(&numbers(1, rank, dy_rows * out)));
    call.x = constant(device(&numbers(2, rank, x_rows * inn)));
    // The fake GPU multiplies nothing: what is here is what is reduced.
    call.dx = device(&numbers(3, rank, x_rows * inn));
    call.workspace = device(&numbers(4, rank, bytes / 4));
    call.parameter = &*parameter;
    let (dx, workspace) = (call.dx, call.workspace);
    Backward { call, linear, dx, workspace, _parameter: parameter }
}

impl Backward {
    fn run(&self) -> forge_status {
        // SAFETY: handles and structs are live, buffers have their sizes.
        unsafe { forge_linear_backward(self.linear, &self.call, null_mut(), null_mut()) }
    }
}

impl Drop for Backward {
    fn drop(&mut self) {
        // SAFETY: freed once.
        unsafe { forge_linear_free(self.linear) };
    }
}

/// What streams get for one operation: it follows the caller's, which follows it at the next wait.
fn operation(name: &str) -> [&str; 3] {
    ["record", "wait", name]
}

#[test]
#[ignore = "run by shards_are_gathered_and_reduced_between_ranks"]
fn gather_and_reduce() {
    use forge_parallel::*;
    on_all_ranks(10_000, |rank, context, comm| {
        let places: Vec<u64> = (0..RANKS).collect();
        let all = |kind, count| -> Vec<f32> {
            places.iter().flat_map(|r| numbers(kind, *r, count)).collect()
        };
        let what = |from: usize| -> Vec<String> {
            order().split_off(from).into_iter().map(|(what, _)| what).collect()
        };
        let product = ["forge_exact"];
        let led = ["record", "wait"];

        // Column + SP: X is gathered while dX is computed, then dX is scattered.
        let column = backward(rank, context, comm, FORGE_PARALLEL_COLUMN, true);
        let before = order().len();
        ok(column.run());
        let shard = TOKENS / RANKS * COLS;
        let gathered = floats(column.workspace, (TOKENS * COLS) as usize);
        assert_eq!(gathered, all(2, shard));
        // This rank's part of dX, which lies at the end of the workspace.
        let first = column.workspace.bytes / 4 - TOKENS * COLS;
        let sum = |i: u64| -> f32 {
            let at = first + rank * shard + i;
            places.iter().map(|r| numbers(4, *r, at + 1)[at as usize]).sum()
        };
        let scattered: Vec<f32> = (0..shard).map(sum).collect();
        assert_eq!(floats(column.dx, shard as usize), scattered);
        let (gather, scatter) = (operation("ncclAllGather"), operation("ncclReduceScatter"));
        let expected = [&gather[..], &product, &led, &scatter, &led].concat();
        assert_eq!(what(before), expected);
        // The product is on the caller's stream, the collectives on one of their own, in turns.
        let streams: Vec<String> = order().split_off(before).into_iter().map(|(_, s)| s).collect();
        let (mine, side) = (&streams[0], &streams[1]);
        assert_ne!(mine, side);
        let on: Vec<&String> =
            [mine, side, side, mine, side, mine, mine, side, side, side, mine].to_vec();
        assert_eq!(streams.iter().collect::<Vec<_>>(), on);

        // Row + SP: dY is gathered before dX can be computed.
        let row = backward(rank, context, comm, FORGE_PARALLEL_ROW, true);
        let before = order().len();
        ok(row.run());
        let gathered = floats(row.workspace, (TOKENS * ROWS) as usize);
        assert_eq!(gathered, all(1, TOKENS / RANKS * ROWS));
        assert_eq!(what(before), [&gather[..], &led, &product].concat());

        // Column without SP: dX is summed in place.
        let column = backward(rank, context, comm, FORGE_PARALLEL_COLUMN, false);
        let before = order().len();
        ok(column.run());
        let count = TOKENS * COLS;
        let total: Vec<f32> = (0..count as usize)
            .map(|i| places.iter().map(|r| numbers(3, *r, count)[i]).sum())
            .collect();
        assert_eq!(floats(column.dx, count as usize), total);
        let reduce = operation("ncclAllReduce");
        assert_eq!(what(before), [&product[..], &reduce, &led].concat());
        // SAFETY: a live communicator.
        ok(unsafe { forge_comm_check(comm) });
    });
    let ends = order_of_all("destroy");
    assert_eq!(ends, RANKS as usize);
}

#[test]
#[ignore = "run by factors_are_exchanged_between_replicas"]
fn exchange() {
    on_all_ranks(10_000, |rank, context, replicas| {
        let mut solo = null_mut();
        let mut config: forge_linear_config = sized();
        config.factor_dtype = forge_dtype::FORGE_DTYPE_F32 as u32;
        (config.out_features, config.in_features) = (ROWS, COLS);
        config.rule = c"sgd".as_ptr();
        let (mut linear, mut layout): (_, forge_layout) = (null_mut(), sized());
        let reduction = forge_reduction::FORGE_REDUCTION_EXCHANGE as u32;
        let mut bytes = 0;
        // SAFETY: handles and structs are live.
        unsafe {
            ok(forge_comm_new_solo(context, &mut solo));
            let (config, out) = (&config, &mut linear);
            ok(forge_linear_new_data_parallel(context, solo, replicas, reduction, 1, config, out));
            ok(forge_linear_layout(linear, &mut layout));
            ok(forge_linear_workspace(linear, KEEP, TOKENS, &mut bytes));
        }
        let owned = ROWS / RANKS;
        assert_eq!((layout.out_local, layout.out_owned), (ROWS, owned));
        assert_eq!(layout.owned_offset, rank * owned);
        assert_eq!(layout.states[0].bytes, 0);
        assert_eq!((layout.weight.rows, layout.accumulator.rows), (ROWS, owned));
        let mut parameter: Box<forge_parameter> = Box::new(sized());
        parameter.weight = device(&numbers(5, rank, ROWS * COLS));
        let mut call: forge_backward = sized();
        call.mode = forge_backward_mode::FORGE_BACKWARD_KEEP as u32;
        call.tokens = TOKENS;
        call.dy = constant(device(&numbers(1, rank, TOKENS * ROWS)));
        call.x = constant(device(&numbers(2, rank, TOKENS * COLS)));
        call.dx = device(&numbers(3, rank, TOKENS * COLS));
        call.workspace = device(&vec![0.0; bytes as usize / 4]);
        call.parameter = &*parameter;
        let before = order().len();
        // SAFETY: handles and structs are live, buffers have their sizes.
        ok(unsafe { forge_linear_backward(linear, &call, null_mut(), null_mut()) });
        // What is sent is put in order, then both go while dX is computed, which the update would come after.
        let copies = vec!["copy"; RANKS as usize];
        let (to_owners, gather) = (operation("ncclGroupEnd"), operation("ncclAllGather"));
        let expected: Vec<&str> =
            [&copies[..], &to_owners, &gather, &["forge_exact", "record", "wait"]].concat();
        let log = order().split_off(before);
        let what: Vec<&str> = log.iter().map(|(what, _)| what.as_str()).collect();
        assert_eq!(what, expected);
        // X of all, then dY of all for the owned rows.
        let x = (RANKS * TOKENS * COLS) as usize;
        let all = floats(call.workspace, bytes as usize / 4);
        let gathered: Vec<f32> = (0..RANKS).flat_map(|r| numbers(2, r, TOKENS * COLS)).collect();
        assert_eq!(all[..x], gathered);
        let dy = x.next_multiple_of(64);
        let columns = |r: u64| -> Vec<f32> {
            let whole = numbers(1, r, TOKENS * ROWS);
            let row = |t: u64| {
                let first = (t * ROWS + rank * owned) as usize;
                whole[first..first + owned as usize].to_vec()
            };
            (0..TOKENS).flat_map(row).collect()
        };
        let received: Vec<f32> = (0..RANKS).flat_map(columns).collect();
        assert_eq!(all[dy..dy + received.len()], received);
        // W from the owners of its rows.
        // SAFETY: as above.
        unsafe {
            ok(forge_linear_gather_weight(linear, parameter.weight, null_mut()));
            ok(forge_comm_wait(replicas, null_mut()));
        }
        let own = |r: u64| {
            let all = numbers(5, r, ROWS * COLS);
            all[(r * owned * COLS) as usize..((r + 1) * owned * COLS) as usize].to_vec()
        };
        let weight: Vec<f32> = (0..RANKS).flat_map(own).collect();
        assert_eq!(floats(parameter.weight, (ROWS * COLS) as usize), weight);
        // SAFETY: freed once.
        unsafe {
            forge_linear_free(linear);
            forge_comm_free(solo);
        }
    });
}

/// How often any thread did this.
fn order_of_all(what: &str) -> usize {
    log().lines().filter(|l| l.starts_with("order ") && l.contains(what)).count()
}

#[test]
#[ignore = "run by a_rank_that_does_not_come_is_told_of"]
fn rank_is_missing() {
    let context = context(forge_backend::FORGE_BACKEND_CUDA);
    let begin = Instant::now();
    let (status, _) = join(context, &nccl_config(unique_id(), 1, 2, 150));
    let parts = ["rank 1 of 2: ncclCommInitRankConfig: not done after 0.1 s", "missing"];
    fails(status, FORGE_ERROR_COLLECTIVE, &parts);
    assert!(begin.elapsed() >= Duration::from_millis(150));
    assert_eq!(order_of_all("abort"), 1);
    let (status, _) = join(context, &nccl_config(unique_id(), 2, 2, 0));
    fails(status, FORGE_ERROR_RANK, &["rank: 2 is not below size 2"]);
    let (status, _) = join(context, &nccl_config(unique_id(), 0, 0, 0));
    fails(status, FORGE_ERROR_RANK, &["size 0"]);
}

#[test]
#[ignore = "run by a_rank_that_is_lost_ends_in_an_error"]
fn rank_is_lost() {
    let context = context(forge_backend::FORGE_BACKEND_CUDA);
    let (status, comm) = join(context, &nccl_config(unique_id(), 0, 1, 0));
    ok(status);
    // SAFETY: a live communicator; no other thread reads the environment.
    unsafe {
        ok(forge_comm_check(comm));
        std::env::set_var("FAKE_NCCL_ASYNC_ERROR", "6");
        let parts = ["rank 0 of 1", "remote process exited", "socket closed", "resume"];
        fails(forge_comm_check(comm), FORGE_ERROR_COLLECTIVE, &parts);
        assert_eq!(order_of_all("abort"), 1);
        // It stays broken, and is not touched any more.
        std::env::set_var("FAKE_NCCL_ASYNC_ERROR", "0");
        fails(forge_comm_check(comm), FORGE_ERROR_COLLECTIVE, &parts);
        forge_comm_free(comm);
    }
    assert_eq!((order_of_all("abort"), order_of_all("destroy")), (1, 0));
}

#[test]
#[ignore = "run by a_collective_that_does_not_end_is_told_of"]
fn rank_is_stuck() {
    on_all_ranks(400, |rank, context, comm| {
        let b = backward(rank, context, comm, forge_parallel::FORGE_PARALLEL_COLUMN, false);
        // Compiles a kernel first.
        ok(b.run());
        let begin = Instant::now();
        // SAFETY: a live communicator.
        let look = || unsafe { forge_comm_check(comm) };
        while begin.elapsed() < Duration::from_millis(200) {
            ok(look());
        }
        thread::sleep(Duration::from_millis(300));
        let parts = ["a collective is not done after 0.4 s", "stuck"];
        fails(look(), FORGE_ERROR_COLLECTIVE, &parts);
        fails(b.run(), FORGE_ERROR_COLLECTIVE, &parts);
    });
    assert_eq!((order_of_all("abort"), order_of_all("destroy")), (RANKS as usize, 0));
}

#[test]
#[ignore = "run by nothing_enqueued_is_never_late"]
fn rank_is_idle() {
    let context = context(forge_backend::FORGE_BACKEND_CUDA);
    let (status, comm) = join(context, &nccl_config(unique_id(), 0, 1, 50));
    ok(status);
    thread::sleep(Duration::from_millis(100));
    let mut borrowed = null_mut();
    // SAFETY: handles are live.
    unsafe {
        ok(forge_comm_check(comm));
        let status = forge_comm_borrow_nccl(context, null_mut(), 0, &mut borrowed);
        fails(status, FORGE_ERROR_NULL, &["nccl_comm"]);
        forge_comm_free(comm);
    }
    assert_eq!((order_of_all("abort"), order_of_all("destroy")), (0, 1));
}

#[test]
#[ignore = "run by a_borrowed_communicator_is_left_to_its_owner"]
fn borrow() {
    let library = forge::comm::nccl::Nccl::get().unwrap();
    let id = library.unique_id().unwrap();
    thread::scope(|scope| {
        for rank in 0..RANKS {
            let library = &library;
            scope.spawn(move || {
                let context = context(forge_backend::FORGE_BACKEND_CUDA);
                // SAFETY: the fake needs no context.
                let (_, handle) = unsafe { library.init(RANKS as i32, id, rank as i32) };
                // SAFETY: just made.
                while unsafe { library.async_error(handle) } != 0 {
                    thread::yield_now();
                }
                let mut comm = null_mut();
                // SAFETY: handles are live.
                ok(unsafe { forge_comm_borrow_nccl(context, handle, 0, &mut comm) });
                let b = backward(rank, context, comm, forge_parallel::FORGE_PARALLEL_ROW, true);
                ok(b.run());
                let gathered = floats(b.workspace, (TOKENS * ROWS) as usize);
                let shard = TOKENS / RANKS * ROWS;
                let all: Vec<f32> = (0..RANKS).flat_map(|r| numbers(1, r, shard)).collect();
                assert_eq!(gathered, all);
                // SAFETY: freed once.
                unsafe { forge_comm_free(comm) };
            });
        }
    });
    assert_eq!((order_of_all("abort"), order_of_all("destroy")), (0, 0));
}

#[test]
#[ignore = "run by what_is_wrong_with_the_library_is_said"]
fn say_what_is_wrong() {
    let parts = std::env::var("FORGE_TEST_PARTS").unwrap();
    let parts: Vec<&str> = parts.split('|').collect();
    let mut version = 0;
    // SAFETY: a live number.
    fails(unsafe { forge_nccl_version(&mut version) }, FORGE_ERROR_NO_NCCL, &parts);
    let mut id = [0u8; 128];
    // SAFETY: 128 bytes.
    fails(unsafe { forge_nccl_unique_id(id.as_mut_ptr()) }, FORGE_ERROR_NO_NCCL, &parts);
    // A context loads NVRTC, and beside it in pip's wheels there may be an NCCL.
    if !parts[0].contains("cannot be loaded") {
        let gpu = context(forge_backend::FORGE_BACKEND_CUDA);
        fails(join(gpu, &nccl_config(id, 0, 1, 0)).0, FORGE_ERROR_NO_NCCL, &parts);
    }
}

#[test]
#[ignore = "run by nccl_is_between_gpus"]
fn refuse_the_cpu() {
    let cpu = context(forge_backend::FORGE_BACKEND_CPU);
    let (status, _) = join(cpu, &nccl_config(unique_id(), 0, 1, 0));
    fails(status, FORGE_ERROR_UNSUPPORTED, &["FORGE_BACKEND_CPU", "forge_comm_new_host"]);
    let mut version = 0;
    // SAFETY: a live number.
    ok(unsafe { forge_nccl_version(&mut version) });
    assert_eq!(version, 22703);
}

/// An ignored test under the fake libraries.
fn child(root: &Path, test: &str) -> Command {
    build(root, "cuda.c", "libcuda.so", &[]);
    build(root, "cublaslt.c", "libcublasLt.so.13", &[]);
    let mut child = again(test, &[root]);
    child.env("FAKE_CUDA_CAPABILITY", "90").env("FAKE_CUDA_LOG", root.join("log"));
    child.env("FORGE_TEST_CACHE", root.join("cache")).env_remove("FORGE_NCCL");
    child
}

fn run(test: &str) {
    let root = directory(&format!("nccl-{test}"));
    build(&root, "nccl.c", "libnccl.so.2", &["-pthread"]);
    let mut child = child(&root, test);
    if !["gather_and_reduce", "exchange"].contains(&test) {
        child.env("FAKE_CUDA_BUSY", "1");
    }
    print!("{}", finish(&mut child));
}

#[test]
fn shards_are_gathered_and_reduced_between_ranks() {
    run("gather_and_reduce");
}

#[test]
fn factors_are_exchanged_between_replicas() {
    run("exchange");
}

#[test]
fn a_rank_that_does_not_come_is_told_of() {
    run("rank_is_missing");
}

#[test]
fn a_rank_that_is_lost_ends_in_an_error() {
    run("rank_is_lost");
}

#[test]
fn a_collective_that_does_not_end_is_told_of() {
    run("rank_is_stuck");
}

#[test]
fn nothing_enqueued_is_never_late() {
    run("rank_is_idle");
}

#[test]
fn a_borrowed_communicator_is_left_to_its_owner() {
    run("borrow");
}

#[test]
fn nccl_is_between_gpus() {
    run("refuse_the_cpu");
}

#[test]
fn what_is_wrong_with_the_library_is_said() {
    let wrong = |name: &str, make: &dyn Fn(&Path) -> Option<PathBuf>, parts: &str| {
        let root = directory(&format!("nccl-wrong-{name}"));
        let named = make(&root);
        let mut child = child(&root, "say_what_is_wrong");
        child.env("FORGE_TEST_PARTS", parts);
        if let Some(path) = named {
            child.env("FORGE_NCCL", path);
        }
        if name == "old" {
            child.env("FAKE_NCCL_VERSION", "21003");
        }
        print!("{}", finish(&mut child));
    };
    let missing = "libnccl.so.2 cannot be loaded|nvidia-nccl-cu13|FORGE_NCCL";
    wrong("missing", &|_| None, missing);
    let named = "/nowhere/libnccl.so.2|FORGE_NCCL";
    wrong("named", &|_| Some("/nowhere/libnccl.so.2".into()), named);
    let fake = |root: &Path| {
        build(root, "nccl.c", "libnccl.so.2", &["-pthread"]);
        None
    };
    wrong("old", &fake, "libnccl.so.2 is version 2.10.3|2.14.0 or newer");
    let other = |root: &Path| {
        build(root, "cublaslt.c", "libnccl.so.2", &[]);
        None
    };
    wrong("other", &other, "libnccl.so.2 has no ncclGetVersion|another library");
}
