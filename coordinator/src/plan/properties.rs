//! The planner's promises, each against many random clusters.

use proptest::prelude::*;

use super::measure::{balances, moves};
use super::*;

/// Random clusters that each property is tried on.
const CASES: u32 = 512;

/// A problem that owns its parts.
#[derive(Clone, Debug)]
struct Case {
    shape: Shape,
    nodes: Vec<PlanNode>,
    loads: Vec<u64>,
    min_replicas: Vec<u32>,
    previous: Option<Layout>,
    knobs: Knobs,
}

impl Case {
    fn problem(&self) -> Problem<'_> {
        Problem {
            shape: self.shape,
            nodes: &self.nodes,
            loads: &self.loads,
            min_replicas: &self.min_replicas,
            previous: self.previous.as_ref(),
            knobs: self.knobs,
        }
    }

    fn plan(&self) -> Plan {
        plan(&self.problem())
    }

    /// What phases 1 to 3 alone leave.
    fn repaired(&self) -> Layout {
        Layout { holders: start(&self.problem()).1.holders }
    }

    /// [layers]: whether no node may keep an expert of the layer.
    fn fresh(&self) -> Vec<bool> {
        start(&self.problem()).1.fresh
    }

    /// The case with the plan of `self` as its previous layout.
    fn after(&self, layout: Layout) -> Self {
        Self { previous: Some(layout), ..self.clone() }
    }

    fn memory(&self, node: usize) -> u64 {
        self.nodes[node].capacity_bytes / self.shape.expert_bytes
    }

    fn slots(&self, node: usize) -> u64 {
        u64::from(self.nodes[node].experts_per_layer).min(self.shape.experts as u64)
    }

    fn open(&self, node: usize) -> bool {
        !self.nodes[node].cordoned && self.memory(node) > 0 && self.slots(node) > 0
    }

    fn count(&self, layout: &Layout, layer: usize, node: usize) -> u64 {
        let experts = layer * self.shape.experts..(layer + 1) * self.shape.experts;
        experts.filter(|&index| layout.of(index).contains(&(node as u32))).count() as u64
    }

    fn used(&self, layout: &Layout, node: usize) -> u64 {
        (0..self.shape.layers).map(|layer| self.count(layout, layer, node)).sum()
    }

    fn has_room(&self, layout: &Layout, layer: usize, node: usize) -> bool {
        let room = self.used(layout, node) < self.memory(node);
        self.open(node) && room && self.count(layout, layer, node) < self.slots(node)
    }

    /// Whether two of `holders` share a zone while an open zone holds none.
    fn crowded(&self, holders: &[u32]) -> bool {
        let zone = |&node: &u32| self.nodes[node as usize].zone;
        let repeated = (1..holders.len()).any(|i| holders[..i].iter().any(|a| zone(a) == zone(&holders[i])));
        repeated && !self.uncovered(holders).is_empty()
    }

    /// Open nodes in zones that hold none of `holders`.
    fn uncovered(&self, holders: &[u32]) -> Vec<usize> {
        let covered = |zone| holders.iter().any(|&node| self.nodes[node as usize].zone == zone);
        (0..self.nodes.len()).filter(|&node| self.open(node) && !covered(self.nodes[node].zone)).collect()
    }

    /// The most experts that can have a node: cordoned nodes keep what they can of what they have, then the largest flow
    /// from layers through slots into the memory of the others.
    fn most_served(&self) -> u64 {
        let Shape { layers, experts, .. } = self.shape;
        let mut kept = vec![0; layers];
        let (mut used, mut counts) = (vec![0; self.nodes.len()], vec![vec![0; layers]; self.nodes.len()]);
        for index in 0..self.shape.total() {
            let layer = index / experts;
            let held = self.previous.iter().flat_map(|p| p.of(index)).map(|&node| node as usize);
            let may = |&node: &usize| {
                self.nodes[node].cordoned && used[node] < self.memory(node) && counts[node][layer] < self.slots(node)
            };
            let free = |&node: &usize| (self.memory(node) - used[node], std::cmp::Reverse(node));
            if let Some(node) = held.filter(may).max_by_key(free) {
                used[node] += 1;
                counts[node][layer] += 1;
                kept[layer] += 1;
            }
        }
        let open: Vec<usize> = (0..self.nodes.len()).filter(|&node| self.open(node)).collect();
        let wanted: Vec<u64> = kept.iter().map(|&kept| experts as u64 - kept).collect();
        // the smallest cut: for every set of layers on the source's side, by size of what it may send
        let cut = |set: u32| -> u64 {
            let inside = |layer: &usize| set & (1 << layer) != 0;
            let cut_layers: u64 = (0..layers).filter(|layer| !inside(layer)).map(|layer| wanted[layer]).sum();
            let sent = u64::from(set.count_ones());
            cut_layers + open.iter().map(|&node| self.memory(node).min(sent * self.slots(node))).sum::<u64>()
        };
        kept.iter().sum::<u64>() + (0..1u32 << layers).map(cut).min().unwrap_or(0)
    }

    /// The sum over layers of the slowest node's time and the rent of replicas, in the layer's ideal time.
    fn price(&self, layout: &Layout) -> f64 {
        let replicas: usize = layout.holders.iter().map(Vec::len).sum();
        let balances = balances(self.shape, &self.nodes, &self.loads, layout);
        balances.iter().map(|layer| layer.slowest / layer.ideal).sum::<f64>()
            + replicas as f64 * self.knobs.replica_rent as f64 / 1e6
    }
}

