//! What this machine could compute with, in words.

use crate::Isa;

/// For example `AMD EPYC, AVX2+FMA, 2 threads`.
pub fn cpu_description(threads: usize) -> String {
    let plural = if threads == 1 { "" } else { "s" };
    format!("{}, {}, {threads} thread{plural}", cpu_name(), instructions())
}

fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

fn instructions() -> &'static str {
    match Isa::best() {
        Isa::Portable => "scalar",
        Isa::Neon => "NEON",
        Isa::Avx2 => "AVX2+FMA",
        Isa::Avx512 => "AVX-512",
    }
}
