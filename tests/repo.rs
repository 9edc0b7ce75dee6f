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

/// `docs/claims.md`: the words stand where it says, and each test that proves them exists.
#[test]
fn every_claim_stands_where_it_is_said_to_and_has_its_tests() {
    let page = read("docs/claims.md");
    let rows: Vec<_> =
        page.lines().filter(|line| line.starts_with("| ") && line.contains(".md | ")).collect();
    assert!(rows.len() > 30, "{}", rows.len());
    for row in rows {
        assert_eq!(claim(row, &|path| std::fs::read_to_string(root().join(path)).ok()), Ok(()), "{row}");
    }
}

/// README says what goes through and which error means what: every row of it is among the claims.
#[test]
fn every_row_of_what_goes_through_is_claimed() {
    let (readme, page) = (read("README.md"), read("docs/claims.md"));
    let (_, section) = readme.split_once("## What goes through, and what does not").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| |"));
    let rows: Vec<_> = rows.filter(|row| !row.starts_with("| status |")).collect();
    assert!(rows.len() > 30, "{}", rows.len());
    let words: Vec<_> =
        page.lines().filter_map(|line| line.strip_prefix("| README.md | ")?.split(" | ").next()).collect();
    for row in rows {
        assert!(words.iter().any(|words| row.contains(words)), "docs/claims.md claims nothing of: {row}");
    }
}

/// What a front costs is the same on both pages; a test of `cost` holds the one that is computed.
#[test]
fn a_front_costs_the_same_on_both_pages() {
    let (fronts, cost) = (read("docs/aws-fronts.md"), read("docs/cost.md"));
    let row = fronts.lines().find(|line| line.starts_with("| price of a million small requests |")).unwrap();
    let prices: Vec<_> = row.split('|').skip(2).take(3).map(str::trim).collect();
    let computed = ["none", "cloudfront", "httpapi"].map(|front| {
        let row = cost.lines().find(|line| line.starts_with(&format!("| `{front}` | $"))).unwrap();
        row.split('|').nth(2).unwrap().trim()
    });
    assert_eq!(prices, computed);
}

/// `docs/aws-fronts.md`: whatever is imitated names the tests that try it.
#[test]
fn whatever_is_imitated_of_a_front_has_its_test() {
    let page = read("docs/aws-fronts.md");
    let (_, table) = page.split_once("## What `local` imitates").unwrap();
    let rows: Vec<_> =
        table.lines().filter(|line| line.starts_with("| `") && !line.contains("--kind")).collect();
    assert!(rows.len() >= 18, "{}", rows.len());
    for row in rows {
        let proofs = row.trim_matches('|').split(" | ").nth(4).unwrap_or_default();
        assert_eq!(
            tests_exist(proofs, &|path| std::fs::read_to_string(root().join(path)).ok()),
            Ok(()),
            "{row}"
        );
    }
}

/// What is wrong with a row of the claims, where a file's text is as `text` says.
fn claim(row: &str, text: &dyn Fn(&str) -> Option<String>) -> Result<(), String> {
    let cells: Vec<_> = row.trim_matches('|').split(" | ").map(str::trim).collect();
    let [place, words, proofs] = cells[..] else { return Err("not three cells".into()) };
    let stands = text(place).ok_or_else(|| format!("no {place}"))?;
    if !stands.contains(words) {
        return Err(format!("{place} does not say so"));
    }
    tests_exist(proofs, text)
}

/// What is wrong with tests that are named as `file::test` between backquotes.
fn tests_exist(proofs: &str, text: &dyn Fn(&str) -> Option<String>) -> Result<(), String> {
    let proofs: Vec<_> = proofs.split('`').filter(|proof| proof.contains("::")).collect();
    if proofs.is_empty() {
        return Err("nothing proves it".into());
    }
    for proof in proofs {
        let (file, test) =
            proof.split_once("::").ok_or_else(|| format!("{proof} names no test of a file"))?;
        let code = text(file).ok_or_else(|| format!("no {file}"))?;
        let is_test = |at: usize| {
            // The attribute stands before it, with at most a comment between.
            let before: Vec<_> = code[..at].lines().rev().take(3).collect();
            before.iter().any(|line| line.contains("#[test]") || line.contains("#[tokio::test"))
        };
        let found = code.find(&format!("fn {test}(")).filter(|&at| is_test(at));
        found.ok_or_else(|| format!("no test {proof}"))?;
    }
    Ok(())
}

