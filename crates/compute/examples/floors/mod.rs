//! What a machine can do at best: how fast it reads memory and multiplies. Measured beside what is compared with it.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use sirocco_compute::Isa;

/// Bytes that are read: more than the caches near a core hold.
const BYTES: usize = 768 << 20;

/// Memory to read, in huge pages as weights are.
pub(crate) struct Memory(Vec<u64>);

impl Memory {
    pub(crate) fn new() -> Self {
        Self::of(BYTES)
    }

    /// As many bytes, each page used once.
    pub(crate) fn of(bytes: usize) -> Self {
        let len = bytes / size_of::<u64>();
        let mut words: Vec<u64> = Vec::with_capacity(len);
        #[cfg(target_os = "linux")]
        {
            let page = 4096;
            let start = words.as_mut_ptr().cast::<u8>();
            let skip = start.align_offset(page);
            // SAFETY: whole pages within the capacity just reserved; the advice changes no contents.
            let _ = unsafe {
                let bytes = bytes.saturating_sub(skip) / page * page;
                rustix::mm::madvise(start.add(skip).cast(), bytes, rustix::mm::Advice::LinuxHugepage)
            };
        }
        words.resize(len, 1);
        Self(words)
    }

    /// Bytes per second that `threads` threads read together, each its own part.
    pub(crate) fn read(&self, threads: usize, isa: Isa) -> f64 {
        let parts: Vec<&[u64]> = self.0.chunks(self.0.len() / threads).collect();
        let seconds = together(threads, |thread| {
            black_box(read(parts[thread], isa));
        });
        size_of_val(&*self.0) as f64 / seconds
    }
}

/// Floating-point operations per second that `threads` threads do together in registers.
pub(crate) fn multiply_adds(threads: usize, isa: Isa) -> f64 {
    const ROUNDS: usize = 1 << 23;
    let seconds = together(threads, |_| {
        black_box(fused(isa, ROUNDS));
    });
    (threads * ROUNDS * operations(isa)) as f64 / seconds
}

/// Seconds that `threads` threads, the caller among them, take to run `task` together.
fn together(threads: usize, task: impl Fn(usize) + Sync) -> f64 {
    let start = Barrier::new(threads);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (1..threads)
            .map(|thread| {
                let (start, task) = (&start, &task);
                scope.spawn(move || {
                    start.wait();
                    task(thread);
                })
            })
            .collect();
        start.wait();
        let since = Instant::now();
        task(0);
        for worker in workers {
            worker.join().expect("measuring does not panic");
        }
        since.elapsed().as_secs_f64()
    })
}

#[cfg(target_arch = "x86_64")]
use x86::{fused, operations, read};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _MM_HINT_T0, _mm_prefetch, _mm256_add_epi64, _mm256_extract_epi64, _mm256_fmadd_ps, _mm256_loadu_si256,
        _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm512_add_epi64, _mm512_fmadd_ps, _mm512_loadu_si512,
        _mm512_reduce_add_epi64, _mm512_reduce_add_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
    };
    use std::hint::black_box;

    use sirocco_compute::Isa;

    /// Sums that are kept at once: more than a multiplication takes cycles, on every multiplier.
    const SUMS: usize = 12;

    /// Streams that a thread reads at once.
    const STREAMS: usize = 4;

    pub(super) fn read(words: &[u64], isa: Isa) -> u64 {
        // SAFETY: `isa` is one this machine has.
        unsafe { if isa == Isa::Avx512 { read_avx512(words) } else { read_avx2(words) } }
    }

    pub(super) fn fused(isa: Isa, rounds: usize) -> f32 {
        // SAFETY: as above.
        unsafe { if isa == Isa::Avx512 { fused_avx512(rounds) } else { fused_avx2(rounds) } }
    }

    /// Of a round.
    pub(super) fn operations(isa: Isa) -> usize {
        SUMS * 2 * if isa == Isa::Avx512 { 16 } else { 8 }
    }

    #[target_feature(enable = "avx512f")]
    fn read_avx512(words: &[u64]) -> u64 {
        let mut sums = [_mm512_setzero_si512(); STREAMS];
        let stream = words.len() / STREAMS / 8 * 8;
        for at in (0..stream).step_by(8) {
            for (s, sum) in sums.iter_mut().enumerate() {
                // SAFETY: within the words: stream `s` has `stream` of them.
                let value = unsafe {
                    let line = words.as_ptr().add(s * stream + at);
                    _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(128).cast());
                    _mm512_loadu_si512(line.cast())
                };
                *sum = _mm512_add_epi64(*sum, value);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_epi64(sum).cast_unsigned()).sum()
    }

    #[target_feature(enable = "avx2")]
    fn read_avx2(words: &[u64]) -> u64 {
        let mut sums = [_mm256_setzero_si256(); STREAMS];
        let stream = words.len() / STREAMS / 8 * 8;
        for at in (0..stream).step_by(8) {
            for (s, sum) in sums.iter_mut().enumerate() {
                // SAFETY: within the words: stream `s` has `stream` of them.
                let (low, high) = unsafe {
                    let line = words.as_ptr().add(s * stream + at);
                    _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(128).cast());
                    (_mm256_loadu_si256(line.cast()), _mm256_loadu_si256(line.add(4).cast()))
                };
                *sum = _mm256_add_epi64(*sum, _mm256_add_epi64(low, high));
            }
        }
        sums.into_iter().map(|sum| _mm256_extract_epi64::<0>(sum).cast_unsigned()).sum()
    }

    #[target_feature(enable = "avx512f")]
    fn fused_avx512(rounds: usize) -> f32 {
        let (x, w) = (black_box(_mm512_set1_ps(0.5)), black_box(_mm512_set1_ps(1.5)));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(x, w, *sum);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[target_feature(enable = "avx2,fma")]
    fn fused_avx2(rounds: usize) -> f32 {
        let (x, w) = (black_box(_mm256_set1_ps(0.5)), black_box(_mm256_set1_ps(1.5)));
        let mut sums = [_mm256_setzero_ps(); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(x, w, *sum);
            }
        }
        sums.into_iter()
            .map(|sum| f32::from_bits(_mm256_extract_epi64::<0>(std::arch::x86_64::_mm256_castps_si256(sum)) as u32))
            .sum()
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn read(words: &[u64], _isa: Isa) -> u64 {
    words.iter().fold(0, |sum, word| sum.wrapping_add(*word))
}

#[cfg(not(target_arch = "x86_64"))]
fn fused(_isa: Isa, rounds: usize) -> f32 {
    let mut sums = [0.0_f32; 96];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = 0.5_f32.mul_add(1.5, *sum);
        }
    }
    sums.into_iter().sum()
}

#[cfg(not(target_arch = "x86_64"))]
fn operations(_isa: Isa) -> usize {
    96 * 2
}
