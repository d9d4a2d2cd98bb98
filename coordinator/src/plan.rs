//! Which expert goes where: a pure function over plain data.
//!
//! Each layer's experts are dealt to the nodes in proportion to how many each can hold, because a layer ends when its
//! busiest node answers. How many a node gets follows from the nodes alone; which ones stay where they were. So planning is
//! deterministic, and planning again from its own result moves nothing. It never reads a clock, a store or a measurement.

use std::collections::BTreeMap;

use sirocco_types::{ExpertId, ExpertKey, LayerId, LayerPlacement, ModelSpec, NodeId, Placement};

/// A node that experts can be placed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanNode {
    /// Its id.
    pub id: NodeId,
    /// Bytes of expert weights it may hold.
    pub capacity_bytes: u64,
}

/// Places every expert of `spec` on one of `nodes`, keeping as much of `previous` as balance and memory allow.
///
/// An expert that no node has memory for is left without replicas. The order of `nodes` does not matter.
pub fn plan(spec: &ModelSpec, nodes: &[PlanNode], previous: Option<&Placement>) -> Vec<LayerPlacement> {
    let mut nodes: Vec<Planned> = nodes.iter().map(|node| Planned::new(node, spec)).collect();
    nodes.sort_by(|a, b| a.id.cmp(&b.id));
    spec.layers().map(|layer| plan_layer(layer, spec, &mut nodes, previous)).collect()
}

/// A node while a plan is made. All counts are experts.
struct Planned {
    id: NodeId,
    /// How many it can hold over all layers.
    slots: u64,
    /// How many it has been given over all layers.
    used: u64,
}

impl Planned {
    fn new(node: &PlanNode, spec: &ModelSpec) -> Self {
        Self { id: node.id.clone(), slots: node.capacity_bytes / spec.expert_bytes().max(1), used: 0 }
    }

    /// What share of the node would be taken with `experts` on it.
    fn fill(&self, experts: u64) -> Fill {
        Fill { experts, slots: self.slots }
    }
}

/// A fraction, compared without rounding.
#[derive(PartialEq, Eq)]
struct Fill {
    experts: u64,
    slots: u64,
}

impl Ord for Fill {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (u128::from(self.experts) * u128::from(other.slots)).cmp(&(u128::from(other.experts) * u128::from(self.slots)))
    }
}

