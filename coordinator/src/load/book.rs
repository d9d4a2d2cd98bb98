//! What nodes report, turned into rates. Reads no clock: whoever keeps the book says how much time has passed.
//!
//! Two kinds of averages are kept, both exponentially weighted. Rates decay with time and say what happens now. Weights decay
//! only while there is traffic and say what the traffic looks like, so that an idle night does not undo a placement.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use sirocco_proto::Invalid;
use sirocco_store::ClusterState;
use sirocco_types::{Epoch, LayerId, LayerLoad, LoadCounters, LoadReport, ModelSpec, NodeId, NodeLoad, Role};

/// Rows that every node must have run on average in a layer before an imbalance is told from them.
const ROWS_PER_NODE: f64 = 16.0;

/// Routed tokens that each expert must have had on average in every layer before placements are made by their load.
pub(crate) const TOKENS_PER_EXPERT: f64 = 32.0;

/// How loaded the cluster is, by the leader's measurements.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct LoadSnapshot {
    /// By layer; empty while nothing is known.
    pub(crate) layers: Vec<LayerLoad>,
    pub(crate) nodes: BTreeMap<NodeId, NodeLoad>,
}

impl LoadSnapshot {
    /// As the store has it.
    pub(crate) fn stored(state: &ClusterState) -> Self {
        let layers = state.model().map_or(0, |model| model.spec.num_hidden_layers as u32);
        let layers: Option<Vec<LayerLoad>> =
            (0..layers).map(|layer| state.layer_load(LayerId(layer)).cloned()).collect();
        let nodes = state.node_loads().map(|(id, load)| (id.clone(), load.clone())).collect();
        Self { layers: layers.unwrap_or_default(), nodes }
    }

    /// Mean imbalance over the layers in which one is known; 0 when there is none.
    pub(crate) fn imbalance(&self) -> f64 {
        let known: Vec<f64> = self.layers.iter().map(|layer| layer.imbalance).filter(|&x| x > 0.0).collect();
        if known.is_empty() { 0.0 } else { known.iter().sum::<f64>() / known.len() as f64 }
    }
}

/// The measurements of one leadership.
#[derive(Debug)]
pub(crate) struct LoadBook {
    half_life: Duration,
    routers: HashMap<NodeId, Totals>,
    /// `[layers][experts]`
    tokens: Vec<Vec<Average>>,
    nodes: BTreeMap<NodeId, NodeBook>,
    /// The placement under which rows were counted.
    serving: Epoch,
    /// How long the book has been open.
    open_for: Duration,
}

/// A router's last report.
#[derive(Debug)]
struct Totals {
    incarnation: u64,
    tokens: Vec<Vec<u64>>,
}

/// What is known of one expert node.
#[derive(Debug)]
struct NodeBook {
    last: LoadReport,
    new: NodeCounts,
    busy: f64,
    queue: f64,
    batch_rows: f64,
    rows_per_s: f64,
    /// Rows by layer under the present placement.
    rows: Vec<Average>,
}

/// Counted since the last tick.
#[derive(Debug, Default)]
struct NodeCounts {
    time_us: u64,
    busy_us: u64,
    batches: u64,
    rows: u64,
}

/// A count with its two averages.
#[derive(Clone, Copy, Debug, Default)]
struct Average {
    new: f64,
    rate: f64,
    weight: f64,
}

impl Average {
    /// `kept` is what is left of the rate, `weight_kept` of the weight.
    fn tick(&mut self, seconds: f64, kept: f64, weight_kept: f64) {
        self.rate = self.rate * kept + (1.0 - kept) * self.new / seconds;
        self.weight = self.weight * weight_kept + self.new;
        self.new = 0.0;
    }
}

impl LoadBook {
    /// A book that goes on from what the store has.
    pub(crate) fn new(state: &ClusterState, spec: &ModelSpec, half_life: Duration) -> Self {
        let stored = |layer: LayerId| {
            let load = state.layer_load(layer).filter(|load| load.weight.len() == spec.num_local_experts);
            let Some(load) = load else { return vec![Average::default(); spec.num_local_experts] };
            let pairs = load.tokens_per_s.iter().chain(std::iter::repeat(&0.0)).zip(&load.weight);
            pairs.map(|(&rate, &weight)| Average { new: 0.0, rate, weight }).collect()
        };
        let tokens = spec.layers().map(stored).collect();
        Self {
            half_life,
            routers: HashMap::new(),
            tokens,
            nodes: BTreeMap::new(),
            serving: Epoch(0),
            open_for: Duration::ZERO,
        }
    }

