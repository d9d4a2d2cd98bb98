//! The state of one cluster as its store has it, read from a snapshot of everything under its prefix.
//!
//! Every node decides from this alone, so that it does the same after a missed event or a restart as it does live. An entry
//! that does not parse is left out and said so once: one bad record must not stop a cluster. Following a mirror parses only
//! what has changed.

mod read;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sirocco_types::{
    Cordon, Epoch, EpochAbout, ExpertHoldings, ExpertKey, LayerId, LayerLoad, Member, MinReplicas, ModelIdentity,
    NodeId, NodeLoad, Operation, Placement, Role,
};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use self::read::Reader;
use crate::{Keys, Mirror, Revision, Snapshot};

/// Members, holdings, model, placements, load and operations of one cluster.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterState {
    revision: Revision,
    members: BTreeMap<(Role, NodeId), Arc<Member>>,
    holdings: BTreeMap<NodeId, Arc<ExpertHoldings>>,
    epochs: BTreeMap<Epoch, Arc<Placement>>,
    abouts: BTreeMap<Epoch, Arc<EpochAbout>>,
    target: Epoch,
    serving: Epoch,
    model: Option<Arc<ModelIdentity>>,
    leader: Option<(u64, String)>,
    layer_loads: BTreeMap<LayerId, Arc<LayerLoad>>,
    node_loads: BTreeMap<NodeId, Arc<NodeLoad>>,
    operations: BTreeMap<u64, Arc<Operation>>,
    cordons: BTreeMap<NodeId, Arc<Cordon>>,
    min_replicas: Arc<MinReplicas>,
    unreadable: BTreeMap<String, String>,
}

impl ClusterState {
    /// Publishes the state at each snapshot of `mirror`, which is of `keys.prefix()`. The task ends with the mirror.
    pub fn follow(mirror: &Mirror, keys: &Keys, tasks: &TaskTracker) -> watch::Receiver<Arc<Self>> {
        let mut snapshots = mirror.subscribe();
        let keys = keys.clone();
        let mut reader = Reader::default();
        let (sender, receiver) = watch::channel(Arc::new(reader.read_snapshot(&snapshots.borrow_and_update(), &keys)));
        sender.borrow().say_unreadable(&Self::default());
        tasks.spawn(async move {
            while snapshots.changed().await.is_ok() {
                let snapshot = Arc::clone(&snapshots.borrow_and_update());
                let state = Arc::new(reader.read_snapshot(&snapshot, &keys));
                let before = sender.send_replace(Arc::clone(&state));
                state.say_unreadable(&before);
            }
        });
        receiver
    }

    /// Reads a snapshot of `keys.prefix()`.
    pub fn of(snapshot: &Snapshot, keys: &Keys) -> Self {
        Reader::default().read_snapshot(snapshot, keys)
    }

