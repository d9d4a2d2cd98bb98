//! Between the planner's indices and the cluster's names.

use std::collections::BTreeMap;

use sirocco_types::{ExpertKey, LayerPlacement, ModelSpec, NodeId, Placement};

use super::{Knobs, Layout, PlanNode, Problem, Shape, plan};

/// Places the experts of `spec` on `nodes` (id and bytes of expert weights each may hold), starting from `previous`.
///
/// All experts count as equally loaded, so replicas beyond those that use idle nodes are made too dear to earn their rent.
/// The order of `nodes` does not matter.
pub(crate) fn place(spec: &ModelSpec, nodes: &[(NodeId, u64)], previous: Option<&Placement>) -> Vec<LayerPlacement> {
    let nodes: BTreeMap<&NodeId, PlanNode> = nodes.iter().map(|(id, bytes)| (id, PlanNode::new(*bytes))).collect();
    let ids: Vec<&NodeId> = nodes.keys().copied().collect();
    let shape =
        Shape { layers: spec.layers().count(), experts: spec.num_local_experts, expert_bytes: spec.expert_bytes() };
    let index = |id: &NodeId| ids.binary_search(&id).ok().map(|index| index as u32);
    let held = |key: ExpertKey| {
        let mut held: Vec<u32> = previous.iter().flat_map(|p| p.replicas(key)).filter_map(index).collect();
        held.sort_unstable();
        held
    };
    let layout = Layout { holders: spec.experts().map(held).collect() };
    let found = plan(&Problem {
        shape,
        nodes: &nodes.values().copied().collect::<Vec<_>>(),
        loads: &vec![1; shape.total()],
        min_replicas: &vec![1; shape.total()],
        previous: Some(&layout),
        knobs: Knobs { replica_rent: 1_000_000, ..Knobs::default() },
    });
    let ids = |nodes: &Vec<u32>| nodes.iter().map(|&node| ids[node as usize].clone()).collect();
    let layers = found.layout.holders.chunks(shape.experts.max(1));
    layers.map(|experts| LayerPlacement { experts: experts.iter().map(ids).collect() }).collect()
}

#[cfg(test)]
mod tests {
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

    fn nodes(names: &[&str]) -> Vec<(NodeId, u64)> {
        names.iter().map(|name| (NodeId::new(name).unwrap(), 100 * spec(1, 1).expert_bytes())).collect()
    }

    #[test]
    fn the_order_of_nodes_does_not_matter_and_eight_nodes_hold_one_expert_of_each_layer() {
        let spec = spec(3, 8);
        let mut nodes = nodes(&["a", "b", "c", "d", "e", "f", "g", "h"]);
        let layers = place(&spec, &nodes, None);
        nodes.reverse();
        assert_eq!(place(&spec, &nodes, None), layers);
        for (id, _) in &nodes {
            let held = |layer: &LayerPlacement| layer.experts.iter().filter(|nodes| nodes.contains(id)).count();
            assert_eq!(layers.iter().map(held).collect::<Vec<_>>(), [1; 3], "{id}");
        }
    }

    #[test]
    fn a_lost_node_moves_only_its_own_experts_and_leaves_no_expert_without_a_node() {
        let (spec, all) = (spec(2, 8), nodes(&["a", "b", "c", "d"]));
        let before = Placement { epoch: Epoch(1), layers: place(&spec, &all, None) };
        let after = Placement { epoch: Epoch(2), layers: place(&spec, &all[1..], Some(&before)) };
        for (key, replicas) in before.iter().filter(|(_, replicas)| !replicas.contains(&all[0].0)) {
            assert_eq!(after.replicas(key), replicas, "{key}");
        }
        assert_eq!(after.unplaced().count(), 0);
    }

    #[test]
    fn without_nodes_nothing_is_placed() {
        let placement = Placement { epoch: Epoch(1), layers: place(&spec(2, 3), &[], None) };
        assert_eq!(placement.unplaced().count(), 6);
    }
}
