//! What the coordinator's tests build clusters from: a store's entries, without a store.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};
use sirocco_store::{ClusterState, Keys, Op};
use sirocco_types::{ExpertHoldings, LayerLoad, NodeId, Operation, Role};

use crate::inputs::Inputs;
use crate::leader::ops;
use crate::load::LoadSnapshot;
use crate::operations::{Refusal, Request, decide};
use crate::reconcile::{Action, Signature, model_to_adopt, needs_plan, next_actions, place};

/// A store's entries, built up as a cluster would.
#[derive(Clone, Debug, Default)]
pub(crate) struct Entries(pub(crate) BTreeMap<String, String>);

impl Entries {
    pub(crate) fn state(&self) -> ClusterState {
        ClusterState::read(self.0.iter().map(|(key, value)| (key.as_str(), value.as_str(), 1)))
    }

    pub(crate) fn put<T: Serialize>(&mut self, key: &str, value: &T) {
        self.0.insert(key.to_owned(), serde_json::to_string(value).unwrap());
    }

    /// An expert node with room for 50 of the model's experts.
    pub(crate) fn join(&mut self, id: &str, fingerprint: u8) {
        self.join_with(id, fingerprint, &json!({}));
    }

    /// As [`Entries::join`], with some fields of the member record changed.
    pub(crate) fn join_with(&mut self, id: &str, fingerprint: u8, fields: &Value) {
        let mut member = json!({
            "id": id, "role": "expert", "state": "ready", "grpc": "a:1", "http": "a:2", "version": "0", "incarnation": 1,
            "capacity_bytes": 1200, "model": model(fingerprint),
        });
        for (field, value) in fields.as_object().unwrap() {
            member[field] = value.clone();
        }
        self.put(&format!("members/expert/{id}"), &member);
    }

    /// The node leaves.
    pub(crate) fn leave(&mut self, id: &str) {
        self.0.remove(&format!("members/expert/{id}"));
        self.0.remove(&format!("holdings/{id}"));
    }
}

/// A model of 2 layers of 4 experts of 24 bytes each.
pub(crate) fn model(fingerprint: u8) -> Value {
    json!({
        "name": "m",
        "fingerprint": format!("{fingerprint:02x}").repeat(32),
        "spec": {
            "model_type": "mixtral", "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 2,
            "num_local_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 1, "num_key_value_heads": 1,
            "head_dim": 2, "vocab_size": 8, "max_position_embeddings": 8, "sliding_window": null, "rms_norm_eps": 1e-5,
            "rope_theta": 1e4, "tie_word_embeddings": false, "bos_token_id": null, "eos_token_ids": [], "dtype": "bf16",
        },
    })
}

/// A router that dispatches by `epoch`.
pub(crate) fn router(id: &str, epoch: Option<u64>) -> Value {
    json!({
        "id": id, "role": "router", "state": "ready", "grpc": "a:1", "http": "a:2", "version": "0", "incarnation": 1,
        "serving_epoch": epoch, "model": model(7),
    })
}

/// One layer with one replica of each expert.
pub(crate) fn layer(nodes: &[&str]) -> Value {
    json!({ "experts": nodes.iter().map(|node| vec![*node]).collect::<Vec<_>>() })
}

/// A cluster without processes: a store's entries, and nodes and routers that do by hand what real ones do by themselves.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cluster {
    pub(crate) entries: Entries,
    pub(crate) loads: LoadSnapshot,
    /// Which coordinator leads; its name signs what is written.
    pub(crate) leader: u32,
}

impl Cluster {
    /// A cluster with expert nodes `ids` and a router, whose first placement serves.
    pub(crate) fn serving(ids: &[&str]) -> Self {
        let mut cluster = Self::default();
        cluster.entries.put("members/router/r", &router("r", None));
        for id in ids {
            cluster.entries.join(id, 7);
        }
        cluster.settle();
        cluster
    }

    pub(crate) fn state(&self) -> ClusterState {
        self.entries.state()
    }

    pub(crate) fn signature(&self) -> Signature {
        Signature { leader: format!("c{}", self.leader), at_ms: 1000 }
    }

    /// Writes `actions` as the leader does.
    pub(crate) fn write(&mut self, actions: Vec<Action>) {
        let keys = Keys::new("t").unwrap();
        let leader = self.signature().leader;
        for op in actions.into_iter().flat_map(|action| ops(&keys, action, &leader)) {
            let bare = |key: &str| key.strip_prefix(keys.prefix()).unwrap().to_owned();
            match op {
                Op::Put { key, value, .. } => drop(self.entries.0.insert(bare(&key), value)),
                Op::Delete(key) => drop(self.entries.0.remove(&bare(&key))),
                Op::DeletePrefix(prefix) => self.entries.0.retain(|key, _| !key.starts_with(&bare(&prefix))),
            }
        }
    }

    /// The leader's next step, as `leader` takes it. Returns what it wrote.
    pub(crate) fn step(&mut self) -> Vec<Action> {
        let (state, signature) = (self.state(), self.signature());
        let actions = match model_to_adopt(&state) {
            Some(model) => vec![Action::AdoptModel(model)],
            None => next_actions(&state, &signature),
        };
        let actions = match Inputs::of(&state, &self.loads) {
            Some(inputs) if actions.is_empty() && needs_plan(&state, &inputs) => {
                place(&state, &inputs, inputs.plan(None), &signature)
            }
            _ => actions,
        };
        self.write(actions.clone());
        actions
    }

    /// An expert node makes what it holds what it must hold.
    pub(crate) fn load(&mut self, id: &str) {
        let node = NodeId::new(id).unwrap();
        let holdings = ExpertHoldings::new(self.state().needed_on(&node), 0);
        self.entries.put(&format!("holdings/{id}"), &holdings);
    }

    /// The router goes by what serves.
    pub(crate) fn follow(&mut self) {
        let epoch = self.state().serving().map(|serving| serving.epoch.0);
        self.entries.put("members/router/r", &router("r", epoch));
    }

    /// Everybody does what there is to do, until there is nothing left.
    pub(crate) fn settle(&mut self) {
        for _ in 0..20 {
            let mut wrote = !self.step().is_empty();
            let before = self.entries.0.clone();
            let ids: Vec<String> = self.state().members(Role::Expert).map(|member| member.id.to_string()).collect();
            for id in &ids {
                self.load(id);
            }
            self.follow();
            wrote |= before != self.entries.0;
            if !wrote {
                return;
            }
        }
        panic!("the cluster never comes to rest: {:?}", self.state());
    }

    /// An operator's request, written when it is allowed. Returns its operation's id.
    pub(crate) fn ask(&mut self, request: &Request) -> Result<u64, Refusal> {
        let decision = decide(&self.state(), &self.loads, request, "me@here", &self.signature())?;
        self.write(decision.actions);
        Ok(decision.operation.id)
    }

    /// How far an operation is.
    pub(crate) fn operation(&self, id: u64) -> Operation {
        self.state().operation(id).unwrap().clone()
    }

    /// How many experts serving has on a node.
    pub(crate) fn served_by(&self, id: &str) -> usize {
        self.state().serving().unwrap().experts_on(&NodeId::new(id).unwrap()).count()
    }

    /// Load in which each layer's experts have these many tokens.
    pub(crate) fn loaded(&mut self, tokens: [f64; 4]) {
        let layer = LayerLoad { tokens_per_s: tokens.to_vec(), weight: tokens.to_vec(), ..LayerLoad::default() };
        self.loads.layers = vec![layer; 2];
    }
}