fn node(tight: bool) -> impl Strategy<Value = PlanNode> {
    let capacity = if tight { (0u64..40).boxed() } else { (300u64..400).boxed() };
    let slots = prop_oneof![3 => Just(u32::MAX), 1 => 0u32..6];
    let zone = prop_oneof![1 => Just(None), 3 => (0u32..4).prop_map(Some)];
    (capacity, 0u64..10, slots, prop_oneof![Just(100u32), 1u32..400], zone, prop::bool::weighted(0.15)).prop_map(
        |(experts, rest, experts_per_layer, speed, zone, cordoned)| PlanNode {
            capacity_bytes: experts * 10 + rest,
            experts_per_layer,
            speed,
            zone,
            cordoned,
        },
    )
}

/// A cluster without a previous layout.
fn fresh(tight: bool) -> impl Strategy<Value = Case> {
    let sizes = (1usize..5, 1usize..14, prop::collection::vec(node(tight), 0..9), any::<bool>());
    sizes.prop_flat_map(|(layers, experts, nodes, zones)| {
        let total = layers * experts;
        let load = prop_oneof![2 => 0u64..100, 1 => Just(0u64), 1 => 1000u64..5000];
        let rent = prop_oneof![Just(0u64), Just(10_000), Just(100_000)];
        (
            prop::collection::vec(load, total),
            prop::collection::vec(prop_oneof![6 => Just(1u32), 1 => 0u32..4], total),
            (prop_oneof![Just(0u64), Just(2_000), Just(50_000)], rent),
        )
            .prop_map(move |(loads, min_replicas, (move_cost, replica_rent))| Case {
                shape: Shape { layers, experts, expert_bytes: 10 },
                nodes: nodes.iter().map(|node| PlanNode { zone: node.zone.filter(|_| zones), ..*node }).collect(),
                loads,
                min_replicas,
                previous: None,
                knobs: Knobs { move_cost, replica_rent, max_moved_bytes: None },
            })
    })
}

