//! What nodes that compute have in common: the flags that choose a device, how a GPU is shown, and what happens when it is lost.

use std::path::PathBuf;

use sirocco_types::{DeviceChoice, GpuReadings};
use tokio_util::sync::CancellationToken;

use crate::http::Health;
use crate::metrics::{Named, Page};

/// What to compute with.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct DeviceArgs {
    /// What to compute with: cpu, an NVIDIA GPU by its number, or auto, which is the first GPU if it can be used, else the CPU
    #[arg(long, env = "SIROCCO_DEVICE", value_name = "cpu|cuda:N|auto", default_value_t)]
    pub device: DeviceChoice,
    /// NVIDIA's runtime compiler, libnvrtc.so, for GPUs [default: the system's]
    #[arg(long, env = "SIROCCO_NVRTC", value_name = "FILE")]
    pub nvrtc: Option<PathBuf>,
    /// Where to keep kernels compiled for GPUs [default: sirocco/kernels in the user's cache folder]
    #[arg(long, env = "SIROCCO_KERNEL_CACHE", value_name = "FOLDER")]
    pub kernel_cache: Option<PathBuf>,
    /// Launch a GPU's kernels one by one, also those that come again and again, which are CUDA graphs otherwise
    #[arg(long, env = "SIROCCO_NO_CUDA_GRAPHS")]
    pub no_cuda_graphs: bool,
}

impl DeviceArgs {
    /// The same as flags, for a node that is a process of its own.
    pub fn flags(&self) -> Vec<String> {
        let device = Some(("device", self.device.to_string()));
        let path = |name, path: &Option<PathBuf>| Some((name, path.as_ref()?.display().to_string()));
        let paths = [path("nvrtc", &self.nvrtc), path("kernel-cache", &self.kernel_cache)];
        let values = device.into_iter().chain(paths.into_iter().flatten());
        let no_graphs = self.no_cuda_graphs.then(|| "--no-cuda-graphs".to_owned());
        values.map(|(name, value)| format!("--{name}={value}")).chain(no_graphs).collect()
    }

    /// Where to keep compiled kernels: as told, else in the folder that the system has for what can be made again, if there is one.
    pub fn kernel_folder(&self) -> Option<PathBuf> {
        let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        self.kernel_cache.clone().or_else(|| {
            let caches = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
            Some(caches.join("sirocco/kernels"))
        })
    }
}

/// Puts on `page` how the GPU fares that `read` tells of; what it does not tell is not shown.
pub fn watch_gpu(page: &Page, read: impl Fn() -> Option<GpuReadings> + Clone + Send + Sync + 'static) {
    let gauge = |named: Named, value: fn(GpuReadings) -> f64| {
        let read = read.clone();
        page.gauge(named, &[], move |samples| {
            if let Some(readings) = read() {
                samples.add(&[], value(readings));
            }
        });
    };
    gauge(
        ("sirocco_gpu_utilisation_ratio", "Share of the last moments in which the GPU ran a kernel, 0 to 1."),
        |gpu| gpu.utilisation,
    );
    gauge(("sirocco_gpu_memory_bytes", "Memory of the GPU."), |gpu| gpu.memory_total_bytes as f64);
    gauge(("sirocco_gpu_memory_used_bytes", "Memory of the GPU that is in use, by whomever."), |gpu| {
        gpu.memory_bytes as f64
    });
    gauge(("sirocco_gpu_temperature_celsius", "Temperature of the GPU."), |gpu| gpu.temperature_celsius);
}

/// Has a node leave at once, by `leave`, when its device is `lost`: it can compute nothing any more.
pub async fn leave_when_lost(lost: CancellationToken, leave: CancellationToken, health: Health) {
    tokio::select! {
        () = lost.cancelled() => {
            tracing::error!("the device is lost; the node leaves");
            health.not_ready("the device is lost");
            leave.cancel();
        }
        () = leave.cancelled() => {}
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        device: DeviceArgs,
    }

    #[test]
    fn flags_say_all_of_it() {
        let all = DeviceArgs {
            device: DeviceChoice::Cuda(3),
            nvrtc: Some("libnvrtc.so".into()),
            kernel_cache: Some("kernels".into()),
            no_cuda_graphs: true,
        };
        let line = ["node".to_owned()].into_iter().chain(all.flags());
        assert_eq!(Line::try_parse_from(line).unwrap().device, all);
        // What is not told is not said; whoever runs the tests may have set it.
        assert_eq!(DeviceArgs::default().flags(), ["--device=cpu"]);
    }

    #[test]
    fn a_gpu_is_shown_as_documented_and_not_at_all_when_it_does_not_tell() {
        let shown = |readings: Option<GpuReadings>| {
            let page = Page::new(&Health::new("expert-node", "e"));
            watch_gpu(&page, move || readings);
            page.render().unwrap()
        };
        assert!(!shown(None).contains("sirocco_gpu_"));
        let readings =
            GpuReadings { utilisation: 0.5, memory_bytes: 7, memory_total_bytes: 9, temperature_celsius: 61.0 };
        let text = shown(Some(readings));
        let documented =
            std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/metrics.md")).unwrap();
        for (name, value) in [
            ("utilisation_ratio", "0.5"),
            ("memory_bytes", "9"),
            ("memory_used_bytes", "7"),
            ("temperature_celsius", "61"),
        ] {
            let name = format!("sirocco_gpu_{name}");
            assert!(text.contains(&format!("\n{name} {value}\n")), "{text}");
            let help = text.lines().find_map(|line| line.strip_prefix(&format!("# HELP {name} "))).unwrap();
            let row = format!("| `{name}` | gauge |  | {help} |");
            assert!(documented.lines().any(|line| line == row), "{row}");
        }
    }

    #[tokio::test]
    async fn a_node_whose_device_is_lost_leaves_and_one_that_leaves_waits_for_no_device() {
        let health = Health::new("expert-node", "e");
        let (lost, leave) = (CancellationToken::new(), CancellationToken::new());
        lost.cancel();
        leave_when_lost(lost, leave.clone(), health.clone()).await;
        assert!(leave.is_cancelled());
        leave_when_lost(CancellationToken::new(), leave, health).await;
    }
}
