//! A cluster step by step, and clusters in which everything happens in any order.

use proptest::prelude::*;
use serde_json::json;
use sirocco_types::{ExpertHoldings, RefusedExpert};

use super::*;
use crate::operations::Request;
use crate::testing::{Cluster, model, router};

fn named(actions: &[Action]) -> String {
    let name = |action: &Action| match action {
        Action::AdoptModel(_) => "adopt".to_owned(),
        Action::PublishTarget(placement, _) => format!("target{}", placement.epoch),
        Action::KeepTarget(epoch, _) => format!("keep{epoch}"),
        Action::FlipServing(epoch) => format!("serving{epoch}"),
        Action::ForgetEpoch(epoch) => format!("forget{epoch}"),
        Action::Record(operation) => format!("{}-{}", operation.kind, operation.state),
        Action::ForgetOperation(id) => format!("forget-operation{id}"),
        Action::Cordon(..) => "cordon".to_owned(),
        Action::SetMinReplicas(_) => "replicas".to_owned(),
    };
    actions.iter().map(name).collect::<Vec<_>>().join(" ")
}

fn step(cluster: &mut Cluster) -> String {
    let actions = cluster.step();
    named(&actions)
}

#[test]
fn serving_flips_only_when_every_expert_of_the_target_is_held() {
    let mut cluster = Cluster::default();
    assert_eq!(step(&mut cluster), "");
    cluster.entries.join("a", 7);
    cluster.entries.join("b", 7);
    cluster.entries.put("members/router/r", &router("r", None));
    assert_eq!(step(&mut cluster), "adopt");
    assert_eq!(step(&mut cluster), "place-running target1");
    assert_eq!(step(&mut cluster), "");
    cluster.load("a");
    assert_eq!(step(&mut cluster), "");
    cluster.load("b");
    assert_eq!(step(&mut cluster), "serving1");
    assert_eq!(step(&mut cluster), "place-done");
    cluster.follow();
    assert_eq!(step(&mut cluster), "");
}

#[test]
fn experts_of_one_dtype_serve_and_a_node_with_another_gets_none_until_the_last_of_them_is_gone() {
    let as_dtype = |dtype: &str| {
        let mut model = model(7);
        model["expert_dtype"] = dtype.into();
        json!({ "model": model })
    };
    let mut cluster = Cluster::default();
    cluster.entries.put("members/router/r", &router("r", None));
    assert_eq!(step(&mut cluster), "adopt");
    cluster.entries.join_with("a", 7, &as_dtype("int8"));
    assert_eq!(step(&mut cluster), "adopt", "the first expert node decides");
    assert_eq!(cluster.state().model().unwrap().expert_bytes(), 3 * 2 * 2 * 17 / 16);
    cluster.settle();
    cluster.entries.join_with("b", 7, &as_dtype("int4"));
    cluster.entries.join("c", 7);
    assert_eq!(step(&mut cluster), "");
    let problems = crate::problems::problems(&cluster.state());
    assert!(
        problems.contains(&"expert node b keeps experts as int4, the cluster serves int8".to_owned()),
        "{problems:?}"
    );
    assert!(
        problems.contains(&"expert node c keeps experts as bf16, the cluster serves int8".to_owned()),
        "{problems:?}"
    );
    cluster.entries.leave("a");
    cluster.entries.leave("c");
    assert_eq!(step(&mut cluster), "adopt");
    assert_eq!(cluster.state().model().unwrap().expert_dtype, ExpertDtype::Int4);
}

#[test]
fn an_operation_ends_when_every_router_follows() {
    let mut cluster = Cluster::serving(&["a", "b"]);
    cluster.entries.join("c", 7);
    assert_eq!(step(&mut cluster), "place-running target2");
    for node in ["a", "b", "c"] {
        cluster.load(node);
    }
    assert_eq!(step(&mut cluster), "serving2");
    assert_eq!(step(&mut cluster), "");
    cluster.follow();
    assert_eq!(step(&mut cluster), "place-done");
    let about = cluster.state().about(Epoch(2)).unwrap().clone();
    assert!(about.reason.contains("c joined") && about.leader == "c0" && about.operation == 2, "{about:?}");
}

#[test]
fn a_lost_node_is_replaced_while_the_old_placement_serves() {
    let mut cluster = Cluster::serving(&["a", "b"]);
    cluster.entries.leave("b");
    assert_eq!(step(&mut cluster), "place-running target2");
    assert_eq!(cluster.state().serving().unwrap().epoch, Epoch(1));
    cluster.load("a");
    assert_eq!(step(&mut cluster), "serving2");
    assert!(cluster.state().about(Epoch(2)).unwrap().reason.contains("b is gone"));
}

