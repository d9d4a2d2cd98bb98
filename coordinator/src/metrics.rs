//! Every metric of a coordinator: what it is called and means, and the one method that whoever measures it calls.
//!
//! What the cluster's state and the measured load say is read when somebody scrapes ([`watch`]), from this coordinator's own copy,
//! so all coordinators say the same. What the leader does is counted where it does it.

use std::sync::Arc;
use std::time::Duration;

use sirocco_process::metrics::{Counter, CounterFamily, Histogram, LATENCIES, Page};
use sirocco_store::ClusterState;
use sirocco_types::{MemberState, NodeId, Operation, OperationKind, OperationState, Placement, Role};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::load::LoadSnapshot;
use crate::problems::problems;

/// What a coordinator did while it led.
#[derive(Debug)]
pub(crate) struct Metrics {
    operations: CounterFamily,
    plan_seconds: Histogram,
    store_errors: Counter,
}

impl Metrics {
    /// Puts the metrics of a coordinator on `page`.
    pub(crate) fn new(page: &Page) -> Self {
        let operations = page.counter_family(
            ("sirocco_coordinator_operations_total", "Operations that this coordinator brought to their end."),
            &["kind", "outcome"],
        );
        for kind in OperationKind::ALL {
            for state in [OperationState::Done, OperationState::Failed] {
                operations.with_label_values(&[kind.as_str(), state.as_str()]);
            }
        }
        Self {
            operations,
            plan_seconds: page.histogram(
                ("sirocco_coordinator_plan_seconds", "Time to plan a placement or to decide on a request for one."),
                LATENCIES,
            ),
            store_errors: page.counter((
                "sirocco_coordinator_store_errors_total",
                "Elections and writes of this coordinator that the store failed.",
            )),
        }
    }

    /// `operation` was written; it counts once it has ended.
    pub(crate) fn recorded(&self, operation: &Operation) {
        if operation.state != OperationState::Running {
            self.operations.with_label_values(&[operation.kind.as_str(), operation.state.as_str()]).inc();
        }
    }

    /// A plan was made in `time`.
    pub(crate) fn planned(&self, time: Duration) {
        self.plan_seconds.observe(time.as_secs_f64());
    }

    /// The store failed.
    pub(crate) fn store_failed(&self) {
        self.store_errors.inc();
    }
}

/// What a coordinator knows of the cluster.
pub(crate) struct View {
    pub(crate) id: NodeId,
    pub(crate) states: watch::Receiver<Arc<ClusterState>>,
    pub(crate) loads: watch::Receiver<Arc<LoadSnapshot>>,
    /// Since when the store has been out of reach.
    pub(crate) stale_since: watch::Receiver<Option<Instant>>,
}

/// Puts on `page` what `view` shows when somebody scrapes.
pub(crate) fn watch(page: &Page, view: View) {
    let View { id, states, loads, stale_since } = view;
    let of = states.clone();
    page.gauge(("sirocco_coordinator_leader", "1 while this coordinator leads, else 0."), &[], move |samples| {
        samples.add(&[], if of.borrow().leader() == Some(id.as_str()) { 1.0 } else { 0.0 });
    });
    let of = states.clone();
    let epoch =
        ("sirocco_coordinator_epoch", "The placement that is aimed at and the one that serves; 0 while there is none.");
    page.gauge(epoch, &["placement"], move |samples| {
        let state = of.borrow();
        let epoch = |placement: Option<&Placement>| placement.map_or(0, |placement| placement.epoch.0) as f64;
        samples.add(&["target"], epoch(state.target()));
        samples.add(&["serving"], epoch(state.serving()));
    });
    let of = states.clone();
    let members = ("sirocco_coordinator_members", "Nodes that have joined the cluster.");
    page.gauge(members, &["role", "state"], move |samples| {
        let state = of.borrow();
        for role in Role::ALL {
            for of_state in [MemberState::Starting, MemberState::Ready, MemberState::Draining] {
                let count = state.members(role).filter(|member| member.state == of_state).count();
                samples.add(&[role.as_str(), &of_state.to_string()], count as f64);
            }
        }
    });
    let of = states.clone();
    let problems_now = ("sirocco_coordinator_problems", "Problems that `sirocco status` shows.");
    page.gauge(problems_now, &[], move |samples| samples.add(&[], problems(&of.borrow()).len() as f64));
    let of = states.clone();
    let running = ("sirocco_coordinator_operations_running", "Operations under way.");
    page.gauge(running, &[], move |samples| {
        let state = of.borrow();
        let running = state.operations().filter(|operation| operation.state == OperationState::Running);
        samples.add(&[], running.count() as f64);
    });
    let imbalance = (
        "sirocco_coordinator_imbalance_ratio",
        "The slowest expert node's time in a layer over the mean node's; 1 is perfect, 0 not known.",
    );
    page.gauge(imbalance, &["layer"], move |samples| {
        let measured = Arc::clone(&loads.borrow());
        let known =
            if measured.layers.is_empty() { LoadSnapshot::stored(&states.borrow()) } else { (*measured).clone() };
        for (layer, load) in known.layers.iter().enumerate() {
            samples.add(&[&layer.to_string()], load.imbalance);
        }
    });
    let stale = ("sirocco_coordinator_store_stale_seconds", "How long the store has not answered; 0 while it does.");
    page.gauge(stale, &[], move |samples| {
        samples.add(&[], stale_since.borrow().map_or(0.0, |since| since.elapsed().as_secs_f64()));
    });
}

#[cfg(test)]
pub(crate) mod tests {
    use sirocco_process::http::Health;

    use super::*;
    use crate::testing::{self, Entries};

    /// Metrics and the page they are on.
    pub(crate) fn metrics() -> (Arc<Metrics>, Page) {
        let page = Page::new(&Health::new("coordinator", "c"));
        (Arc::new(Metrics::new(&page)), page)
    }

    #[test]
    fn the_state_is_shown_as_it_is_and_a_member_that_has_left_is_not() {
        let (_, page) = metrics();
        let mut entries = Entries::default();
        entries.put("model", &testing::model(7));
        entries.join("a", 7);
        let (states, of) = watch::channel(Arc::new(entries.state()));
        let (_loads, loads) = watch::channel(Arc::default());
        let (_stale, stale_since) = watch::channel(None);
        watch(&page, View { id: NodeId::new("c").unwrap(), states: of, loads, stale_since });
        let shows = |line: &str| page.render().unwrap().lines().any(|shown| shown == line);
        assert!(shows("sirocco_coordinator_members{role=\"expert\",state=\"ready\"} 1"));
        assert!(shows("sirocco_coordinator_leader 0"));
        assert!(shows("sirocco_coordinator_epoch{placement=\"serving\"} 0"));
        states.send_replace(Arc::new(Entries::default().state()));
        assert!(shows("sirocco_coordinator_members{role=\"expert\",state=\"ready\"} 0"));
    }
}
