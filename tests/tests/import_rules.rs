//! Who may import whom: ARCHITECTURE.md's table of crates, kept true.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cargo_metadata::{DependencyKind, MetadataCommand};
use sirocco_testkit::repository;

/// A crate of the workspace: which others of it may be imported, and what must not be reached, even through others.
struct Rule {
    package: &'static str,
    may: &'static [&'static str],
    never: &'static [&'static str],
}

const RULES: [Rule; 12] = [
    Rule { package: "sirocco-types", may: &[], never: &["tokio", "tonic", "cudarc"] },
    Rule { package: "sirocco-process", may: &["sirocco-types"], never: &["tonic", "etcd-client", "cudarc"] },
    Rule { package: "sirocco-proto", may: &["sirocco-types"], never: &["etcd-client", "cudarc"] },
    Rule { package: "sirocco-store", may: &["sirocco-types"], never: &["cudarc"] },
    Rule { package: "sirocco-compute", may: &["sirocco-types"], never: &["tokio", "tonic", "etcd-client"] },
    Rule {
        package: "sirocco-model",
        may: &["sirocco-types", "sirocco-compute"],
        never: &["tokio", "tonic", "etcd-client"],
    },
    Rule {
        package: "sirocco-coordinator",
        may: &["sirocco-types", "sirocco-proto", "sirocco-store", "sirocco-process"],
        never: &["sirocco-compute", "sirocco-model", "cudarc"],
    },
    Rule { package: "sirocco-expert-node", may: NODE, never: &["sirocco-router-node", "sirocco-coordinator"] },
    Rule { package: "sirocco-router-node", may: NODE, never: &["sirocco-expert-node", "sirocco-coordinator"] },
    Rule {
        package: "sirocco",
        may: &[
            "sirocco-types",
            "sirocco-proto",
            "sirocco-store",
            "sirocco-process",
            "sirocco-model",
            "sirocco-coordinator",
            "sirocco-expert-node",
            "sirocco-router-node",
        ],
        never: &[],
    },
    Rule { package: "sirocco-testkit", may: &[], never: &["sirocco-store"] },
    Rule { package: "xtask", may: &[], never: &["tokio", "tonic"] },
];

const NODE: &[&str] =
    &["sirocco-types", "sirocco-proto", "sirocco-store", "sirocco-process", "sirocco-compute", "sirocco-model"];

/// Each package with what it imports directly, not counting what only its tests import.
type Imports = BTreeMap<String, BTreeSet<String>>;

/// Every rule that is broken, a sentence each.
fn violations(imports: &Imports, workspace: &BTreeSet<String>) -> Vec<String> {
    let mut found = Vec::new();
    for package in workspace {
        if !RULES.iter().any(|rule| rule.package == package) {
            found.push(format!("{package} has no rule"));
        }
    }
    for Rule { package, may, never } in RULES {
        let direct = imports.get(package).cloned().unwrap_or_default();
        for import in direct.intersection(workspace).filter(|import| !may.contains(&import.as_str())) {
            found.push(format!("{package} may not import {import}"));
        }
        let (mut reached, mut new) = (BTreeSet::new(), direct);
        while let Some(next) = new.pop_first() {
            if reached.insert(next.clone()) {
                new.extend(imports.get(&next).cloned().unwrap_or_default());
            }
        }
        found.extend(
            never.iter().filter(|never| reached.contains(**never)).map(|n| format!("{package} may never reach {n}")),
        );
    }
    found
}

/// The imports of this workspace and of everything it is built from, for the platform it is built on.
fn actual() -> (Imports, BTreeSet<String>) {
    let metadata = MetadataCommand::new()
        .manifest_path(repository("Cargo.toml"))
        .other_options(["--locked", "--filter-platform", "host-tuple"].map(str::to_owned))
        .exec()
        .unwrap();
    let workspace = metadata.workspace_packages().iter().map(|package| package.name.to_string()).collect();
    let names: BTreeMap<_, _> = metadata.packages.iter().map(|p| (p.id.clone(), p.name.to_string())).collect();
    let mut imports = Imports::new();
    for node in &metadata.resolve.as_ref().unwrap().nodes {
        let built_in = node.deps.iter().filter(|dep| {
            dep.dep_kinds.iter().any(|kind| matches!(kind.kind, DependencyKind::Normal | DependencyKind::Build))
        });
        imports.entry(names[&node.id].clone()).or_default().extend(built_in.map(|dep| names[&dep.pkg].clone()));
    }
    (imports, workspace)
}

#[test]
fn the_import_rules_hold() {
    let (imports, workspace) = actual();
    assert_eq!(violations(&imports, &workspace), Vec::<String>::new());
}

#[test]
fn a_forbidden_import_is_noticed() {
    let (imports, workspace) = actual();
    let cases = [
        ("sirocco-model", "tonic", "sirocco-model may never reach tonic"),
        ("sirocco-types", "tokio", "sirocco-types may never reach tokio"),
        ("sirocco-coordinator", "sirocco-model", "sirocco-coordinator may not import sirocco-model"),
        ("sirocco-router-node", "sirocco-expert-node", "sirocco-router-node may never reach sirocco-expert-node"),
        ("cudarc", "tokio", "sirocco-compute may never reach tokio"),
    ];
    for (package, import, complaint) in cases {
        let mut imports = imports.clone();
        imports.entry(package.into()).or_default().insert(import.into());
        assert!(violations(&imports, &workspace).contains(&complaint.to_owned()), "{complaint}");
    }
    let workspace = workspace.into_iter().chain(["sirocco-new".to_owned()]).collect();
    assert_eq!(violations(&imports, &workspace), ["sirocco-new has no rule"]);
}

/// Every Rust source file below `folder`, not counting build output.
fn sources(folder: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_crate_but_compute_forbids_unsafe() {
    let mut files = Vec::new();
    sources(&repository(""), &mut files);
    let roots = files.iter().filter(|path| {
        (path.ends_with("src/lib.rs") || path.ends_with("src/main.rs")) && !path.ends_with("crates/compute/src/lib.rs")
    });
    let roots: Vec<_> = roots.collect();
    assert!(roots.len() >= 12);
    for root in roots {
        let text = std::fs::read_to_string(root).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{} allows unsafe", root.display());
    }
}

#[test]
fn no_file_outgrows_its_reader() {
    let mut files = Vec::new();
    sources(&repository(""), &mut files);
    for file in files {
        let lines = std::fs::read_to_string(&file).unwrap().lines().count();
        assert!(lines <= 600, "{} has {lines} lines; past 600 there are two files in it", file.display());
    }
}