#[test]
fn a_claim_without_its_words_or_its_test_is_seen() {
    let text = |path: &str| match path {
        "A.md" => Some("It holds.".to_owned()),
        "t.rs" => Some("#[tokio::test(x)]\nasync fn it_holds() {}\n".to_owned()),
        _ => None,
    };
    for (row, is_right) in [
        ("| A.md | It holds. | `t.rs::it_holds` |", true),
        ("| A.md | It flies. | `t.rs::it_holds` |", false),
        ("| B.md | It holds. | `t.rs::it_holds` |", false),
        ("| A.md | It holds. | `t.rs::it_flies` |", false),
        ("| A.md | It holds. | `t.rs::it_holds` `u.rs::it_holds` |", false),
        ("| A.md | It holds. | by nothing |", false),
    ] {
        assert_eq!(claim(row, &text).is_ok(), is_right, "{row}");
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

/// A module's own path of names, and what it names of its package's other modules.
fn modules(source: &Path) -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let mut files = Vec::new();
    sources(source, &mut files);
    let path_of = |file: &Path| -> Vec<String> {
        let relative = file.strip_prefix(source).unwrap().with_extension("");
        let names: Vec<_> = relative.iter().map(|name| name.to_str().unwrap().to_owned()).collect();
        if matches!(names.as_slice(), [only] if only == "lib" || only == "main") { Vec::new() } else { names }
    };
    let known: BTreeSet<_> = files.iter().map(|file| path_of(file)).collect();
    let mut found = BTreeMap::new();
    for file in &files {
        let own = path_of(file);
        // What a package's root names is what it is made of; tests may look at whatever they like.
        if own.is_empty() || own.last().is_some_and(|name| name == "tests") {
            continue;
        }
        let text = std::fs::read_to_string(file).unwrap();
        let text = text.split("#[cfg(test)]").next().unwrap();
        let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        let text: String = lines.flat_map(|line| [line, "\n"]).collect();
        let mut named = BTreeSet::new();
        for path in paths(&text, &own) {
            // The longest of it that is a module; below that it names an item.
            let module =
                (1..=path.len()).rev().map(|length| &path[..length]).find(|path| known.contains(*path));
            named.extend(module.filter(|module| *module != own.as_slice()).map(<[String]>::to_vec));
        }
        // A folder's module and what is in its folder are one: the one declares the other.
        named.retain(|module| !module.starts_with(&own) && !own.starts_with(module));
        found.insert(own, named);
    }
    found
}

/// Every path of names in `text` that begins at the package or beside `own`, with groups in braces taken apart.
fn paths(text: &str, own: &[String]) -> Vec<Vec<String>> {
    fn take(text: &str, before: &[String], found: &mut Vec<Vec<String>>) -> usize {
        let mut path = before.to_vec();
        let mut at = 0;
        loop {
            let rest = &text[at..];
            let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if rest.starts_with('{') {
                at += 1;
                loop {
                    at += text[at..].len() - text[at..].trim_start_matches([',', ' ', '\n']).len();
                    match text[at..].chars().next() {
                        None => return at,
                        Some('}') => return at + 1,
                        Some(_) => match take(&text[at..], &path, found) {
                            0 => at += text[at..].chars().next().map_or(1, char::len_utf8),
                            taken => at += taken,
                        },
                    }
                }
            }
            at += name.len();
            if !name.is_empty() {
                path.push(name);
            }
            if text[at..].starts_with("::") {
                at += 2;
            } else {
                found.push(path);
                return at;
            }
        }
    }
    let mut found = Vec::new();
    for (mark, before) in [("crate::", &[][..]), ("super::", &own[..own.len() - 1])] {
        for (at, _) in text.match_indices(mark) {
            let is_whole = !text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':');
            if is_whole {
                take(&text[at + mark.len()..], before, &mut found);
            }
        }
    }
    found
}

/// The modules that reach each other, each circle once, as `package: a, b`.
fn circles(package: &str, modules: &BTreeMap<Vec<String>, BTreeSet<Vec<String>>>) -> BTreeSet<String> {
    let reach = |from: &Vec<String>| {
        let mut seen: BTreeSet<&Vec<String>> = BTreeSet::new();
        let mut open: Vec<_> = modules[from].iter().collect();
        while let Some(next) = open.pop() {
            if seen.insert(next) {
                open.extend(modules.get(next).into_iter().flatten());
            }
        }
        seen
    };
    let reached: BTreeMap<_, _> = modules.keys().map(|module| (module, reach(module))).collect();
    let mut found = BTreeSet::new();
    for (module, seen) in &reached {
        if seen.contains(module) {
            let circle =
                seen.iter().filter(|other| reached.get(*other).is_some_and(|back| back.contains(module)));
            let names: Vec<_> = circle.map(|path| path.join("::")).collect();
            found.insert(format!("{package}: {}", names.join(", ")));
        }
    }
    found
}

