//! The operator's commands against a running cluster: what they say, what they change, what they refuse.

use rustix::process::Signal;
use serde_json::Value;
use sirocco_testkit::cluster::{self, Setup};
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::process::Process;
use sirocco_testkit::{repository, wait_for};

use crate::commands::{sirocco, up};

/// A cluster of four expert nodes in one process.
struct Cluster {
    _process: Process,
    router: String,
    /// One address at which nothing answers, then the coordinator's.
    coordinators: String,
}

impl Cluster {
    fn start() -> Self {
        let (process, router, coordinator) = up(&["--expert-nodes", "4"]);
        Self { _process: process, router, coordinators: format!("127.0.0.1:1,{coordinator}") }
    }

    /// Exit status, standard output, standard error.
    fn run(&self, command: &str) -> (Option<i32>, String, String) {
        let args: Vec<&str> = command.split(' ').chain(["--coordinator", &self.coordinators]).collect();
        sirocco(&args)
    }

    /// What a command that must succeed says to programs.
    fn json(&self, command: &str) -> Value {
        let (code, stdout, stderr) = self.run(&format!("{command} -o json"));
        assert_eq!(code, Some(0), "{command}: {stderr}");
        serde_json::from_str(&stdout).unwrap()
    }

    /// The nodes of each expert by `command`, by layer.
    fn placement(&self, command: &str) -> Vec<Vec<Vec<String>>> {
        let answer = self.json(command);
        let layers = answer.get("layers").or(answer.get("placement")).unwrap();
        serde_json::from_value(layers.clone()).unwrap()
    }
}

/// Whether any expert of a placement is on `node`.
fn uses(placement: &[Vec<Vec<String>>], node: &str) -> bool {
    placement.iter().flatten().flatten().any(|name| name == node)
}

#[test]
fn every_view_is_there_for_people_and_programs() {
    let cluster = Cluster::start();
    let views = [
        "status",
        "nodes",
        "experts --layer 1",
        "load",
        "load --layer 2",
        "top --once",
        "events",
        "placement show",
        "placement show --target",
        "placement show --epoch 1",
        "placement history",
        "placement plan",
        "replicas show",
        "rebalance --dry-run",
    ];
    for view in views {
        for format in ["table", "wide", "yaml"] {
            let (code, stdout, stderr) = cluster.run(&format!("{view} -o {format}"));
            assert_eq!((code, stderr.as_str()), (Some(0), ""), "{view} -o {format}");
            assert!(!stdout.trim().is_empty(), "{view} -o {format}");
        }
        let json = cluster.json(view);
        assert!(json.is_object() || json.is_array(), "{view}: {json}");
    }
    assert_eq!(cluster.json("top --once")["nodes"].as_array().unwrap().len(), 4);
    assert_eq!(cluster.json("placement history")[0]["serving"], true);
    assert_eq!(cluster.json("status")["imbalance"], 0.0);
}

#[test]
fn what_is_generated_shows_as_load() {
    let cluster = Cluster::start();
    let generate = ["generate", "Il nome del file", "--router", &cluster.router, "--max-tokens", "48"];
    let numbers = |value: &Value| value.as_array().unwrap().iter().filter_map(Value::as_f64).sum::<f64>();
    let load = wait_for("every layer and node to be loaded", || {
        // What a node has counted before its first report is not known as a rate, so one completion may not be enough.
        let (code, _, stderr) = sirocco(&generate);
        assert_eq!(code, Some(0), "{stderr}");
        let load = cluster.json("load");
        let (layers, nodes) = (load["layers"].as_array().unwrap(), load["nodes"].as_array().unwrap());
        let tokens = layers.iter().filter(|layer| numbers(&layer["tokens_per_s"]) > 0.0).count();
        let busy = nodes.iter().filter(|node| node["rows_per_s"].as_f64() > Some(0.0)).count();
        Ok(((tokens, busy) == (4, 4)).then_some(load))
    });
    assert_eq!(load.unwrap()["live"], true);
    let (_, map, _) = cluster.run("load --layer 3");
    assert!(map.contains("layer 3") && !map.contains("layer 2") && map.contains("expert-2"), "{map}");
    let (code, _, stderr) = cluster.run("load --layer 9");
    assert!(code == Some(1) && stderr.contains("layer: 9, the model has 4"), "{stderr}");
    let top = cluster.json("top --once");
    let hottest = &top["hottest"][0];
    assert!(hottest["times_even"].as_f64() > Some(1.0) && hottest["nodes"][0].is_string(), "{top}");
}

