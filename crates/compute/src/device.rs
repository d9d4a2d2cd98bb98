//! What this machine could compute with, in words.

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
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return "AVX2+FMA";
    }
    "scalar"
}