/// A cluster that was another one before: other loads and needs, other limits of the nodes, nodes that have come and gone.
fn changed(tight: bool) -> impl Strategy<Value = Case> {
    let before = (prop::collection::vec(node(tight), 0..9), prop::collection::vec(0u64..200, 60));
    let previous = (0u8..4, before, any::<u64>());
    (fresh(tight), previous).prop_map(|(mut case, (kind, (nodes, loads), shuffle))| {
        if kind == 0 {
            return case;
        }
        let mut before = Case {
            nodes: nodes.into_iter().map(|node| PlanNode { cordoned: false, ..node }).collect(),
            loads: (0..case.shape.total()).map(|index| loads[index % loads.len()]).collect(),
            ..case.clone()
        };
        if kind == 1 {
            before.nodes = case.nodes.iter().map(|node| PlanNode { cordoned: false, ..*node }).collect();
        }
        // nodes that the present cluster has not are those beyond its number, after turning the indices
        let most = before.nodes.len().max(case.nodes.len()).max(1) as u64;
        let turn = |&node: &u32| ((u64::from(node) + shuffle % most) % most) as u32;
        let mut layout = before.plan().layout;
        for holders in &mut layout.holders {
            *holders = holders.iter().map(turn).filter(|&node| (node as usize) < case.nodes.len()).collect();
            holders.sort_unstable();
        }
        case.previous = Some(layout);
        case
    })
}

