//! What a placement is planned for: the cluster's state as the planner's integers, and its answer as a placement.
//!
//! Pure. The digest of the inputs is kept with every placement, so that any leader can tell whether it still fits.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;

use sha2::{Digest as _, Sha256};
use sirocco_store::ClusterState;
use sirocco_types::{
    Bytes, ExpertId, ExpertKey, LayerId, LayerPlacement, Member, MemberState, MinReplicas, ModelIdentity, Move, NodeId,
    Placement, Role,
};

use crate::load::{LoadSnapshot, TOKENS_PER_EXPERT};
use crate::plan::measure::balances;
use crate::plan::{Knobs, Layout, Plan, PlanNode, Problem, Shape, Why, plan};

/// While the load is unknown no replica is made for its sake: one would have to save a whole layer's ideal time.
const UNKNOWN_LOAD: Knobs = Knobs { move_cost: 2_000, replica_rent: 1_000_000, max_moved_bytes: None };

/// Everything a placement depends on.
#[derive(Clone, Debug)]
pub(crate) struct Inputs {
    shape: Shape,
    /// By id.
    ids: Vec<NodeId>,
    nodes: Vec<PlanNode>,
    min_replicas: Vec<u32>,
    /// `[layers * experts]`; none while too little is known.
    loads: Option<Vec<u64>>,
    previous: Option<Placement>,
    digest: String,
}

/// How nodes and limits differ from those there are, for plans of what would be.
#[derive(Clone, Debug, Default)]
pub(crate) struct WhatIf {
    /// Nodes like the median of those there are.
    pub(crate) add: usize,
    pub(crate) remove: BTreeSet<NodeId>,
}

/// A planned placement and what it takes.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub(crate) layers: Vec<LayerPlacement>,
    pub(crate) moves: Vec<Move>,
    pub(crate) moved_bytes: u64,
    /// Mean over layers, of the placement before; 0 when there is none.
    pub(crate) imbalance_before: f64,
    pub(crate) imbalance_after: f64,
    /// Experts without a node, and why.
    pub(crate) unserved: Vec<(ExpertKey, String)>,
    /// Experts with fewer replicas or zones than asked for, a sentence each.
    pub(crate) short: Vec<String>,
}

impl Inputs {
    /// The inputs of the next placement; none while there is no model.
    ///
    /// Nodes that read another checkpoint, are leaving or drained do not count. Nodes that could not load an expert get no new
    /// ones until they have tried again. The placement before is the target, without what could not be loaded.
    pub(crate) fn of(state: &ClusterState, loads: &LoadSnapshot) -> Option<Self> {
        Self::what_if(state, loads, &WhatIf::default())
    }

    /// As [`Inputs::of`], with other nodes.
    pub(crate) fn what_if(state: &ClusterState, loads: &LoadSnapshot, change: &WhatIf) -> Option<Self> {
        let model = state.model()?;
        let mut members: Vec<Member> =
            usable(state, model).filter(|member| !change.remove.contains(&member.id)).cloned().collect();
        members.extend(imagined(&members, change.add));
        let cordoned = |id: &NodeId| state.cordon(id).is_some() || refuses(state, id, |_| true);
        let previous = state.target().map(|target| loadable(state, target.clone()));
        Some(Self::new(model, &members, cordoned, state.min_replicas(), loads, previous))
    }

    fn new(
        model: &ModelIdentity,
        members: &[Member],
        cordoned: impl Fn(&NodeId) -> bool,
        min_replicas: &MinReplicas,
        loads: &LoadSnapshot,
        previous: Option<Placement>,
    ) -> Self {
        let spec = &model.spec;
        let zones: BTreeSet<&str> = members.iter().filter_map(|member| member.zone.as_deref()).collect();
        let zones: BTreeMap<&str, u32> = zones.into_iter().zip(0..).collect();
        let nodes: Vec<PlanNode> = members
            .iter()
            .map(|member| PlanNode {
                capacity_bytes: member.capacity_bytes.unwrap_or(0),
                experts_per_layer: member.max_experts_per_layer.unwrap_or(u32::MAX),
                speed: member.speed.unwrap_or(100).max(1),
                zone: member.zone.as_deref().map(|zone| zones[zone]),
                cordoned: cordoned(&member.id),
            })
            .collect();
        let min_replicas: Vec<u32> = spec.experts().map(|key| min_replicas.of(key)).collect();
        let ids: Vec<NodeId> = members.iter().map(|member| member.id.clone()).collect();
        let digest = digest(model, members, &nodes, &min_replicas);
        Self {
            shape: Shape {
                layers: spec.num_hidden_layers,
                experts: spec.num_local_experts,
                expert_bytes: model.expert_bytes(),
            },
            ids,
            nodes,
            min_replicas,
            loads: integer_loads(loads, spec.num_hidden_layers, spec.num_local_experts),
            previous,
            digest,
        }
    }