#[test]
fn plans_and_dry_runs_change_nothing() {
    let cluster = Cluster::start();
    assert!(!uses(&cluster.placement("placement plan --what-if nodes=-expert-3"), "expert-3"));
    for command in ["placement plan --what-if nodes=+2", "placement plan --what-if nodes=6", "rebalance --dry-run"] {
        let plan = cluster.json(command);
        assert_eq!(plan["unserved"].as_array().unwrap().len(), 0, "{command}: {plan}");
        assert!(plan["moves"].is_array() && plan["moved_bytes"].is_u64(), "{command}: {plan}");
    }
    assert_eq!(cluster.json("status")["target_epoch"], 1);
    assert_eq!(cluster.json("placement history").as_array().unwrap().len(), 1);
}

#[test]
fn operators_cordon_drain_and_bring_placements_back() {
    let cluster = Cluster::start();
    let first = cluster.placement("placement show");
    let done = |command: &str| {
        let operation = cluster.json(&format!("{command} --by ann@desk"));
        assert_eq!((&operation["state"], &operation["by"]), (&"done".into(), &"ann@desk".into()), "{operation}");
        operation
    };
    let cordon = |node: &str| {
        let nodes = cluster.json("nodes");
        nodes.as_array().unwrap().iter().find(|view| view["id"] == node).unwrap()["cordon"].clone()
    };

    done("cordon expert-1");
    assert_eq!(cordon("expert-1"), "cordoned");
    done("uncordon expert-1");
    assert_eq!(cordon("expert-1"), Value::Null);

    assert_eq!(done("drain expert-2")["subject"], "expert-2");
    assert!(!uses(&cluster.placement("placement show"), "expert-2"));
    done("uncordon expert-2");
    let before = cluster.json("status")["serving_epoch"].as_u64();
    let operation = done("placement rollback 1");
    assert_eq!(cluster.placement("placement show"), first);
    assert_eq!(operation["epoch"].as_u64(), cluster.json("status")["serving_epoch"].as_u64());
    assert!(operation["epoch"].as_u64() > before);
    done("rebalance");

    done("replicas set 1");
    done("replicas set 2 --layer 1 --expert 3");
    let replicas = cluster.json("replicas show");
    for expert in replicas.as_array().unwrap() {
        let least = if (&expert["layer"], &expert["expert"]) == (&1.into(), &3.into()) { 2 } else { 1 };
        assert_eq!(expert["min_replicas"], least, "{expert}");
    }

    done("replicas set 2");
    let replicated = || cluster.placement("placement show").iter().flatten().all(|nodes| nodes.len() >= 2);
    wait_for("two replicas of each expert", || Ok(replicated().then_some(()))).unwrap();

    let events = cluster.json("events --limit 0");
    let by_ann: Vec<&str> = events
        .as_array()
        .unwrap()
        .iter()
        .filter(|event| event["by"] == "ann@desk")
        .map(|event| event["kind"].as_str().unwrap())
        .collect();
    let asked = ["cordon", "uncordon", "drain", "uncordon", "rollback", "rebalance"].into_iter();
    assert_eq!(by_ann, asked.chain(["min-replicas"; 3]).collect::<Vec<_>>());
    assert_eq!(cluster.json("events --limit 2").as_array().unwrap().len(), 2);
}