#[test]
fn what_a_node_cannot_load_goes_to_another_one() {
    let mut cluster = Cluster::serving(&["a", "b", "c"]);
    cluster.entries.join_with("a", 7, &json!({ "state": "draining" }));
    assert_eq!(step(&mut cluster), "place-running target2");
    let b = NodeId::new("b").unwrap();
    let held = cluster.state().holdings(&b).unwrap().clone();
    let new: Vec<ExpertKey> = cluster.state().needed_on(&b).into_iter().filter(|key| !held.contains(*key)).collect();
    assert!(!new.is_empty(), "it has something to load");
    let refused = new.iter().map(|key| RefusedExpert { key: *key, reason: "the disk is broken".into() }).collect();
    cluster.entries.put("holdings/b", &ExpertHoldings { refused, ..held.clone() });
    cluster.load("c");
    step(&mut cluster);
    cluster.load("c");
    while !step(&mut cluster).is_empty() {}
    let state = cluster.state();
    let (target, serving) = (state.target().unwrap(), state.serving().unwrap());
    assert_eq!((target.epoch, serving.unplaced().count()), (serving.epoch, 0));
    assert!(new.iter().all(|key| !serving.replicas(*key).contains(&b)), "{serving:?}");
    let kept = serving.iter().filter(|(_, nodes)| nodes.contains(&b)).count();
    assert_eq!(kept, held.count(), "what it has it keeps: {serving:?}");
    let about = state.about(target.epoch).unwrap();
    assert!(about.reason.contains("b cannot load an expert"), "{about:?}");
}

#[test]
fn what_can_be_served_is_served_when_memory_is_short() {
    let mut cluster = Cluster::serving(&["a", "b"]);
    cluster.entries.leave("a");
    cluster.entries.join_with("b", 7, &json!({ "capacity_bytes": 24 * 6 }));
    cluster.settle();
    let state = cluster.state();
    assert_eq!(state.serving().unwrap().unplaced().count(), 2);
    assert_eq!(state.serving().unwrap().epoch, state.target().unwrap().epoch);
}

#[test]
fn serving_does_not_flip_to_a_target_that_loses_an_expert_which_is_still_served() {
    let mut cluster = Cluster::serving(&["a", "b"]);
    let served = cluster.state().serving().unwrap().epoch;
    cluster.entries.join_with("a", 7, &json!({ "state": "draining" }));
    cluster.entries.join_with("b", 7, &json!({ "capacity_bytes": 24 * 6 }));
    cluster.settle();
    assert_eq!(cluster.state().serving().unwrap().epoch, served);
    cluster.entries.leave("a");
    cluster.settle();
    assert_ne!(cluster.state().serving().unwrap().epoch, served);
}

#[test]
fn a_node_with_another_checkpoint_gets_no_expert() {
    let mut cluster = Cluster::default();
    cluster.entries.join("a", 7);
    cluster.entries.join("b", 7);
    cluster.entries.join("c", 8);
    cluster.settle();
    assert_eq!(cluster.served_by("c"), 0);
}

#[test]
fn another_model_is_adopted_when_nobody_reads_the_old_one() {
    let mut cluster = Cluster::default();
    cluster.entries.join("a", 7);
    assert_eq!(step(&mut cluster), "adopt");
    cluster.entries.join("b", 8);
    assert_eq!(step(&mut cluster), "place-running target1");
    cluster.entries.leave("a");
    assert_eq!(step(&mut cluster), "adopt");
}

#[test]
fn old_epochs_and_operations_are_forgotten_but_not_those_in_use() {
    let mut cluster = Cluster::serving(&["a"]);
    for round in 0..OPERATIONS_KEPT + 20 {
        let (joins, leaves) = if round % 2 == 0 { ("b", "c") } else { ("c", "b") };
        cluster.entries.leave(leaves);
        cluster.entries.join(joins, 7);
        cluster.settle();
    }
    let state = cluster.state();
    assert!(state.epochs().count() <= EPOCHS_KEPT + 1);
    assert_eq!(state.operations().count(), OPERATIONS_KEPT);
    assert!(state.target().is_some() && state.serving().is_some());
}

#[test]
fn a_change_that_moves_nothing_makes_no_new_placement() {
    let mut cluster = Cluster::serving(&["a", "b"]);
    cluster.ask(&Request::Cordon(NodeId::new("a").unwrap())).unwrap();
    assert_eq!(step(&mut cluster), "keep1");
    assert_eq!(step(&mut cluster), "");
}