    /// Tells these inputs' nodes and limits from others; load and the placement before are no part of it.
    pub(crate) fn digest(&self) -> &str {
        &self.digest
    }

    /// Whether there is a node to plan for.
    pub(crate) fn has_nodes(&self) -> bool {
        !self.nodes.is_empty()
    }

    /// Whether enough is known of the load to place experts by it.
    pub(crate) fn knows_load(&self) -> bool {
        self.loads.is_some()
    }

    /// The nodes that a placement may use, by id.
    pub(crate) fn ids(&self) -> &[NodeId] {
        &self.ids
    }

    /// Plans a placement. Takes up to seconds with thousands of nodes. While the load is unknown only what serving needs is
    /// moved; otherwise at most `max_moved_bytes` more for balance's sake.
    pub(crate) fn plan(&self, max_moved_bytes: Option<u64>) -> Planned {
        let previous = self.previous.as_ref().map(|placement| self.layout(placement));
        let knobs = Knobs { max_moved_bytes, ..if self.knows_load() { Knobs::default() } else { UNKNOWN_LOAD } };
        let plan = plan(&Problem {
            shape: self.shape,
            nodes: &self.nodes,
            loads: &self.loads_or_even(),
            min_replicas: &self.min_replicas,
            previous: previous.as_ref(),
            knobs,
        });
        let Plan { layout, unserved, short, crowded } = plan;
        let unserved = unserved.into_iter().map(|(index, why)| (self.key(index), because(why)));
        let few = short
            .into_iter()
            .map(|(index, missing)| format!("{} has {missing} replicas less than it must have", self.key(index)));
        let crowded = crowded.into_iter().map(|index| format!("{} has several replicas in one zone", self.key(index)));
        let short = few.chain(crowded).collect();
        Planned { unserved: unserved.collect(), short, ..self.planned(&layout) }
    }

    /// `placement`, which holds only nodes that are planned for, as a plan.
    pub(crate) fn brought_back(&self, placement: &Placement) -> Planned {
        self.planned(&self.layout(placement))
    }

    fn planned(&self, layout: &Layout) -> Planned {
        let loads = self.loads_or_even();
        let before = self.previous.as_ref().map(|placement| self.layout(placement));
        let moves = self.moves(layout);
        Planned {
            moved_bytes: moves.len() as u64 * self.shape.expert_bytes,
            moves,
            imbalance_before: before.map_or(0.0, |layout| self.mean_imbalance(&loads, &layout)),
            imbalance_after: self.mean_imbalance(&loads, layout),
            layers: self.placement(layout),
            unserved: Vec::new(),
            short: Vec::new(),
        }
    }

    /// The experts that nodes load for `layout`, each with a node that gives it up, while there is one: by name, because a node
    /// that gives experts up may be one that is not planned for any more.
    fn moves(&self, layout: &Layout) -> Vec<Move> {
        let mut moves = Vec::new();
        for (index, now) in layout.holders.iter().enumerate() {
            let key = self.key(index);
            let now: Vec<&NodeId> = now.iter().map(|&node| &self.ids[node as usize]).collect();
            let before = self.previous.as_ref().map_or(&[][..], |placement| placement.replicas(key));
            let mut given_up = before.iter().filter(|node| !now.contains(node));
            let new = now.iter().filter(|node| !before.contains(node));
            moves.extend(new.map(|&to| Move { key, from: given_up.next().cloned(), to: to.clone() }));
        }
        moves
    }

    fn placement(&self, layout: &Layout) -> Vec<LayerPlacement> {
        let nodes = |replicas: &Vec<u32>| replicas.iter().map(|&node| self.ids[node as usize].clone()).collect();
        let layers = layout.holders.chunks(self.shape.experts.max(1));
        layers.map(|experts| LayerPlacement { experts: experts.iter().map(nodes).collect() }).collect()
    }

    fn key(&self, index: usize) -> ExpertKey {
        let (layer, expert) = (index / self.shape.experts, index % self.shape.experts);
        ExpertKey { layer: LayerId(layer as u32), expert: ExpertId(expert as u32) }
    }

    /// The mean over layers of the slowest node's time over the mean, if `placement` served the present load; none while
    /// that is unknown.
    pub(crate) fn imbalance(&self, placement: &Placement) -> Option<f64> {
        let loads = self.loads.as_ref()?;
        Some(self.mean_imbalance(loads, &self.layout(placement)))
    }

    fn mean_imbalance(&self, loads: &[u64], layout: &Layout) -> f64 {
        let layers = balances(self.shape, &self.nodes, loads, layout);
        layers.iter().map(|layer| layer.imbalance()).sum::<f64>() / layers.len().max(1) as f64
    }

