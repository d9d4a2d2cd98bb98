//! What a process shows to Prometheus at `/metrics`: a page of metrics, the ones all processes have in common among them.
//!
//! A metric is either counted where something happens, in a [`Counter`], [`Seconds`] or [`Histogram`], which take atomics and
//! nothing else, or read at each scrape from where it is kept anyway ([`Page::gauge`], [`Page::total`]). Never counts twice.
//!
//! The crate is `prometheus` rather than `prometheus-client`: only the classic text format passes `promtool check metrics`.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::core::{Collector, Desc};
use prometheus::proto::{self, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{CounterVec, HistogramOpts, Opts, Registry, TextEncoder};

use crate::http::Health;

pub use prometheus::{
    Counter as Seconds, Histogram, HistogramVec as HistogramFamily, IntCounter as Counter,
    IntCounterVec as CounterFamily,
};

/// The format of [`Page::render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Upper bounds for times that people feel, in seconds: 1 ms to 60 s.
pub const LATENCIES: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Why nothing here fails: all names and labels are constants, and a test scrapes them all.
const DEFINED_ONCE: &str = "a metric has a valid name and is defined once";

/// A metric's name and what it means, one line.
pub type Named = (&'static str, &'static str);

/// The metrics of one process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Page {
    registry: Registry,
}

impl Page {
    /// The metrics of every process, for the one whose health is `health`.
    pub fn new(health: &Health) -> Self {
        let page = Self { registry: Registry::new() };
        let (role, id) = (health.role(), health.id().to_owned());
        let about = ("sirocco_build_info", "Always 1; the labels say which software runs as which node.");
        page.gauge(about, &["role", "node", "version"], move |samples| {
            samples.add(&[role, &id, env!("CARGO_PKG_VERSION")], 1.0);
        });
        let health = health.clone();
        page.gauge(("sirocco_ready", "1 while the process can do its work, else 0."), &[], move |samples| {
            samples.add(&[], if health.obstacle().is_none() { 1.0 } else { 0.0 });
        });
        process(&page);
        page
    }

    /// A counter.
    pub fn counter(&self, (name, help): Named) -> Counter {
        let counter = Counter::new(name, help).expect(DEFINED_ONCE);
        self.register(counter)
    }

