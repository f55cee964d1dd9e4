//! The walls of the house, as `docs/ARCHITECTURE.md` draws them: who may touch the world, and which way arrows go.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The rooms in flow order: each may use those before it.
const FLOW: [&str; 55] = [
    "net",
    "config",
    "eni",
    "policy",
    "metadata",
    "holdings",
    "proof",
    "doubt",
    "markers",
    "container_network",
    "selection",
    "cover",
    "desired",
    "operation",
    "place",
    "precedence",
    "plan",
    "fib",
    "explain",
    "typo",
    "layout",
    "readiness",
    "tally",
    "whole_file",
    "history",
    "ledger",
    "release",
    "rollback",
    "trial",
    "snapshot",
    "doctor",
    "report",
    "metrics",
    "metrics_file",
    "config_files",
    "machine_files",
    "imds",
    "lock",
    "netlink",
    "snapshot_file",
    "reading",
    "run",
    "trouble",
    "undo",
    "reconcile",
    "confirm",
    "fights",
    "service",
    "watch",
    "wait",
    "status",
    "stderr",
    "journal",
    "cli",
    "main",
];

/// These compute; everything else may touch the world.
const PURE: [&str; 29] = [
    "net",
    "config",
    "eni",
    "policy",
    "metadata",
    "holdings",
    "proof",
    "doubt",
    "markers",
    "container_network",
    "selection",
    "cover",
    "desired",
    "operation",
    "place",
    "precedence",
    "plan",
    "fib",
    "explain",
    "typo",
    "layout",
    "readiness",
    "snapshot",
    "doctor",
    "release",
    "rollback",
    "fights",
    "metrics",
    "status",
];

/// Edges against the flow that are part of the drawing: `config`'s defaults are `policy`'s numbers.
const BOTH_WAYS: [(&str, &str); 1] = [("config", "policy")];

fn sources() -> BTreeMap<String, Vec<(PathBuf, String)>> {
    fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, files);
            } else {
                files.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    let mut rooms: BTreeMap<String, Vec<(PathBuf, String)>> = BTreeMap::new();
    for file in files.into_iter().filter(|file| !file.ends_with("lib.rs")) {
        let inside = file.strip_prefix(&root).unwrap();
        let room = inside.iter().next().unwrap().to_string_lossy().trim_end_matches(".rs").to_string();
        let text = fs::read_to_string(&file).unwrap();
        // A room's own tests may do as they like, and comments may name anything.
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let code: Vec<&str> = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        rooms.entry(room).or_default().push((file, code.join("\n")));
    }
    rooms
}

fn find(code: &str, words: &[&str]) -> Option<String> {
    words.iter().find(|word| code.contains(**word)).map(|word| word.to_string())
}

#[test]
fn every_room_is_in_the_drawing() {
    let rooms = sources();
    let drawn: Vec<&str> = FLOW.to_vec();
    assert_eq!(rooms.keys().filter(|room| !drawn.contains(&room.as_str())).collect::<Vec<_>>(), Vec::<&String>::new());
    assert_eq!(drawn.iter().filter(|room| !rooms.contains_key(**room)).collect::<Vec<_>>(), Vec::<&&str>::new());
}

#[test]
fn pure_rooms_do_not_touch_the_world() {
    let world = [
        "rtnetlink",
        "netlink_packet",
        "hyper",
        "tokio",
        "std::fs",
        "std::env",
        "std::process",
        "std::time",
        "fs::",
        "async fn",
        "SystemTime",
        "Instant",
        "tracing::",
        "println!",
    ];
    for (room, files) in sources().iter().filter(|(room, _)| PURE.contains(&room.as_str())) {
        for (file, code) in files {
            assert_eq!(find(code, &world), None, "{room}: {}", file.display());
        }
    }
}

#[test]
fn netlink_stays_in_its_room_and_so_does_http() {
    for (room, files) in &sources() {
        for (file, code) in files {
            let mut foreign = Vec::new();
            if room != "netlink" {
                foreign.extend(["rtnetlink", "netlink_packet", "netlink_sys"]);
            }
            if room != "imds" {
                foreign.push("hyper");
            }
            assert_eq!(find(code, &foreign), None, "{}", file.display());
        }
    }
}

#[test]
fn arrows_go_one_way() {
    let rank = |room: &str| FLOW.iter().position(|name| *name == room).unwrap();
    for (room, files) in &sources() {
        for (file, code) in files {
            for used in FLOW.iter().filter(|used| **used != room) {
                let names = [format!("crate::{used}::"), format!("crate::{used};"), format!("{{{used}::")];
                let uses = names.iter().any(|name| code.contains(name)) || uses_in_braces(code, used);
                let is_drawn = BOTH_WAYS.contains(&(room.as_str(), used));
                assert!(!uses || is_drawn || rank(used) < rank(room), "{} uses {used}", file.display());
            }
        }
    }
}

/// `use crate::{lock, metadata::…}`.
fn uses_in_braces(code: &str, used: &str) -> bool {
    let lists = code.split("use crate::{").skip(1).filter_map(|rest| rest.split(';').next());
    lists.flat_map(|list| list.split([',', '{', '}'])).any(|item| {
        let item = item.trim();
        item == used || item.starts_with(&format!("{used}::"))
    })
}

#[test]
fn no_failure_turns_into_an_empty_answer_at_the_doors() {
    for (room, files) in sources().iter().filter(|(room, _)| ["imds", "netlink"].contains(&room.as_str())) {
        for (file, code) in files {
            let soft: Vec<&str> = code.lines().filter(|line| line.contains("await.unwrap_or")).collect();
            assert_eq!(soft, Vec::<&str>::new(), "{room}: {}", file.display());
        }
    }
}

/// The judge is independent: it knows the binary by its path alone.
#[test]
fn the_judge_shares_no_code_with_eniup() {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vpc-lab");
    let manifest = fs::read_to_string(lab.join("Cargo.toml")).unwrap();
    let dependencies = manifest.split("[dependencies]").nth(1).expect("it has dependencies");
    assert!(!dependencies.lines().any(|line| line.trim_start().starts_with("eniup")), "{dependencies}");
    for folder in ["src", "tests"] {
        for entry in fs::read_dir(lab.join(folder)).unwrap() {
            let file = entry.unwrap().path();
            let text = fs::read_to_string(&file).unwrap();
            assert_eq!(find(&text, &["eniup::", "#[path", "include!(\"../../.."]), None, "{}", file.display());
        }
    }
}
