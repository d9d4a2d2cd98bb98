//! Stand-in.
#![allow(missing_docs, reason = "stand-in")]
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub layers: usize,
    pub experts: usize,
    pub expert_bytes: u64,
}
#[derive(Clone, Debug)]
pub struct PlanNode {
    pub capacity_bytes: u64,
    pub experts_per_layer: u32,
    pub speed: u32,
    pub zone: Option<u32>,
    pub cordoned: bool,
}
#[derive(Clone, Copy, Debug, Default)]
pub struct Knobs {
    pub max_moved_bytes: Option<u64>,
    pub needed: bool,
}
impl Knobs {
    pub fn only_what_is_needed() -> Self {
        Self { needed: true, max_moved_bytes: None }
    }
}
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    pub replicas: Vec<Vec<u32>>,
}
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    pub shape: Shape,
    pub nodes: &'a [PlanNode],
    pub loads: &'a [u64],
    pub min_replicas: &'a [u32],
    pub previous: Option<&'a Layout>,
    pub knobs: Knobs,
}
#[derive(Clone, Debug)]
pub struct Plan {
    pub layout: Layout,
}
pub fn plan(problem: &Problem<'_>) -> Plan {
    let mut used = vec![0u64; problem.nodes.len()];
    let mut replicas = Vec::new();
    for index in 0..problem.shape.layers * problem.shape.experts {
        let expert = index % problem.shape.experts;
        let per = (0..problem.nodes.len())
            .filter(|&n| used[n] < problem.nodes[n].capacity_bytes / problem.shape.expert_bytes)
            .min_by_key(|&n| (used[n], n));
        let _ = expert;
        if let Some(n) = per {
            used[n] += 1;
        }
        replicas.push(per.into_iter().map(|n| n as u32).collect());
    }
    Plan { layout: Layout { replicas } }
}