#[test]
fn a_superseded_operation_says_so() {
    let mut cluster = Cluster::serving(&["a", "b"]);
    cluster.entries.join("c", 7);
    cluster.step();
    cluster.entries.join("d", 7);
    cluster.settle();
    let first = cluster.operation(2);
    assert_eq!(first.state, OperationState::Failed);
    assert!(first.detail.contains("superseded by epoch 3"), "{first:?}");
}

/// Something that happens to a cluster.
#[derive(Clone, Debug)]
enum Event {
    Join(usize),
    /// It stops being a member without a word.
    Die(usize),
    /// It asks to leave.
    Leave(usize),
    Ask(Request),
    Step,
    /// The leader dies after so many of the writes of its next step; another goes on.
    LeaderDies(usize),
    Load(usize),
    Follow,
    Traffic([f64; 4]),
}

const NODES: [&str; 5] = ["a", "b", "c", "d", "e"];

fn event() -> impl Strategy<Value = Event> {
    let node = || 0..NODES.len();
    let id = || node().prop_map(|node| NodeId::new(NODES[node]).unwrap());
    let request = prop_oneof![
        id().prop_map(Request::Drain),
        id().prop_map(Request::Cordon),
        id().prop_map(Request::Uncordon),
        Just(Request::Rebalance { max_moved_bytes: None }),
        (1u64..12).prop_map(|epoch| Request::Rollback(Epoch(epoch))),
        (1u32..3).prop_map(|replicas| Request::SetMinReplicas { replicas, layer: None, expert: None }),
    ];
    prop_oneof![
        2 => node().prop_map(Event::Join),
        1 => node().prop_map(Event::Leave),
        1 => node().prop_map(Event::Die),
        3 => request.prop_map(Event::Ask),
        8 => Just(Event::Step),
        2 => (0usize..4).prop_map(Event::LeaderDies),
        8 => node().prop_map(Event::Load),
        4 => Just(Event::Follow),
        1 => proptest::array::uniform4(1f64..1000.0).prop_map(Event::Traffic),
    ]
}

fn happen(cluster: &mut Cluster, event: &Event) {
    let present =
        |cluster: &Cluster, id: &str| cluster.state().member(Role::Expert, &NodeId::new(id).unwrap()).is_some();
    match event {
        Event::Join(node) => cluster.entries.join(NODES[*node], 7),
        Event::Die(node) => cluster.entries.leave(NODES[*node]),
        Event::Leave(node) if present(cluster, NODES[*node]) => {
            cluster.entries.join_with(NODES[*node], 7, &json!({ "state": "draining" }));
        }
        // A refusal is an answer too.
        Event::Ask(request) => drop(cluster.ask(request)),
        Event::Step => drop(cluster.step()),
        Event::LeaderDies(after) => {
            let before = cluster.clone();
            let mut actions = cluster.step();
            *cluster = before;
            actions.truncate(*after);
            cluster.write(actions);
            cluster.leader += 1;
        }
        Event::Load(node) if present(cluster, NODES[*node]) => cluster.load(NODES[*node]),
        Event::Follow => cluster.follow(),
        Event::Traffic(tokens) => cluster.loaded(*tokens),
        Event::Leave(_) | Event::Load(_) => {}
    }
}

/// Every expert that the router's placement puts on a live node must be held there.
fn no_gap(cluster: &Cluster) -> Result<(), TestCaseError> {
    let state = cluster.state();
    let followed = state.members(Role::Router).filter_map(|router| state.epoch(router.serving_epoch?));
    for placement in followed.chain(state.serving()) {
        for (key, nodes) in placement.iter() {
            for node in nodes.iter().filter(|node| state.holdings(node).is_some()) {
                prop_assert!(holds(&state, node, key), "{key} of epoch {} is not on {node}", placement.epoch);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn whatever_happens_there_is_no_gap_and_it_comes_to_rest(events in proptest::collection::vec(event(), 1..60)) {
        let mut cluster = Cluster::serving(&["a", "b", "c"]);
        for event in &events {
            happen(&mut cluster, event);
            // A node that died and came back has yet to load; what it does not hold it says, and routers ask others.
            let reborn = events.iter().any(|event| matches!(event, Event::Die(_)));
            if !reborn {
                no_gap(&cluster)?;
            }
        }
        cluster.entries.join("f", 7);
        cluster.settle();
        no_gap(&cluster)?;
        let state = cluster.state();
        prop_assert_eq!(state.serving().unwrap().epoch, state.target().unwrap().epoch);
        prop_assert_eq!(state.serving().unwrap().unplaced().count(), 0);
        prop_assert!(state.operations().all(|operation| operation.state != OperationState::Running));
    }
}