#[test]
fn orders_that_cannot_be_followed_are_refused_with_the_reason() {
    let cluster = Cluster::start();
    let cases = [
        ("cordon nobody", 1, "nobody"),
        ("drain router-0", 1, "router-0"),
        ("placement rollback 99", 1, "99"),
        ("placement show --epoch 99", 1, "99"),
        ("experts --layer 9", 1, "layer: 9"),
        ("placement plan --what-if nodes=2", 1, "nodes=-NAME"),
        ("placement plan --what-if nodes=-2", 2, "nodes=-NAME"),
        ("placement plan --what-if nodes=-nobody", 1, "nobody"),
        ("replicas set 0", 2, "1..=64"),
        ("replicas set 2 --expert 1", 2, "--layer"),
        ("replicas set 2 --layer 9", 1, "layer: 9"),
        ("status --watch 0", 2, "from 0.1 to 3600"),
    ];
    for (command, expected, part) in cases {
        let (code, stdout, stderr) = cluster.run(command);
        assert_eq!((code, stdout.as_str()), (Some(expected), ""), "{command}: {stderr}");
        assert!(stderr.contains(part), "{command}: {stderr}");
    }
    for node in ["expert-0", "expert-1", "expert-2"] {
        cluster.json(&format!("drain {node}"));
    }
    let (code, _, stderr) = cluster.run("drain expert-3");
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("expert-3"), "{stderr}");
}

#[test]
fn watching_shows_one_document_after_the_other_until_it_is_interrupted() {
    let cluster = Cluster::start();
    for view in ["status --watch 0.1", "top --watch 0.1"] {
        let args = format!("{view} -o yaml --coordinator {}", cluster.coordinators);
        let mut watching = Process::start("sirocco", &args.split(' ').collect::<Vec<_>>(), &[]).unwrap();
        let documents = || watching.stdout().split("\n---\n").count();
        wait_for("three documents", || Ok((documents() >= 3).then_some(()))).unwrap();
        watching.signal(Signal::INT).unwrap();
        assert_eq!(watching.wait().unwrap().code(), Some(0), "{}", watching.stderr());
    }
}

#[test]
fn an_order_is_followed_through_a_change_of_leaders() {
    let etcd = Etcd::start().unwrap();
    let demo = repository("models/demo");
    let models = [demo.clone(), demo.clone()];
    let setup = Setup { name: "orders", router_model: &demo, models: &models, coordinators: 2, routers: 1, envs: &[] };
    let mut cluster = cluster::Cluster::start_with(&etcd.endpoint(), &setup).unwrap();
    let coordinators: Vec<&str> = cluster.coordinators.iter().map(|node| node.grpc.as_str()).collect();
    let coordinators = coordinators.join(",");
    let ask = |command: &str| -> Value {
        let args = format!("{command} -o json --coordinator {coordinators}");
        let (code, stdout, stderr) = sirocco(&args.split(' ').collect::<Vec<_>>());
        assert_eq!(code, Some(0), "{command}: {stderr}");
        serde_json::from_str(&stdout).unwrap()
    };
    let first = ask("status")["leader"].clone();
    let leader = cluster.coordinators.iter().position(|node| first == node.id.as_str()).unwrap();

    // A router that stands still goes by the old placement, so that the drain cannot end.
    cluster.routers[0].process.signal(Signal::STOP).unwrap();
    let args = ["drain", "expert-1", "-o", "json", "--coordinator", &coordinators];
    let mut drain = Process::start("sirocco", &args, &[]).unwrap();
    let under_way = |event: &Value| event["kind"] == "drain" && event["state"] == "running";
    let started = || ask("events").as_array().is_some_and(|events| events.iter().any(under_way));
    wait_for("the drain to begin", || Ok(started().then_some(()))).unwrap();
    cluster.coordinators[leader].process.kill().unwrap();
    let second = &cluster.coordinators[1 - leader].id;
    wait_for("another leader", || Ok((ask("status")["leader"] == second.as_str()).then_some(()))).unwrap();
    cluster.routers[0].process.signal(Signal::CONT).unwrap();

    assert_eq!(drain.wait().unwrap().code(), Some(0), "{}", drain.stderr());
    let operation: Value = serde_json::from_str(&drain.stdout()).unwrap();
    assert_eq!((&operation["state"], &operation["leader"]), (&"done".into(), &second.as_str().into()), "{operation}");
    assert_eq!(ask("placement history").as_array().unwrap().last().unwrap()["serving"], true);
}
