//! What the store says while a cluster works, and how often it is written.

use std::time::{Duration, Instant};

use serde_json::Value;
use sirocco_testkit::etcd::{Etcd, ctl};

use super::clients::Clients;
use super::operator::{BY, Operator, cordon, drain, min_replicas};
use super::{Size, demo_cluster, until};

/// How long writes are counted.
const WINDOW: Duration = Duration::from_secs(20);

/// Most writes a second.
const WRITES_PER_S: f64 = 5.0;

/// The names in a stored object.
fn fields(value: &Value) -> Vec<&str> {
    let mut fields: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    fields.sort_unstable();
    fields
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_reads_as_documented_and_is_written_rarely() {
    let etcd = Etcd::start().unwrap();
    let size = Size { coordinators: 3, routers: 1, experts: 9 };
    let cluster = demo_cluster(&etcd.endpoint(), "written", size, &[]);
    let clients = Clients::of_goldens(&[&cluster.routers[0].grpc], 8);
    clients.progress(8).await;
    let (began, first) = (Instant::now(), ctl::revision(&etcd.endpoint()).unwrap());
    until("time to pass under load", async || (began.elapsed() >= WINDOW).then_some(())).await;
    let writes = (ctl::revision(&etcd.endpoint()).unwrap() - first) as f64 / began.elapsed().as_secs_f64();
    println!("{writes:.2} writes a second while {} requests were completed", clients.completed());
    assert!(writes < WRITES_PER_S, "{writes:.2} writes a second");

    let operator = Operator::of(&cluster);
    operator.complete(cordon("expert-0")).await;
    operator.complete(drain("expert-1")).await;
    operator.complete(min_replicas(1)).await;
    operator.settled().await;
    clients.stop().await;

    let entries = ctl::entries(&etcd.endpoint(), "written").unwrap();
    let value = |key: &str| -> &Value {
        let found = entries.iter().find(|(name, _)| *name == format!("/sirocco/written/{key}"));
        &found.unwrap_or_else(|| panic!("no {key} among {:?}", entries.iter().map(|(k, _)| k).collect::<Vec<_>>())).1
    };
    let serving = value("placement/serving");
    assert_eq!(fields(serving), ["epoch", "leader"]);
    let epoch = format!("placement/epochs/{:08}", serving["epoch"].as_u64().unwrap());
    for layer in 0..4 {
        assert_eq!(value(&format!("{epoch}/{layer:04}"))["experts"].as_array().unwrap().len(), 8);
        let load = value(&format!("load/{layer:04}"));
        assert_eq!(fields(load), ["at_ms", "imbalance", "leader", "tokens_per_s", "weight"]);
        assert_eq!(load["weight"].as_array().unwrap().len(), 8);
        assert!(load["tokens_per_s"].as_array().unwrap().iter().any(|rate| rate.as_f64() > Some(0.0)), "{load}");
    }
    let about = value(&format!("{epoch}/about"));
    for field in ["operation", "kind", "reason", "inputs", "moves", "moved_bytes", "imbalance_before", "at_ms"] {
        assert!(!about[field].is_null(), "no {field} in {about}");
    }
    let node = value("load/nodes/expert-2");
    let node_fields = ["at_ms", "batch_rows", "busy", "leader", "queue", "rows_per_s", "service_rows_per_s"];
    assert_eq!(fields(node), node_fields);
    assert!(node["busy"].as_f64() > Some(0.0) && node["rows_per_s"].as_f64() > Some(0.0), "{node}");
    assert_eq!(
        (&value("cordons/expert-0")["drain"], &value("cordons/expert-1")["drain"]),
        (&false.into(), &true.into())
    );
    let drained = value("cordons/expert-1")["operation"].as_u64().unwrap();
    let record = value(&format!("operations/{drained:08}"));
    assert_eq!((&record["kind"], &record["subject"]), (&"drain".into(), &"expert-1".into()), "{record}");
    assert_eq!((&record["state"], &record["by"]), (&"done".into(), &BY.into()), "{record}");
    assert_eq!(value("settings/min-replicas")["default"], 1);
    let mut records = entries.iter().filter(|(key, _)| key.contains("/operations/"));
    assert_eq!(records.next().unwrap().1["kind"], "lead");
}
