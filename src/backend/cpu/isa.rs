//! The same loop for the instruction sets of the machine it runs on.
//!
//! Rust never contracts `a * b + c` into an fma, and `mul_add` is one everywhere, so the element-wise
//! results are the same bits at every level.

/// `multiversioned!(fn name[T: Bound](a: A, b: B) -> R = body);` defines `name`, which runs `body`
/// compiled for the best instruction set present. `body` must be `#[inline(always)]`, and so must
/// whatever should be vectorised inside it.
macro_rules! multiversioned {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $([$generic:ident: $bound:path])?
        ($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$meta])*
        $vis fn $name $(<$generic: $bound>)? ($($arg: $type),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512 $(<$generic: $bound>)? ($($arg: $type),*) $(-> $ret)? {
                    $body $(::<$generic>)? ($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2 $(<$generic: $bound>)? ($($arg: $type),*) $(-> $ret)? {
                    $body $(::<$generic>)? ($($arg),*)
                }
                if $crate::backend::cpu::isa::has_avx512() {
                    // SAFETY: the features were detected.
                    return unsafe { avx512 $(::<$generic>)? ($($arg),*) };
                }
                // Without `fma` a `mul_add` would be a call for each element.
                if std::arch::is_x86_feature_detected!("avx2")
                    && std::arch::is_x86_feature_detected!("fma")
                {
                    // SAFETY: the features were detected.
                    return unsafe { avx2 $(::<$generic>)? ($($arg),*) };
                }
            }
            $body $(::<$generic>)? ($($arg),*)
        }
    };
}
pub(crate) use multiversioned;

#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn has_avx512() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512bw")
        && std::arch::is_x86_feature_detected!("avx512dq")
        && std::arch::is_x86_feature_detected!("avx512vl")
}