    /// Reads `entries`, whose keys have lost the cluster's prefix (`/sirocco/<cluster>/`); the third part is the revision
    /// at which the key was created.
    pub fn read<'a>(entries: impl IntoIterator<Item = (&'a str, &'a str, u64)>) -> Self {
        Reader::default().read(entries.into_iter().map(|(key, value, created)| (key, value, created, 0)))
    }

    /// The store's revision it was read at; 0 when it was not read from a snapshot.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// The members of one role, by id.
    pub fn members(&self, role: Role) -> impl Iterator<Item = &Member> {
        self.members.values().map(|member| &**member).filter(move |member| member.role == role)
    }

    /// One member, while its lease lives.
    pub fn member(&self, role: Role, id: &NodeId) -> Option<&Member> {
        self.members.get(&(role, id.clone())).map(|member| &**member)
    }

    /// What an expert node holds; none when it is gone or has not said.
    pub fn holdings(&self, node: &NodeId) -> Option<&ExpertHoldings> {
        self.holdings.get(node).map(|holdings| &**holdings)
    }

    /// What expert nodes load towards.
    pub fn target(&self) -> Option<&Placement> {
        self.epoch(self.target)
    }

    /// What routers dispatch by.
    pub fn serving(&self) -> Option<&Placement> {
        self.epoch(self.serving)
    }

    /// The placement of one epoch, when all of its layers are there.
    pub fn epoch(&self, epoch: Epoch) -> Option<&Placement> {
        let layers = self.model.as_ref()?.spec.num_hidden_layers;
        self.epochs.get(&epoch).map(|placement| &**placement).filter(|placement| placement.layers.len() == layers)
    }

    /// What an expert node must hold: its part of the target, of the serving placement, and of what live routers go by. It
    /// drops the rest; so no router ever goes by a placement whose experts are being dropped.
    pub fn needed_on(&self, node: &NodeId) -> BTreeSet<ExpertKey> {
        let followed = self.members(Role::Router).filter_map(|router| self.epoch(router.serving_epoch?));
        let placements = self.target().into_iter().chain(self.serving()).chain(followed);
        placements.flat_map(|placement| placement.experts_on(node)).collect()
    }

    /// Every epoch the store has, complete or not, ascending.
    pub fn epochs(&self) -> impl Iterator<Item = Epoch> {
        self.epochs.keys().copied()
    }

    /// Why an epoch's placement was made.
    pub fn about(&self, epoch: Epoch) -> Option<&EpochAbout> {
        self.abouts.get(&epoch).map(|about| &**about)
    }

    /// The model the cluster serves, once a node with one has joined.
    pub fn model(&self) -> Option<&ModelIdentity> {
        self.model.as_deref()
    }

    /// The id of the coordinator that leads.
    pub fn leader(&self) -> Option<&str> {
        self.leader.as_ref().map(|(_, id)| id.as_str())
    }

    /// The gRPC address of the coordinator that leads, while it is a member.
    pub fn leader_address(&self) -> Option<&str> {
        let id = NodeId::new(self.leader()?).ok()?;
        self.member(Role::Coordinator, &id).map(|member| member.grpc.as_str())
    }

    /// The load of one layer, as last written.
    pub fn layer_load(&self, layer: LayerId) -> Option<&LayerLoad> {
        self.layer_loads.get(&layer).map(|load| &**load)
    }

    /// The load of every expert node that has one, as last written, by id.
    pub fn node_loads(&self) -> impl Iterator<Item = (&NodeId, &NodeLoad)> {
        self.node_loads.iter().map(|(id, load)| (id, &**load))
    }

    /// The operations that are kept, oldest first.
    pub fn operations(&self) -> impl DoubleEndedIterator<Item = &Operation> {
        self.operations.values().map(|operation| &**operation)
    }

    /// One operation.
    pub fn operation(&self, id: u64) -> Option<&Operation> {
        self.operations.get(&id).map(|operation| &**operation)
    }

    /// An operator's word on an expert node, whether it is there or not.
    pub fn cordon(&self, node: &NodeId) -> Option<&Cordon> {
        self.cordons.get(node).map(|cordon| &**cordon)
    }

    /// The least number of replicas.
    pub fn min_replicas(&self) -> &MinReplicas {
        &self.min_replicas
    }

    /// The entries that were left out, by key, each with what is wrong with it.
    pub fn unreadable(&self) -> &BTreeMap<String, String> {
        &self.unreadable
    }

    fn say_unreadable(&self, before: &Self) {
        for (key, error) in &self.unreadable {
            if before.unreadable.get(key) != Some(error) {
                tracing::warn!(key, error, "an entry of the store is left out");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use sirocco_types::{
        Device, Dtype, EpochRef, ExpertDtype, ExpertId, ExpertKey, Fingerprint, LayerPlacement, MemberState, ModelSpec,
        PlacementKind,
    };

    use super::*;
    use crate::{EmbeddedStore, Entry, Revision, Store, to_json};

    fn snapshot(entries: impl IntoIterator<Item = (String, String)>) -> Snapshot {
        let entry = |(key, value): (String, String)| {
            let entry =
                Entry { key: key.clone(), value, create_revision: Revision(1), mod_revision: Revision(1), lease: None };
            (key, Arc::new(entry))
        };
        Snapshot { entries: entries.into_iter().map(entry).collect(), revision: Revision(1) }
    }

    fn model() -> ModelIdentity {
        let spec = ModelSpec {
            model_type: "mixtral".into(),
            hidden_size: 8,
            intermediate_size: 8,
            num_hidden_layers: 2,
            num_local_experts: 1,
            num_experts_per_tok: 1,
            num_attention_heads: 1,
            num_key_value_heads: 1,
            head_dim: 8,
            vocab_size: 8,
            max_position_embeddings: 8,
            sliding_window: None,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            tie_word_embeddings: false,
            bos_token_id: None,
            eos_token_ids: vec![2],
            dtype: Dtype::Bf16,
        };
        ModelIdentity { name: "tiny".into(), fingerprint: Fingerprint([7; 32]), spec, expert_dtype: ExpertDtype::Bf16 }
    }

    #[test]
    fn every_key_is_read_back_from_where_it_is_laid() {
        let keys = Keys::new("demo").unwrap();
        let id = NodeId::new("expert-0").unwrap();
        let member = Member {
            id: id.clone(),
            role: Role::Expert,
            state: MemberState::Ready,
            grpc: "127.0.0.1:1".into(),
            http: "127.0.0.1:2".into(),
            version: "0.1.0".into(),
            incarnation: 1,
            zone: None,
            device: Some(Device { kind: "cpu".into(), name: "test".into() }),
            capacity_bytes: Some(1),
            speed: None,
            max_experts_per_layer: None,
            serving_epoch: None,
            model: Some(model()),
        };
        let holdings = ExpertHoldings::new([ExpertKey { layer: LayerId(1), expert: ExpertId(0) }], 1);
        let layer = LayerPlacement { experts: vec![vec![id.clone()]] };
        let epoch = |epoch| EpochRef { epoch: Epoch(epoch), leader: "coordinator-0".into() };
        let state = ClusterState::of(
            &snapshot([
                (keys.member(Role::Expert, &id), to_json(&member)),
                (keys.holdings(&id), to_json(&holdings)),
                (keys.model(), to_json(&model())),
                (keys.layer(Epoch(12), LayerId(0)), to_json(&layer)),
                (keys.layer(Epoch(12), LayerId(1)), to_json(&layer)),
                (keys.layer(Epoch(13), LayerId(0)), to_json(&layer)),
                (keys.placement(PlacementKind::Target), to_json(&epoch(13))),
                (keys.placement(PlacementKind::Serving), to_json(&epoch(12))),
                (format!("{}/1f", keys.election()), "coordinator-0".into()),
            ]),
            &keys,
        );
        assert_eq!(state.member(Role::Expert, &id), Some(&member));
        assert_eq!(state.holdings(&id), Some(&holdings));
        assert_eq!(state.model(), Some(&model()));
        let whole = Placement { epoch: Epoch(12), layers: vec![layer.clone(), layer] };
        assert_eq!(state.serving(), Some(&whole));
        assert_eq!(state.target(), None, "a layer of epoch 13 is missing");
        assert_eq!(state.epochs().collect::<Vec<_>>(), [Epoch(12), Epoch(13)]);
        assert_eq!(state.leader(), Some("coordinator-0"));
        assert!(state.unreadable().is_empty());
    }

    #[tokio::test]
    async fn following_publishes_each_state_until_the_mirror_closes() {
        let keys = Keys::new("demo").unwrap();
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::new());
        let mirror = Mirror::start(Arc::clone(&store), keys.prefix()).await.unwrap();
        let tasks = TaskTracker::new();
        let mut states = ClusterState::follow(&mirror, &keys, &tasks);
        assert_eq!(**states.borrow_and_update(), ClusterState::default());
        store.put(&keys.model(), &to_json(&model())).await.unwrap();
        assert_eq!(states.wait_for(|state| state.model().is_some()).await.unwrap().model(), Some(&model()));
        mirror.close().await;
        tasks.close();
        tasks.wait().await;
    }

    #[test]
    fn a_bad_record_is_left_out_alone() {
        let keys = Keys::new("demo").unwrap();
        let id = NodeId::new("expert-0").unwrap();
        let state = ClusterState::of(
            &snapshot([
                (keys.member(Role::Expert, &id), "{".into()),
                (keys.holdings(&id), to_json(&ExpertHoldings::default())),
            ]),
            &keys,
        );
        assert_eq!(state.members(Role::Expert).count(), 0);
        assert!(state.holdings(&id).is_some());
        assert_eq!(state.unreadable().keys().collect::<Vec<_>>(), ["members/expert/expert-0"]);
    }
}
