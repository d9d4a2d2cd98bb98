//! A small cluster's state and an odd backend, for tests.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use sirocco_compute::{Batch, CpuBackend, DeviceError, ExpertBackend, ExpertPacker, GpuReadings};
use sirocco_store::{ClusterState, Keys, to_json};
use sirocco_types::{
    Dtype, Epoch, EpochRef, ExpertDtype, Fingerprint, LayerId, LayerPlacement, Member, MemberState, ModelIdentity,
    ModelSpec, NodeId, PlacementKind, Role,
};

/// A checkpoint that the cluster does not serve.
pub(crate) const OTHER_MODEL: u8 = Cluster::MODEL + 1;

pub(crate) fn id(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

/// A cluster that serves a model of one layer with two experts.
#[derive(Clone, Copy)]
pub(crate) struct Cluster {
    /// Expert nodes with the checkpoints they read.
    pub(crate) experts: &'static [(&'static str, MemberState, u8)],
    /// The epochs that routers go by; 0 for none.
    pub(crate) routers: &'static [u64],
    /// Whether a coordinator leads.
    pub(crate) leads: bool,
    /// Of each epoch from 1 on, the node of each expert.
    pub(crate) epochs: &'static [&'static [&'static str]],
    pub(crate) target: u64,
    pub(crate) serving: u64,
}

impl Cluster {
    /// The checkpoint it serves.
    pub(crate) const MODEL: u8 = 7;

    pub(crate) fn state(&self) -> ClusterState {
        let keys = Keys::new("demo").unwrap();
        let entries = self.entries(&keys);
        let prefix = keys.prefix().len();
        ClusterState::read(entries.iter().map(|(key, value)| (&key[prefix..], value.as_str(), 1)))
    }

    /// As a store has it.
    pub(crate) fn entries(&self, keys: &Keys) -> Vec<(String, String)> {
        let mut entries = vec![(keys.model(), to_json(&model(Self::MODEL)))];
        for (name, state, model) in self.experts {
            let member = Member { state: *state, ..Self::expert(name, *model) };
            entries.push((keys.member(Role::Expert, &member.id), to_json(&member)));
        }
        for (index, epoch) in self.routers.iter().enumerate() {
            let member = Self::router(index, *epoch);
            entries.push((keys.member(Role::Router, &member.id), to_json(&member)));
        }
        for (epoch, nodes) in (1..).zip(self.epochs) {
            let layer = LayerPlacement { experts: nodes.iter().map(|name| vec![id(name)]).collect() };
            entries.push((keys.layer(Epoch(epoch), LayerId(0)), to_json(&layer)));
        }
        for (kind, epoch) in [(PlacementKind::Target, self.target), (PlacementKind::Serving, self.serving)] {
            entries.push((keys.placement(kind), to_json(&EpochRef { epoch: Epoch(epoch), leader: "c".into() })));
        }
        if self.leads {
            entries.push((format!("{}/1f", keys.election()), "coordinator-0".into()));
        }
        entries
    }

    pub(crate) fn expert(name: &str, checkpoint: u8) -> Member {
        Member {
            id: id(name),
            role: Role::Expert,
            state: MemberState::Ready,
            grpc: format!("{name}:1"),
            http: format!("{name}:2"),
            version: "0.1.0".into(),
            incarnation: 1,
            zone: None,
            device: None,
            capacity_bytes: None,
            speed: None,
            max_experts_per_layer: None,
            serving_epoch: None,
            model: Some(model(checkpoint)),
        }
    }

    pub(crate) fn router(index: usize, epoch: u64) -> Member {
        let serving_epoch = (epoch > 0).then_some(Epoch(epoch));
        let expert = Self::expert(&format!("router-{index}"), Self::MODEL);
        Member { role: Role::Router, serving_epoch, ..expert }
    }
}

fn model(fingerprint: u8) -> ModelIdentity {
    ModelIdentity {
        name: "tiny".into(),
        fingerprint: Fingerprint([fingerprint; 32]),
        spec: spec(),
        expert_dtype: ExpertDtype::Bf16,
    }
}

/// The shape of the model that the cluster serves.
pub(crate) fn spec() -> ModelSpec {
    ModelSpec {
        model_type: "mixtral".into(),
        hidden_size: 8,
        intermediate_size: 8,
        num_hidden_layers: 1,
        num_local_experts: 2,
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
    }
}

/// The CPU, but for one thing.
#[derive(Debug)]
pub(crate) struct Odd(pub(crate) CpuBackend, pub(crate) Way);

/// What is odd.
#[derive(Debug)]
pub(crate) enum Way {
    /// Runs the first expert and fails.
    Fails(DeviceError),
    /// Hands out each row by itself, the last ones first: row `r` as `r`, one after the other.
    Backwards,
    /// Packers come only once so many were asked for.
    Together(usize, Mutex<usize>, Condvar),
}

impl ExpertBackend for Odd {
    fn kind(&self) -> &'static str {
        self.0.kind()
    }

    fn name(&self) -> String {
        self.0.name()
    }

    fn capacity_bytes(&self) -> Option<u64> {
        self.0.capacity_bytes()
    }

    fn packer(&self) -> Result<ExpertPacker, DeviceError> {
        if let Way::Together(expected, asked, changed) = &self.1 {
            let mut count = asked.lock().unwrap();
            *count += 1;
            changed.notify_all();
            let few = |count: &mut usize| *count < *expected;
            let (count, wait) = changed.wait_timeout_while(count, Duration::from_secs(20), few).unwrap();
            assert!(!wait.timed_out(), "{} experts are loaded at once, not {expected}", *count);
        }
        self.0.packer()
    }

    fn run(&self, batch: &Batch, done: &mut dyn FnMut(usize, usize, &[f32])) -> Result<(), DeviceError> {
        match &self.1 {
            Way::Fails(error) => {
                self.0.run(&Batch { parts: &batch.parts[..1], ..*batch }, done)?;
                Err(error.clone())
            }
            Way::Backwards => {
                for (index, part) in batch.parts.iter().enumerate().rev() {
                    for (place, &row) in part.rows.iter().enumerate().rev() {
                        let mut state = Vec::new();
                        (batch.append)(row, &mut state);
                        done(index, place, &state);
                    }
                }
                Ok(())
            }
            Way::Together(..) => self.0.run(batch, done),
        }
    }

    fn readings(&self) -> Option<GpuReadings> {
        self.0.readings()
    }
}