    /// A counter for each of `series`, given by the values of `labels`, in order.
    pub fn counters<const N: usize>(
        &self,
        (name, help): Named,
        labels: [&str; N],
        series: impl IntoIterator<Item = [&'static str; N]>,
    ) -> Vec<Counter> {
        let family = self.register(CounterFamily::new(Opts::new(name, help), &labels).expect(DEFINED_ONCE));
        series.into_iter().map(|values| family.with_label_values(&values)).collect()
    }

    /// A family of counters whose series come and go.
    pub fn counter_family(&self, (name, help): Named, labels: &[&str]) -> CounterFamily {
        self.register(CounterFamily::new(Opts::new(name, help), labels).expect(DEFINED_ONCE))
    }

    /// A sum of seconds.
    pub fn seconds(&self, (name, help): Named) -> Seconds {
        self.register(Seconds::new(name, help).expect(DEFINED_ONCE))
    }

    /// A sum of seconds for each of `series`, given by the value of `label`, in order.
    pub fn seconds_by<const N: usize>(
        &self,
        (name, help): Named,
        label: &str,
        series: [&'static str; N],
    ) -> [Seconds; N] {
        let family = self.register(CounterVec::new(Opts::new(name, help), &[label]).expect(DEFINED_ONCE));
        series.map(|value| family.with_label_values(&[value]))
    }

    /// A histogram with these upper bounds.
    pub fn histogram(&self, (name, help): Named, bounds: &[f64]) -> Histogram {
        let options = HistogramOpts::new(name, help).buckets(bounds.to_vec());
        self.register(Histogram::with_opts(options).expect(DEFINED_ONCE))
    }

    /// A family of histograms whose series come and go.
    pub fn histogram_family(&self, (name, help): Named, labels: &[&str], bounds: &[f64]) -> HistogramFamily {
        let options = HistogramOpts::new(name, help).buckets(bounds.to_vec());
        self.register(HistogramFamily::new(options, labels).expect(DEFINED_ONCE))
    }

    /// A value that goes up and down, read at each scrape.
    pub fn gauge(&self, named: Named, labels: &[&'static str], read: impl Fn(&mut Samples) + Send + Sync + 'static) {
        self.read(MetricType::GAUGE, named, labels, read);
    }

    /// A count kept elsewhere, read at each scrape.
    pub fn total(&self, named: Named, labels: &[&'static str], read: impl Fn(&mut Samples) + Send + Sync + 'static) {
        self.read(MetricType::COUNTER, named, labels, read);
    }

    /// All metrics as they are now, in Prometheus' text format.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    fn read(
        &self,
        kind: MetricType,
        (name, help): Named,
        labels: &[&'static str],
        read: impl Fn(&mut Samples) + Send + Sync + 'static,
    ) {
        let names = labels.iter().map(|label| (*label).to_owned()).collect();
        let desc = Desc::new(name.to_owned(), help.to_owned(), names, HashMap::new()).expect(DEFINED_ONCE);
        self.register(Reading { desc, kind, labels: labels.into(), read: Arc::new(read) });
    }

    fn register<M: Collector + Clone + 'static>(&self, metric: M) -> M {
        self.registry.register(Box::new(metric.clone())).expect(DEFINED_ONCE);
        metric
    }
}

/// What a metric that is read at each scrape shows.
#[derive(Debug)]
pub struct Samples {
    kind: MetricType,
    labels: Arc<[&'static str]>,
    metrics: Vec<Metric>,
}

impl Samples {
    /// The series with these label values, one for each label, is at `value`.
    pub fn add(&mut self, values: &[&str], value: f64) {
        let labels = self.labels.iter().zip(values).map(|(name, value)| {
            let mut label = LabelPair::default();
            label.set_name((*name).to_owned());
            label.set_value((*value).to_owned());
            label
        });
        let mut metric = Metric::from_label(labels.collect());
        if self.kind == MetricType::COUNTER {
            let mut counter = proto::Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = proto::Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        self.metrics.push(metric);
    }
}

/// A metric that is read at each scrape.
#[derive(Clone)]
struct Reading {
    desc: Desc,
    kind: MetricType,
    labels: Arc<[&'static str]>,
    read: Arc<dyn Fn(&mut Samples) + Send + Sync>,
}

impl Collector for Reading {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut samples = Samples { kind: self.kind, labels: Arc::clone(&self.labels), metrics: Vec::new() };
        (self.read)(&mut samples);
        let mut family = MetricFamily::default();
        family.set_name(self.desc.fq_name.clone());
        family.set_help(self.desc.help.clone());
        family.set_field_type(self.kind);
        family.set_metric(samples.metrics);
        vec![family]
    }
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reading").field(&self.desc).finish()
    }
}

/// What the system says of this process, under the names that every Prometheus client uses.
fn process(page: &Page) {
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let cpu = ("process_cpu_seconds_total", "CPU time that the process has used, in seconds.");
    page.total(cpu, &[], move |samples| {
        if let Some(stat) = Stat::read() {
            samples.add(&[], stat.cpu_ticks as f64 / ticks);
        }
    });
    let resident = ("process_resident_memory_bytes", "Memory that the process has in RAM, in bytes.");
    page.gauge(resident, &[], |samples| {
        if let Some(stat) = Stat::read() {
            samples.add(&[], stat.resident_pages as f64 * rustix::param::page_size() as f64);
        }
    });
    page.gauge(("process_open_fds", "Files and sockets that the process has open."), &[], |samples| {
        if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
            // One of them is the folder itself.
            samples.add(&[], open.count().saturating_sub(1) as f64);
        }
    });
    let started = start_time(ticks);
    let start = ("process_start_time_seconds", "When the process started, in seconds since 1970.");
    page.gauge(start, &[], move |samples| {
        if let Some(started) = started {
            samples.add(&[], started);
        }
    });
}

/// When this process started, in seconds since 1970.
fn start_time(ticks: f64) -> Option<f64> {
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split(' ').next()?.parse().ok()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
    Some(now - uptime + Stat::read()?.start_ticks as f64 / ticks)
}

/// Of `/proc/self/stat`, what is shown. Source: proc_pid_stat(5).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    cpu_ticks: u64,
    /// After the system's start.
    start_ticks: u64,
    resident_pages: u64,
}

impl Stat {
    fn read() -> Option<Self> {
        Self::parse(&std::fs::read_to_string("/proc/self/stat").ok()?)
    }

    fn parse(stat: &str) -> Option<Self> {
        // The second field is the program's name in brackets, which may have spaces and brackets in it.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self { cpu_ticks: field(14)? + field(15)?, start_ticks: field(22)?, resident_pages: field(24)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Page {
        Page::new(&Health::new("coordinator", "c-0"))
    }

    #[test]
    fn what_is_counted_and_what_is_read_is_shown_with_help_and_type() {
        let page = page();
        page.counter(("sirocco_a_total", "A.")).inc_by(3);
        page.total(("sirocco_b_total", "B."), &["layer"], |samples| samples.add(&["1"], 7.0));
        let text = page.render().unwrap();
        for line in [
            "# HELP sirocco_a_total A.\n# TYPE sirocco_a_total counter\nsirocco_a_total 3\n",
            "# HELP sirocco_b_total B.\n# TYPE sirocco_b_total counter\nsirocco_b_total{layer=\"1\"} 7\n",
            "# TYPE sirocco_ready gauge\nsirocco_ready 0\n",
            "sirocco_build_info{role=\"coordinator\",node=\"c-0\",version=\"",
        ] {
            assert!(text.contains(line), "{line:?} is not in:\n{text}");
        }
    }

    #[test]
    fn the_process_says_what_it_uses() {
        let text = page().render().unwrap();
        let value = |name: &str| -> f64 {
            text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).expect("it is shown")
        };
        assert!(value("process_resident_memory_bytes ") > 1e5);
        assert!(value("process_open_fds ") >= 3.0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let age = now - value("process_start_time_seconds ");
        assert!((-1.0..86400.0).contains(&age), "{age} s");
    }

    #[test]
    fn a_programs_name_may_have_spaces_and_brackets() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4 1 0 0 0 250 50 0 0 20 0 9 0 1234 5000 42 18446744073709551615";
        assert_eq!(Stat::parse(stat), Some(Stat { cpu_ticks: 300, start_ticks: 1234, resident_pages: 42 }));
        assert_eq!(Stat::parse("7 (a"), None);
    }
}
