//! Errors, and the status numbers they become at the C ABI.

/// Every status a `forge_*` function returns, in numbered bands:
/// 0 success, 1xx the call's arguments, 2xx a user's rule, 3xx communication, 4xx backend, 9xx internal.
///
/// An error in the 1xx band means that nothing was written.
#[allow(non_camel_case_types)]
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum forge_status {
    /// Success.
    FORGE_OK = 0,
    /// A pointer that must not be NULL is NULL: pass it.
    FORGE_ERROR_NULL = 100,
    /// A pointer is not aligned for the element or struct that it points to: align it.
    FORGE_ERROR_MISALIGNED = 101,
    /// A buffer's size is not what the shapes and formats need: ask forge_linear_layout,
    /// forge_linear_workspace or forge_context_workspace_bytes.
    FORGE_ERROR_BUFFER_SIZE = 102,
    /// A size computed from the arguments does not fit 63 bits: check the dimensions.
    FORGE_ERROR_OVERFLOW = 103,
    /// A scalar is NaN, infinite or out of the rule's range, or a step is 0: check the step's scalars; skip
    /// the step if the norm is not finite.
    FORGE_ERROR_SCALAR = 104,
    /// An enum's value is not one of this version's, or a flag is neither 0 nor 1: the message lists the
    /// known ones.
    FORGE_ERROR_ENUM = 105,
    /// Features or, under sequence parallelism, tokens do not divide by the ranks: pad them.
    FORGE_ERROR_SHARD = 106,
    /// A struct's `struct_size` is not this version's: set it, and build against this library's header.
    FORGE_ERROR_STRUCT_SIZE = 107,
    /// A buffer that is written overlaps another one of the call: separate them.
    FORGE_ERROR_OVERLAP = 108,
    /// No rule of that name, or a flag that it does not take: the message lists what there is.
    FORGE_ERROR_RULE = 109,
    /// Each argument is valid, the combination is not supported: the message says which, and what instead.
    FORGE_ERROR_UNSUPPORTED = 110,
    /// The stream is not one of this backend's: on the CPU it is NULL.
    FORGE_ERROR_STREAM = 111,
    /// A dimension, a stride or a device's ordinal is out of range.
    FORGE_ERROR_SHAPE = 112,
    /// The rule has no state of that index: see `n_states` of forge_layout.
    FORGE_ERROR_STATE_INDEX = 113,
    /// The CUDA context was lent no workspace: call forge_context_set_workspace first.
    FORGE_ERROR_WORKSPACE = 114,
    /// Memory that the backend cannot reach, the host's where a GPU's is due: copy it there.
    FORGE_ERROR_MEMORY = 115,
    /// The CPU function of a user's rule reported failure. Its tile is as it was; others may be updated.
    FORGE_ERROR_RULE_FUNCTION = 200,
    /// A collective failed: the caller's own, whose reasons are there, or NCCL's, which is given up after a failure
    /// or its timeout. forge_linear_backward says what has changed.
    FORGE_ERROR_COLLECTIVE = 300,
    /// Rank and size do not fit each other: rank is below size, size is at least 1.
    FORGE_ERROR_RANK = 301,
    /// NCCL is missing, too old, or lacks a function: the message says what was found where.
    FORGE_ERROR_NO_NCCL = 302,
    /// The backend asked for is not to be had here, no driver, no GPU, or one of them too old: the message
    /// says which; or use the CPU.
    FORGE_ERROR_NO_BACKEND = 400,
    /// The thread pool could not be started: ask for fewer threads.
    FORGE_ERROR_THREADS = 401,
    /// A call of the driver or of cuBLASLt failed, or cuBLASLt is missing; work enqueued before may be lost.
    /// The message has the call and CUDA's text.
    FORGE_ERROR_DEVICE = 402,
    /// NVRTC is missing (`pip install nvidia-cuda-nvrtc`), or does not compile a kernel: the message has its
    /// log.
    FORGE_ERROR_COMPILE = 403,
    /// The directory of compiled kernels is refused or cannot be written, in a call that is made to fill it:
    /// the message says why.
    FORGE_ERROR_CACHE = 404,
    /// A defect of FORGE, a panic that was caught at the C boundary: report it with the message.
    FORGE_ERROR_PANIC = 900,
}

use forge_status as S;

