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
