//! Between the planner's indices and the cluster's names.

use std::collections::BTreeMap;

use sirocco_types::{ExpertKey, LayerPlacement, ModelSpec, NodeId, Placement};

use super::{Knobs, Layout, PlanNode, Problem, Shape, plan};

/// Places the experts of `spec` on `nodes` (id and bytes of expert weights each may hold), starting from `previous`.
///
/// All experts count as equally loaded. The order of `nodes` does not matter.
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
        knobs: Knobs::default(),
    });
    let ids = |nodes: &Vec<u32>| nodes.iter().map(|&node| ids[node as usize].clone()).collect();
    let layers = found.layout.holders.chunks(shape.experts.max(1));
    layers.map(|experts| LayerPlacement { experts: experts.iter().map(ids).collect() }).collect()
}
