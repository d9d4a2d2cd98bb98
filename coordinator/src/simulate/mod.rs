//! The planner without nodes: model shapes, loads that change, and how good each plan is.
//!
//! Everything follows from its arguments and a seed. Never starts a node, reads a clock or decides anything.

mod loads;
pub(crate) mod random;

pub use loads::{Language, Loads, ParseLoadsError, drifted, first, reshuffled};

use crate::plan::measure::{Balance, balances, moves};
use crate::plan::{Layout, Plan, PlanNode, Problem, Shape};

/// A model's shape by the name of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamedShape {
    /// The model.
    pub name: &'static str,
    /// Layers, experts and what one takes.
    pub shape: Shape,
    /// Nodes that it is sensibly served from: a small cluster and a large one.
    pub nodes: [usize; 2],
}

/// The shapes that are simulated when none is named. An expert's bytes are those of its published weights.
pub const SHAPES: [NamedShape; 5] = [
    // 3 x 256 x 320 bf16
    named("demo", 4, 8, 491_520, [4, 8]),
    // 3 x 4096 x 14336 bf16
    named("mixtral-8x7b", 32, 8, 352_321_536, [8, 16]),
    // 3 x 4096 x 1536 bf16
    named("qwen3-235b", 94, 128, 37_748_736, [32, 512]),
    // 3 x 7168 x 2048 fp8
    named("deepseek-v3", 58, 256, 44_040_192, [144, 2000]),
    // 2 x 2080 x 6144 bf16
    named("switch-c", 30, 2048, 51_118_080, [256, 2000]),
];

const fn named(name: &'static str, layers: usize, experts: usize, expert_bytes: u64, nodes: [usize; 2]) -> NamedShape {
    NamedShape { name, shape: Shape { layers, experts, expert_bytes }, nodes }
}

/// A simulated cluster's nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// How many.
    pub nodes: usize,
    /// Experts of one layer that each may hold; its memory is that of as many of each layer.
    pub slots: u32,
    /// Node `n` is in zone `n % zones`.
    pub zones: u32,
    /// Node `n` has the speed `speeds[n % speeds.len()]`; none means ordinary.
    pub speeds: Vec<u32>,
}

impl Cluster {
    /// The nodes as the planner sees them.
    pub fn plan_nodes(&self, shape: Shape) -> Vec<PlanNode> {
        let capacity_bytes = u64::from(self.slots) * shape.layers as u64 * shape.expert_bytes;
        let node = |node: usize| PlanNode {
            experts_per_layer: self.slots,
            zone: (self.zones > 1).then_some(node as u32 % self.zones),
            speed: self.speeds.get(node % self.speeds.len().max(1)).copied().unwrap_or(100),
            ..PlanNode::new(capacity_bytes)
        };
        (0..self.nodes).map(node).collect()
    }
}

/// The smallest number of slots that lets `nodes` nodes hold each of `experts` experts and `extra` replicas.
pub fn slots_for(nodes: usize, experts: usize, extra: usize) -> u32 {
    ((experts + extra).div_ceil(nodes.max(1)) as u32).clamp(1, experts as u32)
}

/// How good a layout is under a load, over all layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quality {
    /// Mean over layers of the mean node's time over the slowest one's; 1 is perfect.
    pub balance: f64,
    /// Mean over layers of the slowest node's time over the mean one's; 1 is perfect.
    pub imbalance: f64,
}

/// What a plan changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// The previous layout under the present loads; `None` without one.
    pub before: Option<Quality>,
    /// The plan under the present loads.
    pub after: Quality,
    /// Experts that nodes must load.
    pub moved_experts: usize,
    /// What they take.
    pub moved_bytes: u64,
    /// Replicas of all experts.
    pub replicas: usize,
}

/// Judges `plan`, the plan of `problem`.
pub fn judge(problem: &Problem<'_>, plan: &Plan) -> Outcome {
    let nothing = Layout::default();
    let moved_experts = moves(problem.previous.unwrap_or(&nothing), &plan.layout).len();
    Outcome {
        before: problem.previous.map(|previous| quality(problem, previous)),
        after: quality(problem, &plan.layout),
        moved_experts,
        moved_bytes: moved_experts as u64 * problem.shape.expert_bytes,
        replicas: plan.layout.holders.iter().map(Vec::len).sum(),
    }
}

fn quality(problem: &Problem<'_>, layout: &Layout) -> Quality {
    let balances = balances(problem.shape, problem.nodes, problem.loads, layout);
    let mean = |of: fn(&Balance) -> f64| balances.iter().map(of).sum::<f64>() / balances.len().max(1) as f64;
    Quality { balance: mean(Balance::balance), imbalance: mean(Balance::imbalance) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Knobs, plan};

    const SHAPE: Shape = Shape { layers: 6, experts: 64, expert_bytes: 10 };

    fn problem<'a>(nodes: &'a [PlanNode], loads: &'a [u64], previous: Option<&'a Layout>) -> Problem<'a> {
        let knobs = Knobs { move_cost: 1000, replica_rent: 0, max_moved_bytes: None };
        Problem { shape: SHAPE, nodes, loads, min_replicas: &[1; SHAPE.layers * SHAPE.experts], previous, knobs }
    }

    #[test]
    fn a_drift_is_followed_with_few_moves() {
        let slots = slots_for(16, SHAPE.experts, 16);
        let nodes = Cluster { nodes: 16, slots, zones: 1, speeds: Vec::new() }.plan_nodes(SHAPE);
        let loads = first(&Loads::Zipf { exponent: 0.8 }, SHAPE, 7).unwrap();
        let before = plan(&problem(&nodes, &loads, None));
        let drifted = drifted(&loads, 0.1, 8);
        let problem = problem(&nodes, &drifted, Some(&before.layout));
        let outcome = judge(&problem, &plan(&problem));
        let kept = outcome.before.unwrap();
        assert!(outcome.after.balance > kept.balance && outcome.after.imbalance < kept.imbalance, "{outcome:?}");
        assert!(outcome.after.balance > 0.95 && outcome.moved_experts * 4 < outcome.replicas, "{outcome:?}");
        assert_eq!(outcome.moved_bytes, outcome.moved_experts as u64 * 10);
    }

    #[test]
    fn every_shape_is_served_whole_on_its_sensible_clusters() {
        for named in SHAPES.iter().filter(|named| named.shape.total() < 5000) {
            for nodes in named.nodes {
                let slots = slots_for(nodes, named.shape.experts, named.shape.experts / 8);
                let cluster = Cluster { nodes, slots, zones: 1, speeds: Vec::new() }.plan_nodes(named.shape);
                let room: u64 = cluster.iter().map(|node| node.capacity_bytes / named.shape.expert_bytes).sum();
                assert!(room >= named.shape.total() as u64, "{} on {nodes}", named.name);
            }
        }
    }

    #[test]
    fn zones_and_speeds_are_dealt_in_turn() {
        let nodes = Cluster { nodes: 3, slots: 2, zones: 2, speeds: vec![100, 50] }.plan_nodes(SHAPE);
        assert_eq!(
            nodes.iter().map(|node| (node.zone, node.speed)).collect::<Vec<_>>(),
            [(Some(0), 100), (Some(1), 50), (Some(0), 100)]
        );
    }
}