impl PartialOrd for Fill {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

fn plan_layer(layer: LayerId, spec: &ModelSpec, nodes: &mut [Planned], previous: Option<&Placement>) -> LayerPlacement {
    let mut quota = deal(spec.num_local_experts, nodes);
    let mut take = |node: &NodeId| {
        let left = quota.get_mut(node).filter(|left| **left > 0)?;
        *left -= 1;
        Some(node.clone())
    };
    let keys = || (0..spec.num_local_experts as u32).map(|expert| ExpertKey { layer, expert: ExpertId(expert) });
    let mut experts: Vec<Option<NodeId>> =
        keys().map(|key| previous.and_then(|p| p.replicas(key).iter().find_map(&mut take))).collect();
    for homeless in experts.iter_mut().filter(|node| node.is_none()) {
        *homeless = nodes.iter().find_map(|node| take(&node.id));
    }
    LayerPlacement { experts: experts.into_iter().map(|node| node.into_iter().collect()).collect() }
}

/// How many of one layer's experts each node gets: one at a time to the node whose share of this layer would be smallest,
/// then whose share of all layers so far would be, then by id.
fn deal(experts: usize, nodes: &mut [Planned]) -> BTreeMap<NodeId, u64> {
    let mut quota: BTreeMap<NodeId, u64> = nodes.iter().map(|node| (node.id.clone(), 0)).collect();
    for _ in 0..experts {
        let emptiest = nodes.iter_mut().filter(|node| node.used < node.slots).min_by(|a, b| {
            let share = |node: &Planned| (node.fill(quota[&node.id] + 1), node.fill(node.used + 1));
            share(a).cmp(&share(b)).then_with(|| a.id.cmp(&b.id))
        });
        let Some(node) = emptiest else { break };
        node.used += 1;
        *quota.get_mut(&node.id).expect("every node has an entry") += 1;
    }
    quota
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sirocco_types::{Dtype, Epoch};

    use super::*;

    fn spec(layers: usize, experts: usize) -> ModelSpec {
        ModelSpec {
            model_type: "mixtral".into(),
            hidden_size: 1,
            intermediate_size: 1,
            num_hidden_layers: layers,
            num_local_experts: experts,
            num_experts_per_tok: 1,
            num_attention_heads: 1,
            num_key_value_heads: 1,
            head_dim: 1,
            vocab_size: 1,
            max_position_embeddings: 1,
            sliding_window: None,
            rms_norm_eps: 0.0,
            rope_theta: 1.0,
            tie_word_embeddings: false,
            bos_token_id: None,
            eos_token_ids: vec![],
            dtype: Dtype::Bf16,
        }
    }

    /// Nodes `n000`, `n001`, … that can hold as many experts of [`spec`] as given.
    fn nodes(slots: &[u64]) -> Vec<PlanNode> {
        let bytes = spec(1, 1).expert_bytes();
        let node = |(i, slots): (usize, &u64)| PlanNode {
            id: NodeId::new(&format!("n{i:03}")).unwrap(),
            capacity_bytes: slots * bytes + 1,
        };
        slots.iter().enumerate().map(node).collect()
    }

    fn placed(layers: Vec<LayerPlacement>) -> Placement {
        Placement { epoch: Epoch(1), layers }
    }

    fn count(placement: &Placement, node: &PlanNode) -> u64 {
        placement.experts_on(&node.id).count() as u64
    }

    #[test]
    fn eight_nodes_hold_one_expert_of_each_layer() {
        let placement = placed(plan(&spec(4, 8), &nodes(&[100; 8]), None));
        for (key, replicas) in placement.iter() {
            assert_eq!(replicas, [NodeId::new(&format!("n{:03}", key.expert)).unwrap()]);
        }
    }

    #[test]
    fn unequal_remainders_even_out_over_the_layers() {
        let nodes = nodes(&[100; 3]);
        let placement = placed(plan(&spec(3, 8), &nodes, None));
        for node in &nodes {
            assert_eq!(count(&placement, node), 8, "{}", node.id);
        }
    }

    #[test]
    fn a_node_twice_as_large_holds_twice_as_much() {
        let nodes = nodes(&[200, 100, 100]);
        let placement = placed(plan(&spec(2, 8), &nodes, None));
        assert_eq!(nodes.iter().map(|n| count(&placement, n)).collect::<Vec<_>>(), [8, 4, 4]);
    }

    #[test]
    fn without_nodes_nothing_is_placed() {
        assert_eq!(placed(plan(&spec(2, 3), &[], None)).unplaced().count(), 6);
    }

    #[test]
    fn a_lost_node_moves_only_its_own_experts() {
        let all = nodes(&[100; 4]);
        let before = placed(plan(&spec(2, 8), &all, None));
        let after = placed(plan(&spec(2, 8), &all[1..], Some(&before)));
        for (key, replicas) in before.iter().filter(|(_, replicas)| replicas[0] != all[0].id) {
            assert_eq!(after.replicas(key), replicas, "{key}");
        }
        assert_eq!(after.unplaced().count(), 0);
    }

    proptest! {
        #[test]
        fn a_plan_keeps_its_promises(
            layers in 1usize..6,
            experts in 1usize..20,
            slots in proptest::collection::vec(0u64..60, 0..9),
            earlier in proptest::collection::vec(0u64..60, 0..9),
        ) {
            let (spec, nodes) = (spec(layers, experts), nodes(&slots));
            let previous = placed(plan(&spec, &self::nodes(&earlier), None));
            let placement = placed(plan(&spec, &nodes, Some(&previous)));

            // every expert is placed if memory allows at all
            let room: u64 = slots.iter().sum();
            let unplaced = placement.unplaced().count() as u64;
            prop_assert_eq!(unplaced, ((layers * experts) as u64).saturating_sub(room));
            // memory is respected
            for (node, &slots) in nodes.iter().zip(&slots) {
                prop_assert!(count(&placement, node) <= slots);
            }
            // planning again moves nothing
            prop_assert_eq!(&plan(&spec, &nodes, Some(&placement)), &placement.layers);
            // the order of the nodes does not matter
            let reversed: Vec<PlanNode> = nodes.iter().rev().cloned().collect();
            prop_assert_eq!(&plan(&spec, &reversed, Some(&previous)), &placement.layers);
        }

        #[test]
        fn equal_nodes_differ_by_at_most_one_expert_in_a_layer(nodes in 1usize..9, experts in 1usize..20) {
            let nodes = self::nodes(&vec![1000; nodes]);
            for layer in plan(&spec(5, experts), &nodes, None) {
                let counts = nodes.iter().map(|n| layer.experts.iter().filter(|r| r[0] == n.id).count());
                let (low, high) = counts.fold((usize::MAX, 0), |(low, high), c| (low.min(c), high.max(c)));
                prop_assert!(high - low <= 1);
            }
        }
    }
}