    /// Takes in a report. The first one of a process that ran before the book was opened only says where its counters stand.
    ///
    /// Errors: `Invalid` when it does not fit the model.
    pub(crate) fn record(&mut self, report: LoadReport) -> Result<(), Invalid> {
        let (layers, experts) = (self.tokens.len(), self.tokens.first().map_or(0, Vec::len));
        let all_is_new = Duration::from_micros(report.uptime_us) <= self.open_for;
        match &report.counters {
            LoadCounters::Router { tokens } => {
                if tokens.len() != layers || tokens.iter().any(|layer| layer.len() != experts) {
                    let problem = format!("of {} layers, the model has {layers} of {experts} experts", tokens.len());
                    return Err(Invalid::new("router.layers", problem));
                }
                let nothing = vec![vec![0; experts]; layers];
                let last = self.routers.get(&report.node).filter(|last| last.incarnation == report.incarnation);
                if let Some(last) = last.map(|last| &last.tokens).or_else(|| all_is_new.then_some(&nothing)) {
                    for ((averages, now), before) in self.tokens.iter_mut().zip(tokens).zip(last) {
                        for ((average, now), before) in averages.iter_mut().zip(now).zip(before) {
                            average.new += now.saturating_sub(*before) as f64;
                        }
                    }
                }
                let totals = Totals { incarnation: report.incarnation, tokens: tokens.clone() };
                self.routers.insert(report.node, totals);
                Ok(())
            }
            LoadCounters::Expert { rows, .. } if rows.len() != layers => {
                Err(Invalid::new("expert.rows", format!("of {} layers, the model has {layers}", rows.len())))
            }
            LoadCounters::Expert { .. } => {
                match self.nodes.get_mut(&report.node) {
                    Some(node) if node.last.incarnation == report.incarnation => node.record(report),
                    _ => drop(self.nodes.insert(report.node.clone(), NodeBook::new(report, layers))),
                }
                Ok(())
            }
        }
    }

    /// Lets `passed` go by, and forgets nodes that have left `state`.
    pub(crate) fn tick(&mut self, passed: Duration, state: &ClusterState) {
        self.open_for += passed;
        let serving = state.serving().map_or(Epoch(0), |serving| serving.epoch);
        if serving != self.serving {
            self.serving = serving;
            for node in self.nodes.values_mut() {
                node.rows.fill(Average::default());
            }
        }
        self.nodes.retain(|id, _| state.member(Role::Expert, id).is_some());
        self.routers.retain(|id, _| state.member(Role::Router, id).is_some());
        let seconds = passed.as_secs_f64().max(1e-3);
        let kept = (-seconds / self.half_life.as_secs_f64().max(1e-3)).exp2();
        for layer in &mut self.tokens {
            let traffic: f64 = layer.iter().map(|average| average.new).sum();
            let weight: f64 = layer.iter().map(|average| average.weight).sum();
            // A trickle of tokens must not wear away what is known: then only as much decays as comes in.
            let enough = TOKENS_PER_EXPERT * layer.len() as f64;
            let least = if weight > enough { (enough - traffic).max(0.0) / weight } else { 1.0 };
            let weight_kept = if traffic > 0.0 { kept.max(least) } else { 1.0 };
            for average in layer {
                average.tick(seconds, kept, weight_kept);
            }
        }
        let rows_kept: Vec<f64> = (0..self.tokens.len())
            .map(|layer| self.nodes.values().any(|node| node.rows[layer].new > 0.0))
            .map(|traffic| if traffic { kept } else { 1.0 })
            .collect();
        for node in self.nodes.values_mut() {
            node.tick(seconds, kept, &rows_kept);
        }
    }

    /// What is known now. `leader` and `at_ms` sign it.
    pub(crate) fn snapshot(&self, state: &ClusterState, leader: &str, at_ms: u64) -> LoadSnapshot {
        let layers = self.tokens.iter().enumerate().map(|(layer, averages)| LayerLoad {
            tokens_per_s: averages.iter().map(|average| rounded(average.rate)).collect(),
            weight: averages.iter().map(|average| rounded(average.weight)).collect(),
            imbalance: rounded(self.imbalance(layer, state)),
            leader: leader.to_owned(),
            at_ms,
        });
        let nodes = self.nodes.iter().map(|(id, node)| (id.clone(), node.load(leader, at_ms)));
        LoadSnapshot { layers: layers.collect(), nodes: nodes.collect() }
    }

    /// Time of the slowest node over the mean of all that hold experts, by the rows they ran in `layer`.
    fn imbalance(&self, layer: usize, state: &ClusterState) -> f64 {
        let nodes: Vec<(f64, f64)> = self
            .nodes
            .iter()
            .map(|(id, node)| {
                let speed = state.member(Role::Expert, id).and_then(|member| member.speed).unwrap_or(100);
                (node.rows[layer].weight, f64::from(speed))
            })
            .collect();
        let (rows, speed) = nodes.iter().fold((0.0, 0.0), |(rows, speed), node| (rows + node.0, speed + node.1));
        if nodes.is_empty() || rows < ROWS_PER_NODE * nodes.len() as f64 {
            return 0.0;
        }
        let slowest = nodes.iter().map(|(rows, speed)| rows / speed).fold(0.0, f64::max);
        slowest / (rows / speed)
    }
}