impl forge_status {
    /// All statuses, for tables and tests.
    pub const ALL: &[forge_status] = &[
        S::FORGE_OK,
        S::FORGE_ERROR_NULL,
        S::FORGE_ERROR_MISALIGNED,
        S::FORGE_ERROR_BUFFER_SIZE,
        S::FORGE_ERROR_OVERFLOW,
        S::FORGE_ERROR_SCALAR,
        S::FORGE_ERROR_ENUM,
        S::FORGE_ERROR_SHARD,
        S::FORGE_ERROR_STRUCT_SIZE,
        S::FORGE_ERROR_OVERLAP,
        S::FORGE_ERROR_RULE,
        S::FORGE_ERROR_UNSUPPORTED,
        S::FORGE_ERROR_STREAM,
        S::FORGE_ERROR_SHAPE,
        S::FORGE_ERROR_STATE_INDEX,
        S::FORGE_ERROR_WORKSPACE,
        S::FORGE_ERROR_MEMORY,
        S::FORGE_ERROR_RULE_FUNCTION,
        S::FORGE_ERROR_COLLECTIVE,
        S::FORGE_ERROR_RANK,
        S::FORGE_ERROR_NO_NCCL,
        S::FORGE_ERROR_NO_BACKEND,
        S::FORGE_ERROR_THREADS,
        S::FORGE_ERROR_DEVICE,
        S::FORGE_ERROR_COMPILE,
        S::FORGE_ERROR_CACHE,
        S::FORGE_ERROR_PANIC,
    ];

    /// The enumerator's name, NUL-terminated for C.
    pub fn name(self) -> &'static std::ffi::CStr {
        match self {
            S::FORGE_OK => c"FORGE_OK",
            S::FORGE_ERROR_NULL => c"FORGE_ERROR_NULL",
            S::FORGE_ERROR_MISALIGNED => c"FORGE_ERROR_MISALIGNED",
            S::FORGE_ERROR_BUFFER_SIZE => c"FORGE_ERROR_BUFFER_SIZE",
            S::FORGE_ERROR_OVERFLOW => c"FORGE_ERROR_OVERFLOW",
            S::FORGE_ERROR_SCALAR => c"FORGE_ERROR_SCALAR",
            S::FORGE_ERROR_ENUM => c"FORGE_ERROR_ENUM",
            S::FORGE_ERROR_SHARD => c"FORGE_ERROR_SHARD",
            S::FORGE_ERROR_STRUCT_SIZE => c"FORGE_ERROR_STRUCT_SIZE",
            S::FORGE_ERROR_OVERLAP => c"FORGE_ERROR_OVERLAP",
            S::FORGE_ERROR_RULE => c"FORGE_ERROR_RULE",
            S::FORGE_ERROR_UNSUPPORTED => c"FORGE_ERROR_UNSUPPORTED",
            S::FORGE_ERROR_STREAM => c"FORGE_ERROR_STREAM",
            S::FORGE_ERROR_SHAPE => c"FORGE_ERROR_SHAPE",
            S::FORGE_ERROR_STATE_INDEX => c"FORGE_ERROR_STATE_INDEX",
            S::FORGE_ERROR_WORKSPACE => c"FORGE_ERROR_WORKSPACE",
            S::FORGE_ERROR_MEMORY => c"FORGE_ERROR_MEMORY",
            S::FORGE_ERROR_RULE_FUNCTION => c"FORGE_ERROR_RULE_FUNCTION",
            S::FORGE_ERROR_COLLECTIVE => c"FORGE_ERROR_COLLECTIVE",
            S::FORGE_ERROR_RANK => c"FORGE_ERROR_RANK",
            S::FORGE_ERROR_NO_NCCL => c"FORGE_ERROR_NO_NCCL",
            S::FORGE_ERROR_NO_BACKEND => c"FORGE_ERROR_NO_BACKEND",
            S::FORGE_ERROR_THREADS => c"FORGE_ERROR_THREADS",
            S::FORGE_ERROR_DEVICE => c"FORGE_ERROR_DEVICE",
            S::FORGE_ERROR_COMPILE => c"FORGE_ERROR_COMPILE",
            S::FORGE_ERROR_CACHE => c"FORGE_ERROR_CACHE",
            S::FORGE_ERROR_PANIC => c"FORGE_ERROR_PANIC",
        }
    }
}

/// What went wrong, naming the argument, its value and the way out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The number the C ABI returns.
    pub status: forge_status,
    /// One sentence for a person.
    pub message: String,
}

impl Error {
    /// An error of this status with this sentence.
    pub fn new(status: forge_status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }
}

/// The result of everything fallible in FORGE.
pub type Result<T> = std::result::Result<T, Error>;

/// `return Err(...)` with a status (short name) and a formatted sentence.
macro_rules! bail {
    ($status:ident, $($arg:tt)*) => {
        return Err($crate::error::Error::new(
            $crate::error::forge_status::$status,
            format!($($arg)*),
        ))
    };
}
pub(crate) use bail;
