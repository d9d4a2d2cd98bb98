//! Code that is compiled three times: as it is, and for the wide registers and the fused multiply-add of newer processors.

/// Defines a function that calls `$body`, which must be `#[inline(always)]`, as compiled for the machine it runs on. Rust never
/// reorders or fuses what is written, so it gives the bits that `$body` gives alone.
macro_rules! wide {
    ($(#[$attribute:meta])* $visibility:vis fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)? = $body:ident) => {
        $(#[$attribute])*
        $visibility fn $name($($arg: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                #[target_feature(enable = "avx512f,avx512vl,fma")]
                fn widest($($arg: $type),*) $(-> $result)? {
                    $body($($arg),*)
                }
                // SAFETY: AVX-512 was just found, and where it is there are fused multiply-adds.
                return unsafe { widest($($arg),*) };
            }
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                #[target_feature(enable = "avx2,fma")]
                fn widened($($arg: $type),*) $(-> $result)? {
                    $body($($arg),*)
                }
                // SAFETY: AVX2 and FMA were just found.
                return unsafe { widened($($arg),*) };
            }
            $body($($arg),*)
        }
    };
}

pub(crate) use wide;