impl NodeBook {
    fn new(first: LoadReport, layers: usize) -> Self {
        let (new, rows) = (NodeCounts::default(), vec![Average::default(); layers]);
        Self { last: first, new, busy: 0.0, queue: 0.0, batch_rows: 0.0, rows_per_s: 0.0, rows }
    }

    fn record(&mut self, report: LoadReport) {
        let before = std::mem::replace(&mut self.last, report);
        let (
            LoadCounters::Expert { busy_us, batches, rows, .. },
            LoadCounters::Expert { busy_us: b, batches: n, rows: r, .. },
        ) = (&self.last.counters, &before.counters)
        else {
            return;
        };
        self.new.time_us += self.last.uptime_us.saturating_sub(before.uptime_us);
        self.new.busy_us += busy_us.saturating_sub(*b);
        self.new.batches += batches.saturating_sub(*n);
        for ((average, now), before) in self.rows.iter_mut().zip(rows).zip(r) {
            let new = now.saturating_sub(*before);
            self.new.rows += new;
            average.new += new as f64;
        }
    }

    fn tick(&mut self, seconds: f64, kept: f64, rows_kept: &[f64]) {
        let new = std::mem::take(&mut self.new);
        let average = |old: f64, now: f64| old * kept + (1.0 - kept) * now;
        self.rows_per_s = average(self.rows_per_s, new.rows as f64 / seconds);
        if new.time_us > 0 {
            self.busy = average(self.busy, (new.busy_us as f64 / new.time_us as f64).min(1.0));
        }
        if let LoadCounters::Expert { queue, .. } = self.last.counters {
            self.queue = average(self.queue, f64::from(queue));
        }
        if new.batches > 0 {
            let rows = new.rows as f64 / new.batches as f64;
            self.batch_rows = if self.batch_rows > 0.0 { average(self.batch_rows, rows) } else { rows };
        }
        for (rows, weight_kept) in self.rows.iter_mut().zip(rows_kept) {
            rows.tick(seconds, kept, *weight_kept);
        }
    }

    fn load(&self, leader: &str, at_ms: u64) -> NodeLoad {
        let busy = rounded(self.busy);
        NodeLoad {
            busy,
            queue: rounded(self.queue),
            batch_rows: rounded(self.batch_rows),
            rows_per_s: rounded(self.rows_per_s),
            service_rows_per_s: if busy > 0.0 { rounded(self.rows_per_s / self.busy) } else { 0.0 },
            leader: leader.to_owned(),
            at_ms,
        }
    }
}