fn clusters() -> impl Strategy<Value = Case> {
    any::<bool>().prop_flat_map(changed)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: CASES, ..ProptestConfig::default() })]

    #[test]
    fn as_many_experts_are_served_as_possible_and_the_others_are_named(case in clusters()) {
        let plan = case.plan();
        let served = plan.layout.holders.iter().filter(|nodes| !nodes.is_empty()).count() as u64;
        prop_assert_eq!(served, case.most_served());
        let unserved: Vec<usize> = (0..case.shape.total()).filter(|&i| plan.layout.of(i).is_empty()).collect();
        prop_assert_eq!(plan.unserved.iter().map(|(index, _)| *index).collect::<Vec<_>>(), unserved.clone());
        let open = (0..case.nodes.len()).filter(|&node| case.open(node));
        let free = open.clone().any(|node| case.used(&plan.layout, node) < case.memory(node));
        for (index, why) in plan.unserved {
            let layer = |index: usize| index / case.shape.experts;
            match why {
                Why::NoNode => prop_assert_eq!(open.clone().count(), 0),
                Why::Memory { missing_bytes } => prop_assert!(!free && missing_bytes == unserved.len() as u64 * 10),
                Why::Slots { missing_slots } => {
                    let missing = unserved.iter().filter(|&&other| layer(other) == layer(index)).count();
                    prop_assert!(free && missing_slots == missing);
                }
            }
        }
    }

    #[test]
    fn without_cordons_and_a_past_the_closed_formula_says_how_many_are_served(mut case in fresh(true)) {
        case.nodes.iter_mut().for_each(|node| node.cordoned = false);
        let most = |sent: u64| -> u64 {
            let rest = (case.shape.layers as u64 - sent) * case.shape.experts as u64;
            rest + (0..case.nodes.len()).map(|n| case.memory(n).min(sent * case.slots(n))).sum::<u64>()
        };
        let most = (0..=case.shape.layers as u64).map(most).min().unwrap();
        prop_assert_eq!(case.shape.total() as u64 - case.plan().unserved.len() as u64, most);
    }

    #[test]
    fn memory_and_slots_are_never_exceeded(case in clusters()) {
        let layout = case.plan().layout;
        for node in 0..case.nodes.len() {
            prop_assert!(case.used(&layout, node) <= case.memory(node));
            for layer in 0..case.shape.layers {
                prop_assert!(case.count(&layout, layer, node) <= case.slots(node));
            }
        }
    }

    #[test]
    fn replicas_are_on_different_nodes_and_spread_over_zones(case in clusters()) {
        let plan = case.plan();
        for (index, holders) in plan.layout.holders.iter().enumerate() {
            prop_assert!(holders.is_sorted_by(|a, b| a < b));
            prop_assert_eq!(case.crowded(holders), plan.crowded.contains(&index));
            if case.crowded(holders) {
                prop_assert!(holders.len() <= case.min_replicas[index].max(1) as usize);
                for node in case.uncovered(holders) {
                    prop_assert!(!case.has_room(&plan.layout, index / case.shape.experts, node));
                }
            }
        }
    }

    #[test]
    fn required_replicas_are_there_or_named_and_there_was_no_room(case in clusters()) {
        let plan = case.plan();
        let mut short = Vec::new();
        for (index, holders) in plan.layout.holders.iter().enumerate() {
            let missing = case.min_replicas[index].max(1).saturating_sub(holders.len() as u32);
            if missing == 0 || holders.is_empty() {
                continue;
            }
            short.push((index, missing));
            let mut others = (0..case.nodes.len()).filter(|&node| !holders.contains(&(node as u32)));
            prop_assert!(others.all(|node| !case.has_room(&plan.layout, index / case.shape.experts, node)));
        }
        prop_assert_eq!(short, plan.short);
    }

    #[test]
    fn load_is_weighed_by_speed(speeds in prop::collection::vec(prop_oneof![Just(100u32), Just(200), Just(400)], 2..8)) {
        // many equal experts: what a node holds follows its speed, to one expert
        let nodes: Vec<PlanNode> = speeds.iter().map(|&speed| PlanNode { speed, ..PlanNode::new(10_000) }).collect();
        let shape = Shape { layers: 1, experts: 64, expert_bytes: 10 };
        let knobs = Knobs { replica_rent: 1_000_000, ..Knobs::default() };
        let case = Case { shape, nodes, loads: vec![1; 64], min_replicas: vec![1; 64], previous: None, knobs };
        let layout = case.plan().layout;
        let total: u32 = speeds.iter().sum();
        for (node, &speed) in speeds.iter().enumerate() {
            let exact = f64::from(64 * speed) / f64::from(total);
            let most = exact.ceil() + f64::from(speed) / 100.0;
            prop_assert!(case.count(&layout, 0, node) as f64 <= most);
        }
    }

    #[test]
    fn when_moves_are_dear_only_necessary_ones_happen(mut case in changed(false)) {
        case.knobs.move_cost = 1 << 40;
        let Some(previous) = &case.previous else { return Ok(()) };
        let plan = case.plan();
        let (repaired, fresh) = (case.repaired(), case.fresh());
        for moved in moves(previous, &plan.layout) {
            if !fresh[moved.index / case.shape.experts] {
                prop_assert!(repaired.of(moved.index).contains(&moved.to));
            }
        }
    }

    #[test]
    fn a_lost_node_moves_only_its_own_experts(mut case in fresh(false), lost in any::<prop::sample::Index>()) {
        for node in &mut case.nodes {
            (node.cordoned, node.experts_per_layer, node.zone) = (false, u32::MAX, None);
        }
        if case.nodes.len() < 2 {
            return Ok(());
        }
        let before = case.plan().layout;
        let lost = lost.index(case.nodes.len()) as u32;
        // its memory is gone; its index stays
        case.nodes[lost as usize].capacity_bytes = 0;
        case.knobs.move_cost = 1 << 40;
        let mut rest = before.clone();
        rest.holders.iter_mut().for_each(|nodes| nodes.retain(|&node| node != lost));
        for moved in moves(&rest, &case.after(rest.clone()).plan().layout) {
            prop_assert!(before.of(moved.index).contains(&lost));
        }
    }

    #[test]
    fn equal_problems_have_equal_plans(case in clusters()) {
        prop_assert_eq!(case.plan(), case.clone().plan());
    }

    #[test]
    fn planning_again_changes_nothing(case in clusters()) {
        let layout = case.plan().layout;
        prop_assert_eq!(&case.after(layout.clone()).plan().layout, &layout);
    }

    #[test]
    fn moves_for_balance_keep_to_their_limit(mut case in changed(false), limit in 0u64..200) {
        let Some(previous) = case.previous.clone() else { return Ok(()) };
        let fresh = case.fresh();
        let loaded = |layout: &Layout| {
            moves(&previous, layout).iter().filter(|moved| !fresh[moved.index / case.shape.experts]).count() as u64 * 10
        };
        let necessary = loaded(&case.repaired());
        case.knobs.max_moved_bytes = Some(limit);
        prop_assert!(loaded(&case.plan().layout) <= necessary + limit);
    }

    #[test]
    fn a_cordoned_node_gets_nothing_new(case in clusters()) {
        for (index, holders) in case.plan().layout.holders.iter().enumerate() {
            for &node in holders.iter().filter(|&&node| case.nodes[node as usize].cordoned) {
                prop_assert!(case.previous.as_ref().is_some_and(|previous| previous.of(index).contains(&node)));
            }
        }
    }

    #[test]
    fn no_node_with_room_idles_unless_zones_demand_it(case in clusters()) {
        let layout = case.plan().layout;
        for layer in 0..case.shape.layers {
            let experts = layer * case.shape.experts..(layer + 1) * case.shape.experts;
            let idle = |node: &usize| case.count(&layout, layer, *node) == 0 && case.has_room(&layout, layer, *node);
            for node in (0..case.nodes.len()).filter(idle) {
                for index in experts.clone().filter(|&index| !layout.of(index).is_empty()) {
                    let mut more = layout.of(index).to_vec();
                    more.push(node as u32);
                    prop_assert!(case.crowded(&more), "node {} idles in layer {}", node, layer);
                }
            }
        }
    }

    #[test]
    fn balancing_makes_no_layer_set_slower(mut case in changed(false)) {
        case.loads.iter_mut().for_each(|load| *load += 50);
        let repaired = case.repaired();
        let lacks = |(index, holders): (usize, &Vec<u32>)| {
            holders.len() < case.min_replicas[index].max(1) as usize || case.crowded(holders)
        };
        let idle = |layer: usize| {
            let mut nodes = 0..case.nodes.len();
            nodes.any(|node| case.count(&repaired, layer, node) == 0 && case.has_room(&repaired, layer, node))
        };
        if repaired.holders.iter().enumerate().any(lacks) || (0..case.shape.layers).any(idle) {
            return Ok(());
        }
        let (repaired, layout) = (case.price(&repaired), case.price(&case.plan().layout));
        prop_assert!(layout <= repaired + 1e-6, "{} to {}", repaired, layout);
    }
}

