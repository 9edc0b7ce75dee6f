//! What no compiler checks about this repository: its arrows, its names, its lists.

#![allow(clippy::unwrap_used, missing_docs, reason = "this is test code")]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

/// The workspace's packages, each with what it ships with.
fn packages() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let package = |package: &Value| {
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        let shipped = dependencies.filter(|one| one["kind"].is_null()).map(|one| text(&one["name"]));
        (text(&package["name"]), shipped.collect())
    };
    metadata["packages"].as_array().unwrap().iter().map(package).collect()
}

fn functions() -> BTreeSet<String> {
    let entries = std::fs::read_dir(root().join("functions")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn dependencies_point_one_way() {
    let packages = packages();
    let functions = functions();
    for (name, dependencies) in &packages {
        let own: BTreeSet<_> = dependencies.iter().filter(|one| packages.contains_key(*one)).collect();
        let allowed: &[&str] = match name.as_str() {
            "proto" => &[],
            "edge" | "agentd" => &["proto"],
            "exchange" => &["edge", "proto"],
            "ingress" | "relay" => &["exchange", "edge", "proto"],
            function if functions.contains(function) => &["edge", "proto"],
            // What tries and measures the others may use them all.
            _ => continue,
        };
        assert!(own.iter().all(|one| allowed.contains(&one.as_str())), "{name} depends on {own:?}");
        let sdks = dependencies.iter().filter(|one| one.starts_with("aws-sdk-")).count();
        assert!(name == "edge" || sdks == 0, "{name} names an AWS SDK");
    }
    for name in ["tokio", "reqwest", "hyper", "tokio-tungstenite", "getrandom"] {
        assert!(!packages["proto"].contains(name), "proto depends on {name}");
    }
}

#[test]
fn architecture_names_every_package() {
    let text = read("ARCHITECTURE.md");
    let functions = functions();
    for name in packages().keys() {
        let named = if functions.contains(name) {
            text.lines().any(|line| line.starts_with("`functions/{") && line.contains(name.as_str()))
        } else {
            text.contains(&format!("`{name}/`"))
        };
        assert!(named, "ARCHITECTURE.md does not name {name}");
    }
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn no_module_is_a_drawer() {
    let mut files = Vec::new();
    for folder in
        ["proto", "edge", "exchange", "relay", "functions", "agentd", "local", "tests/harness", "bench"]
    {
        sources(&root().join(folder), &mut files);
    }
    assert!(files.len() > 100);
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let drawers = ["util", "utils", "common", "helper", "helpers", "misc", "constants", "types"];
        assert!(!drawers.contains(&name), "{}", file.display());
    }
}

#[test]
fn errors_that_the_state_machine_names_exist() {
    let machine: Value = serde_json::from_str(&read("statemachines/public_request.asl.json")).unwrap();
    for (name, state) in machine["States"].as_object().unwrap() {
        for handler in ["Retry", "Catch"] {
            for rule in state[handler].as_array().into_iter().flatten() {
                let errors: Vec<_> = rule["ErrorEquals"].as_array().unwrap().iter().collect();
                for error in &errors {
                    let (service, kind) = error.as_str().unwrap().split_once('.').unwrap();
                    let known = match service {
                        "States" => ["ALL", "Timeout", "TaskFailed"].contains(&kind),
                        "ApiGateway" => kind.len() == 3 && kind.parse::<u16>().is_ok(),
                        "DynamoDb" | "Sqs" => kind.ends_with("Exception"),
                        _ => false,
                    };
                    assert!(known, "{name}: {error}");
                    assert!(*error != "States.ALL" || errors.len() == 1, "{name}: States.ALL stands alone");
                }
            }
        }
        assert!(state["Comment"].is_string(), "{name} does not say why it exists");
    }
}

#[test]
fn tools_are_pinned_and_lock_files_name_no_host() {
    let package: Value = serde_json::from_str(&read("package.json")).unwrap();
    for (name, version) in package["devDependencies"].as_object().unwrap() {
        let version = version.as_str().unwrap();
        assert!(version.chars().all(|c| c.is_ascii_digit() || c == '.'), "{name} is not pinned: {version}");
    }
    let lock: Value = serde_json::from_str(&read("package-lock.json")).unwrap();
    for (name, package) in lock["packages"].as_object().unwrap() {
        assert!(package["resolved"].is_null(), "{name} names where it came from");
        assert!(name.is_empty() || package["integrity"].is_string(), "{name} has no checksum");
    }
}