/// To three decimals: more would only make the store's values longer, and a rate that fades away reaches zero.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use sirocco_types::EpochRef;

    use super::*;
    use crate::testing::{self, Entries};

    const SECOND: Duration = Duration::from_secs(1);

    fn router(uptime_s: u64, tokens: [u64; 4]) -> LoadReport {
        let counters = LoadCounters::Router { tokens: vec![tokens.to_vec(); 2] };
        LoadReport { node: NodeId::new("r").unwrap(), incarnation: 1, uptime_us: uptime_s * 1_000_000, counters }
    }

    fn expert(node: &str, uptime_s: u64, busy_us: u64, rows: u64) -> LoadReport {
        let counters = LoadCounters::Expert { busy_us, batches: rows / 4, rows: vec![rows; 2], queue: 2 };
        LoadReport { node: NodeId::new(node).unwrap(), incarnation: 1, uptime_us: uptime_s * 1_000_000, counters }
    }

    fn cluster() -> Entries {
        let mut entries = Entries::default();
        entries.put("model", &testing::model(7));
        for node in ["a", "b"] {
            entries.join(node, 7);
        }
        entries.put("members/router/r", &testing::router("r", None));
        entries
    }

    fn book(state: &ClusterState) -> LoadBook {
        LoadBook::new(state, &state.model().unwrap().spec, 10 * SECOND)
    }

    #[test]
    fn rates_follow_the_traffic_and_weights_outlive_it() {
        let state = cluster().state();
        let mut book = book(&state);
        for second in 0..100 {
            book.record(router(second, [second * 30, second * 10, 0, 0])).unwrap();
            book.tick(SECOND, &state);
        }
        let busy = book.snapshot(&state, "c", 1).layers[1].clone();
        assert!((busy.tokens_per_s[0] - 30.0).abs() < 0.1, "{busy:?}");
        for _ in 0..300 {
            book.record(router(100, [2970, 990, 0, 0])).unwrap();
            book.tick(SECOND, &state);
        }
        let idle = book.snapshot(&state, "c", 2).layers[1].clone();
        assert_eq!((idle.tokens_per_s[0], &idle.weight), (0.0, &busy.weight));
        assert!((idle.weight[0] / idle.weight[1] - 3.0).abs() < 0.01);
    }

    #[test]
    fn a_trickle_does_not_wear_away_what_is_known() {
        let state = cluster().state();
        let mut book = book(&state);
        book.record(router(0, [0; 4])).unwrap();
        book.record(router(1, [600, 200, 100, 100])).unwrap();
        for second in 0..200 {
            book.record(router(second, [600 + second / 10, 200 + second / 10, 100, 100])).unwrap();
            book.tick(SECOND, &state);
            let weight: f64 = book.snapshot(&state, "c", 1).layers[0].weight.iter().sum();
            assert!(weight >= TOKENS_PER_EXPERT * 4.0 - 0.1, "{weight} after {second} s");
        }
    }

    #[test]
    fn a_new_leader_goes_on_from_the_store() {
        let mut entries = cluster();
        let first = entries.state();
        let mut old = book(&first);
        for second in 0..20 {
            old.record(router(second, [second * 30, second * 10, 5 * second, 0])).unwrap();
            old.tick(SECOND, &first);
        }
        let written = old.snapshot(&first, "old", 1);
        for (layer, load) in written.layers.iter().enumerate() {
            entries.put(&format!("load/{layer:04}"), load);
        }
        let state = entries.state();
        let new = book(&state).snapshot(&state, "new", 2);
        assert_eq!(new.layers[0].weight, written.layers[0].weight);
        assert_eq!(new.layers[1].tokens_per_s, written.layers[1].tokens_per_s);
        assert_eq!(LoadSnapshot::stored(&state).layers, written.layers);
    }

    #[test]
    fn a_router_that_starts_again_is_not_counted_twice_and_a_new_one_from_its_start() {
        let state = cluster().state();
        let mut book = book(&state);
        book.record(router(60, [9000, 0, 0, 0])).unwrap();
        book.tick(SECOND, &state);
        book.record(LoadReport { incarnation: 2, ..router(0, [7, 0, 0, 0]) }).unwrap();
        book.record(LoadReport { incarnation: 2, ..router(1, [10, 0, 0, 0]) }).unwrap();
        book.tick(SECOND, &state);
        assert_eq!(book.snapshot(&state, "c", 1).layers[0].weight[..1], [10.0]);
    }

    #[test]
    fn what_a_router_counted_before_the_book_was_opened_is_not_counted() {
        let state = cluster().state();
        let mut book = book(&state);
        book.record(router(50, [5000, 0, 0, 0])).unwrap();
        book.record(router(51, [5010, 0, 0, 0])).unwrap();
        book.tick(SECOND, &state);
        assert_eq!(book.snapshot(&state, "c", 1).layers[0].weight[..1], [10.0]);
    }

    #[test]
    fn imbalance_is_the_slowest_nodes_time_over_the_mean_and_starts_anew_with_a_placement() {
        let mut entries = cluster();
        let state = entries.state();
        let mut book = book(&state);
        for second in 0..20 {
            book.record(expert("a", second, second * 500_000, second * 300)).unwrap();
            book.record(expert("b", second, second * 100_000, second * 100)).unwrap();
            book.tick(SECOND, &state);
        }
        let load = book.snapshot(&state, "c", 1);
        assert_eq!((load.layers[0].imbalance, load.imbalance()), (1.5, 1.5));
        let a = &load.nodes[&NodeId::new("a").unwrap()];
        assert!(a.busy > 0.3 && a.busy <= 0.5 && (a.batch_rows - 8.0).abs() < 1e-9 && a.queue > 1.0, "{a:?}");

        entries.put("placement/epochs/00000001/0000", &testing::layer(&["a", "b", "a", "b"]));
        entries.put("placement/epochs/00000001/0001", &testing::layer(&["a", "b", "a", "b"]));
        entries.put("placement/serving", &EpochRef { epoch: Epoch(1), leader: "c".into() });
        let state = entries.state();
        book.tick(SECOND, &state);
        assert!(book.snapshot(&state, "c", 2).imbalance() < 1.0, "nothing is known of it yet");
    }

    #[test]
    fn a_report_that_does_not_fit_the_model_is_refused_by_field() {
        let state = cluster().state();
        let mut book = book(&state);
        let short = LoadReport { counters: LoadCounters::Router { tokens: vec![vec![1]] }, ..router(0, [0; 4]) };
        assert_eq!(book.record(short).unwrap_err().field, "router.layers");
        let rows = LoadCounters::Expert { busy_us: 0, batches: 0, rows: vec![1], queue: 0 };
        assert_eq!(book.record(LoadReport { counters: rows, ..router(0, [0; 4]) }).unwrap_err().field, "expert.rows");
    }
}