#[test]
fn moves_for_balance_go_to_the_layers_that_gain_most() {
    let shape = Shape { layers: 2, experts: 4, expert_bytes: 10 };
    // on two nodes: the first layer is a little uneven, the second very
    let case = Case {
        shape,
        nodes: vec![PlanNode::new(1000); 2],
        loads: vec![12, 10, 9, 9, 90, 80, 1, 1],
        min_replicas: vec![1; 8],
        previous: Some(Layout {
            holders: [[0, 0, 1, 1], [0, 0, 1, 1]].concat().into_iter().map(|n| vec![n]).collect(),
        }),
        knobs: Knobs { move_cost: 1, replica_rent: 1_000_000, max_moved_bytes: Some(20) },
    };
    let previous = case.previous.clone().unwrap();
    let moved = moves(&previous, &case.plan().layout);
    assert!(!moved.is_empty() && moved.iter().all(|moved| moved.index >= 4), "{moved:?}");
}

#[test]
fn a_hot_expert_gets_a_replica_and_a_joining_node_gets_work() {
    let shape = Shape { layers: 1, experts: 4, expert_bytes: 10 };
    let mut case = Case {
        shape,
        nodes: vec![PlanNode::new(1000); 4],
        loads: vec![70, 10, 10, 10],
        min_replicas: vec![1; 4],
        previous: None,
        knobs: Knobs::default(),
    };
    let layout = case.plan().layout;
    assert!(layout.of(0).len() > 1, "{layout:?}");
    case.nodes.push(PlanNode::new(1000));
    let layout = case.after(layout).plan().layout;
    assert!(case.count(&layout, 0, 4) > 0, "{layout:?}");
}

#[test]
fn nodes_of_a_layer_with_fewer_experts_than_nodes_are_all_used() {
    let shape = Shape { layers: 3, experts: 8, expert_bytes: 10 };
    let case = Case {
        shape,
        nodes: vec![PlanNode::new(1000); 20],
        loads: vec![1; 24],
        min_replicas: vec![1; 24],
        previous: None,
        knobs: Knobs::default(),
    };
    let layout = case.plan().layout;
    for node in 0..20 {
        assert!((0..3).all(|layer| case.count(&layout, layer, node) > 0), "{node}");
    }
}