#[test]
fn modules_know_each_other_in_one_direction() {
    let mut found = BTreeSet::new();
    let mut seen = 0;
    for folder in ["proto", "edge", "exchange", "relay", "agentd", "local", "cost", "bench"] {
        let modules = modules(&root().join(folder).join("src"));
        seen += modules.values().map(BTreeSet::len).sum::<usize>();
        found.extend(circles(folder, &modules));
    }
    for name in functions() {
        found.extend(circles(&name, &modules(&root().join("functions").join(&name).join("src"))));
    }
    assert!(seen > 150, "only {seen} arrows were read");
    assert!(found.is_empty(), "these modules know each other in a circle: {found:#?}");
}

#[test]
fn a_circle_is_seen_whatever_way_it_is_written() {
    let own = ["a".to_owned(), "b".to_owned()];
    let texts = [
        "use crate::{x::{self, Y}, z};",
        "fn f() -> crate::x::Y {} use crate::z as q;",
        "use super::c::{D, e::F};",
    ];
    let read: Vec<Vec<String>> =
        texts.iter().map(|text| paths(text, &own).iter().map(|path| path.join("::")).collect()).collect();
    assert_eq!(read[0], ["x::self", "x::Y", "z"]);
    assert_eq!(read[1], ["x::Y", "z"]);
    assert_eq!(read[2], ["a::c::D", "a::c::e::F"]);
    let path = |name: &str| vec![name.to_owned()];
    let arrows = |names: &[&str]| names.iter().map(|name| path(name)).collect::<BTreeSet<_>>();
    let mut modules =
        BTreeMap::from([(path("a"), arrows(&["b"])), (path("b"), arrows(&["c"])), (path("c"), arrows(&[]))]);
    assert!(circles("p", &modules).is_empty());
    modules.insert(path("c"), arrows(&["a"]));
    assert_eq!(circles("p", &modules), BTreeSet::from(["p: a, b, c".to_owned()]));
}

/// The packages of others that a profile builds in a way of their own, with the level of each.
fn levels(manifest: &str, profile: &str) -> BTreeMap<String, u8> {
    let (_, rest) = manifest.split_once(&format!("[profile.{profile}.package]\n")).unwrap();
    let lines = rest.lines().take_while(|line| !line.starts_with('['));
    let levels = lines.filter_map(|line| {
        let (name, rest) = line.split_once(" = { opt-level = ")?;
        Some((name.to_owned(), rest.strip_suffix(" }")?.parse().unwrap()))
    });
    levels.collect()
}

#[test]
fn what_ships_is_optimised_whatever_a_first_run_does_without() {
    let manifest = read("Cargo.toml");
    let cold: Vec<_> = levels(&manifest, "release").into_iter().filter(|(_, level)| *level < 3).collect();
    assert!(cold.len() > 10, "{cold:?}");
    // `dist` inherits the levels of `release`.
    let ships = levels(&manifest, "dist");
    let slow: Vec<_> = cold.iter().filter(|(name, _)| ships.get(name) != Some(&3)).collect();
    assert!(slow.is_empty(), "these ship as `release` has them: {slow:?}");
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

/// Where the default build cannot be tried, CI says so and why, and goes on.
#[test]
fn what_the_build_for_arm64_lacks_is_said_aloud() {
    use std::os::unix::fs::PermissionsExt as _;
    let rust = read("rust-toolchain.toml");
    let rust = rust.split('"').nth(1).unwrap();
    let no_target = format!(
        "Rust {rust} has no target aarch64-unknown-linux-gnu here; rustup gets it from Rust's own server"
    );
    let listed = "echo aarch64-unknown-linux-gnu";
    for (rustup, cargo, zig, code, words) in [
        ("exit 127", "exit 0", "exit 0", 77, no_target.as_str()),
        ("echo x86_64-unknown-linux-gnu", "exit 0", "exit 0", 77, &no_target),
        (listed, "exit 101", "exit 0", 77, "cargo-lambda is not installed (pip install cargo-lambda=="),
        (listed, "exit 0", "exit 1", 77, "zig is not installed"),
        // It has everything and builds nothing: that is no success.
        (listed, "exit 0", "exit 0", 1, "not a program for arm64"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        for (name, script) in [("rustup", rustup), ("cargo", cargo), ("zig", zig), ("python3", "exit 1")] {
            let file = folder.path().join(name);
            std::fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let output = Command::new(root().join("resources/arm64"))
            .env("PATH", format!("{}:/usr/bin:/bin", folder.path().display()))
            .env("CARGO_TARGET_DIR", folder.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(words), "{words}: {said}");
        assert_eq!(said.contains("THE DEFAULT BUILD (arm64) WAS NOT TRIED"), code == 77, "{said}");
    }
    let run = read(".ci/run");
    assert!(run.contains("resources/arm64 || code=$?") && run.contains("THE DEFAULT BUILD: NOT TRIED"));
}