    fn loads_or_even(&self) -> Cow<'_, [u64]> {
        match &self.loads {
            Some(loads) => Cow::Borrowed(loads),
            None => Cow::Owned(vec![1; self.shape.total()]),
        }
    }

    /// `placement` as the planner sees it, nodes that are not planned for left out.
    fn layout(&self, placement: &Placement) -> Layout {
        let indices: HashMap<&NodeId, u32> = self.ids.iter().zip(0..).collect();
        let holders = placement.iter().map(|(_, nodes)| {
            let mut replicas: Vec<u32> = nodes.iter().filter_map(|node| indices.get(node).copied()).collect();
            replicas.sort_unstable();
            replicas
        });
        Layout { holders: holders.collect() }
    }
}

/// The expert nodes that a placement may use: those that read the cluster's checkpoint and keep its
/// experts as the cluster does, are not leaving and not drained.
pub(crate) fn usable<'a>(state: &'a ClusterState, model: &'a ModelIdentity) -> impl Iterator<Item = &'a Member> {
    state.members(Role::Expert).filter(|member| {
        let ours = member.model.as_ref().is_some_and(|theirs| theirs.has_experts_of(model));
        let drained = state.cordon(&member.id).is_some_and(|cordon| cordon.drain);
        ours && !drained && member.state != MemberState::Draining
    })
}

/// Whether `node` says that it could not load an expert of which `which` is true.
pub(crate) fn refuses(state: &ClusterState, node: &NodeId, which: impl Fn(ExpertKey) -> bool) -> bool {
    state.holdings(node).is_some_and(|holdings| holdings.refused.iter().any(|refused| which(refused.key)))
}

/// `placement` without replicas that their nodes could not load.
fn loadable(state: &ClusterState, mut placement: Placement) -> Placement {
    for (layer, experts) in (0..).zip(&mut placement.layers) {
        for (expert, nodes) in (0..).zip(&mut experts.experts) {
            let key = ExpertKey { layer: LayerId(layer), expert: ExpertId(expert) };
            nodes.retain(|node| !refuses(state, node, |refused| refused == key));
        }
    }
    placement
}

/// `count` nodes more, each like the median of `members` by capacity, in the zones with the fewest nodes.
fn imagined(members: &[Member], count: usize) -> Vec<Member> {
    let mut sorted: Vec<&Member> = members.iter().collect();
    sorted.sort_by_key(|member| (member.capacity_bytes, member.speed));
    let Some(median) = sorted.get(sorted.len() / 2) else { return Vec::new() };
    let mut zones = BTreeMap::<&str, usize>::new();
    for zone in members.iter().filter_map(|member| member.zone.as_deref()) {
        *zones.entry(zone).or_default() += 1;
    }
    let mut new = Vec::new();
    let mut index = 0;
    while new.len() < count {
        index += 1;
        let Ok(id) = NodeId::new(&format!("new-{index}")) else { break };
        if members.iter().any(|member| member.id == id) {
            continue;
        }
        let zone = zones.iter_mut().min_by_key(|(_, nodes)| **nodes).map(|(zone, nodes)| {
            *nodes += 1;
            (*zone).to_owned()
        });
        new.push(Member { id, zone, ..(*median).clone() });
    }
    new
}

fn digest(model: &ModelIdentity, members: &[Member], nodes: &[PlanNode], min_replicas: &[u32]) -> String {
    let mut hash = Sha256::new();
    hash.update(model.fingerprint.0);
    hash.update(model.expert_dtype.as_str());
    for (member, node) in members.iter().zip(nodes) {
        let PlanNode { capacity_bytes, experts_per_layer, speed, zone: _, cordoned } = node;
        let zone = member.zone.as_deref().unwrap_or_default();
        let id = &member.id;
        hash.update(format!("{id} {capacity_bytes} {experts_per_layer} {speed} {zone:?} {cordoned}\n"));
    }
    for least in min_replicas {
        hash.update(least.to_le_bytes());
    }
    hash.finalize()[..8].iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Why an expert has no node, a sentence.
fn because(why: Why) -> String {
    match why {
        Why::NoNode => "no node takes experts".to_owned(),
        Why::Memory { missing_bytes } => format!("{} of capacity are missing", Bytes(missing_bytes)),
        Why::Slots { missing_slots } => {
            format!(
                "nodes with memory hold as many experts of the layer as they may; {missing_slots} slots are missing"
            )
        }
    }
}

/// The weights as integers; none while a layer has too few tokens to tell its experts apart.
fn integer_loads(loads: &LoadSnapshot, layers: usize, experts: usize) -> Option<Vec<u64>> {
    let enough = |weight: &[f64]| {
        weight.len() == experts && weight.iter().sum::<f64>() >= 0.99 * TOKENS_PER_EXPERT * experts as f64
    };
    if loads.layers.len() != layers || !loads.layers.iter().all(|layer| enough(&layer.weight)) {
        return None;
    }
    let weights = loads.layers.iter().flat_map(|layer| &layer.weight);
    Some(weights.map(|weight| (weight * 16.0).round() as u64).collect())
}
