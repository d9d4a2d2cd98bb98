//! How good a layout is and what it takes to get from one to another. Never part of a decision.

use super::{Layout, PlanNode, Shape};

/// A layer's times under a load: an expert's replicas share its load equally, and a node of speed 100 takes its load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Balance {
    /// The slowest node's time.
    pub slowest: f64,
    /// The time every node would take if the load were spread perfectly.
    pub ideal: f64,
}

impl Balance {
    /// Ideal over slowest: 1 is perfect. An idle layer is perfect.
    pub fn balance(&self) -> f64 {
        if self.slowest > 0.0 { self.ideal / self.slowest } else { 1.0 }
    }

    /// Slowest over ideal: 1 is perfect. An idle layer is perfect.
    pub fn imbalance(&self) -> f64 {
        if self.ideal > 0.0 { self.slowest / self.ideal } else { 1.0 }
    }
}

/// The balance of each layer of `layout`. `loads`: [layers * experts]; experts without a node count for nothing.
pub fn balances(shape: Shape, nodes: &[PlanNode], loads: &[u64], layout: &Layout) -> Vec<Balance> {
    (0..shape.layers).map(|layer| layer_balance(shape, nodes, loads, layout, layer)).collect()
}

fn layer_balance(shape: Shape, nodes: &[PlanNode], loads: &[u64], layout: &Layout, layer: usize) -> Balance {
    let mut times = vec![0.0; nodes.len()];
    let mut total = 0.0;
    for index in layer * shape.experts..(layer + 1) * shape.experts {
        let holders = layout.of(index);
        for &node in holders {
            let share = loads[index] as f64 / holders.len() as f64;
            times[node as usize] += share * 100.0 / f64::from(nodes[node as usize].speed.max(1));
            total += share;
        }
    }
    let speed: f64 = nodes.iter().map(|node| f64::from(node.speed.max(1)) / 100.0).sum();
    Balance { slowest: times.iter().copied().fold(0.0, f64::max), ideal: if speed > 0.0 { total / speed } else { 0.0 } }
}

/// An expert that a node must load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Which one: layer * experts + expert.
    pub index: usize,
    /// A node that held it before and holds it no more; `None` for another replica or when nobody held it.
    pub from: Option<u32>,
    /// The node that must load it.
    pub to: u32,
}

/// What nodes must load to get from `before` to `after`, by expert.
pub fn moves(before: &Layout, after: &Layout) -> Vec<Move> {
    let mut moves = Vec::new();
    for index in 0..after.holders.len() {
        let mut left = before.of(index).iter().copied().filter(|node| !after.of(index).contains(node));
        let new = after.of(index).iter().copied().filter(|node| !before.of(index).contains(node));
        moves.extend(new.map(|to| Move { index, from: left.next(), to }));
    }
    moves
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shares_over_speeds() {
        let shape = Shape { layers: 1, experts: 2, expert_bytes: 1 };
        let nodes = [PlanNode::new(9), PlanNode { speed: 200, ..PlanNode::new(9) }];
        let layout = Layout { holders: vec![vec![0, 1], vec![1]] };
        let balance = balances(shape, &nodes, &[4, 2], &layout)[0];
        assert_eq!(balance, Balance { slowest: 2.0, ideal: 2.0 });
        assert_eq!((balance.balance(), balance.imbalance()), (1.0, 1.0));
    }

    #[test]
    fn a_replica_that_changes_its_node_is_one_move_and_one_that_goes_is_none() {
        let before = Layout { holders: vec![vec![0, 1], vec![2], vec![3]] };
        let after = Layout { holders: vec![vec![1, 2], vec![2, 4], vec![]] };
        let moved = [Move { index: 0, from: Some(0), to: 2 }, Move { index: 1, from: None, to: 4 }];
        assert_eq!(moves(&before, &after), moved);
    }
}
