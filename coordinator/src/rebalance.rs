//! When the leader places experts anew by itself, because of their load.
//!
//! Four things keep it calm: the imbalance must exceed a threshold, a plan must take away a good part of the excess, placements
//! rest for a while after each change, and the bytes moved in ten minutes are limited. All are read from the store, so that
//! a change of leaders changes nothing. Pure.

use std::time::Duration;

use sirocco_store::ClusterState;
use sirocco_types::OperationKind;

use crate::inputs::{Inputs, Planned};
use crate::reconcile::routers_follow;

/// Over what time moved bytes are added up.
const WINDOW: Duration = Duration::from_mins(10);

/// The part of the excess over 1 that a plan must take away to be worth its moves.
const WORTHWHILE: f64 = 0.2;

/// What automatic rebalancing is told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    /// The least imbalance over 1 that is acted upon.
    pub(crate) threshold: f64,
    /// Rest after a change of the placement.
    pub(crate) cooldown: Duration,
    /// Most bytes loaded for balance's sake in ten minutes.
    pub(crate) bytes_per_window: u64,
}

/// The bytes that may be moved now; none when there is no reason to plan.
pub(crate) fn due(state: &ClusterState, inputs: &Inputs, policy: &Policy, now_ms: u64) -> Option<u64> {
    let target = state.target()?;
    let about = state.about(target.epoch)?;
    let rested = now_ms.saturating_sub(about.at_ms) >= policy.cooldown.as_millis() as u64;
    let settled = routers_follow(state, target.epoch) && about.inputs == inputs.digest();
    if about.kind == OperationKind::Rollback || !rested || !settled {
        return None;
    }
    let excess = inputs.imbalance(target)? - 1.0;
    let left = policy.bytes_per_window.saturating_sub(moved(state, now_ms));
    (excess >= policy.threshold && left > 0).then_some(left)
}

/// Whether `planned` is worth what it moves.
pub(crate) fn pays(planned: &Planned) -> bool {
    let (before, after) = (planned.imbalance_before - 1.0, planned.imbalance_after - 1.0);
    !planned.moves.is_empty() && before - after >= WORTHWHILE * before
}

/// Bytes moved for balance's sake within the window.
fn moved(state: &ClusterState, now_ms: u64) -> u64 {
    let recent = |at_ms: u64| now_ms.saturating_sub(at_ms) < WINDOW.as_millis() as u64;
    let abouts = state.epochs().filter_map(|epoch| state.about(epoch));
    abouts.filter(|about| about.kind == OperationKind::Rebalance && recent(about.at_ms)).map(|a| a.moved_bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operations::Request;
    use crate::testing::Cluster;

    const POLICY: Policy = Policy { threshold: 0.15, cooldown: Duration::from_mins(1), bytes_per_window: 24 * 100 };

    /// What may be moved at `now_s`, and whether a plan within that pays.
    fn asked(cluster: &Cluster, policy: &Policy, now_s: u64) -> Option<(u64, bool)> {
        let state = cluster.state();
        let inputs = Inputs::of(&state, &cluster.loads).unwrap();
        let bytes = due(&state, &inputs, policy, now_s * 1000)?;
        Some((bytes, pays(&inputs.plan(Some(bytes)))))
    }

    #[test]
    fn only_known_uneven_load_moves_experts() {
        let mut cluster = Cluster::serving(&["a", "b", "c", "d"]);
        assert_eq!(asked(&cluster, &POLICY, 1000), None, "nothing is known of the load");
        cluster.loaded([100.0; 4]);
        assert_eq!(asked(&cluster, &POLICY, 1000), None, "it is even");
        cluster.loaded([400.0, 100.0, 100.0, 100.0]);
        assert_eq!(asked(&cluster, &POLICY, 1000), Some((2400, true)));
    }

    #[test]
    fn a_placement_rests_after_each_change_and_after_a_rollback_for_good() {
        let mut cluster = Cluster::serving(&["a", "b", "c", "d"]);
        cluster.loaded([400.0, 100.0, 100.0, 100.0]);
        assert_eq!(asked(&cluster, &POLICY, 60), None, "placed at second 1");
        assert!(asked(&cluster, &POLICY, 61).is_some());
        cluster.ask(&Request::Rebalance { max_moved_bytes: None }).unwrap();
        assert_eq!(asked(&cluster, &POLICY, 1000), None, "the change is under way");
        cluster.settle();
        assert_eq!(asked(&cluster, &POLICY, 1000), None, "the load is even now");
        cluster.ask(&Request::Rollback(sirocco_types::Epoch(1))).unwrap();
        cluster.settle();
        assert_eq!(asked(&cluster, &POLICY, 1000), None, "an operator has chosen this placement");
    }

    #[test]
    fn moved_bytes_are_limited_over_ten_minutes() {
        let mut cluster = Cluster::serving(&["a", "b", "c", "d"]);
        cluster.loaded([400.0, 100.0, 100.0, 100.0]);
        cluster.ask(&Request::Rebalance { max_moved_bytes: None }).unwrap();
        cluster.settle();
        let state = cluster.state();
        let bytes = state.about(state.target().unwrap().epoch).unwrap().moved_bytes;
        assert!(bytes > 0);
        let policy = Policy { bytes_per_window: bytes + 24, ..POLICY };
        cluster.loaded([100.0, 100.0, 100.0, 900.0]);
        assert_eq!(asked(&cluster, &policy, 300).map(|(bytes, _)| bytes), Some(24));
        assert_eq!(asked(&cluster, &policy, 700).map(|(left, _)| left), Some(bytes + 24));
    }

    #[test]
    fn noise_around_a_skewed_load_soon_moves_nothing() {
        let mut cluster = Cluster::serving(&["a", "b", "c", "d"]);
        let mut rebalances = Vec::new();
        for round in 0..30 {
            let noise = [0.9, 1.0, 1.1][round % 3];
            cluster.loaded([400.0 * noise, 100.0, 100.0 / noise, 100.0]);
            if asked(&cluster, &Policy { bytes_per_window: u64::MAX, ..POLICY }, 1000).is_some_and(|(_, pays)| pays) {
                cluster.ask(&Request::Rebalance { max_moved_bytes: None }).unwrap();
                cluster.settle();
                rebalances.push(round);
            }
        }
        assert!(rebalances.len() <= 2 && rebalances.iter().all(|round| *round < 3), "{rebalances:?}");
    }
}
