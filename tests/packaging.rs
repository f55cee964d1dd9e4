//! What is packaged calls the binary as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn units() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/systemd");
    let units: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!units.is_empty());
    units
}

#[test]
fn every_command_of_a_unit_is_one_that_the_binary_knows() {
    for unit in units() {
        let text = fs::read_to_string(&unit).unwrap();
        let commands: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("ExecStart=")).collect();
        assert!(!commands.is_empty() || unit.extension().is_some_and(|kind| kind != "service"), "{}", unit.display());
        for command in commands {
            let mut words = command.split_whitespace();
            assert_eq!(words.next(), Some("/usr/sbin/eniup"), "{command}");
            // The same words and --help: clap refuses what it does not know before it helps.
            let known = Command::new(env!("CARGO_BIN_EXE_eniup")).args(words.clone()).arg("--help").output().unwrap();
            assert!(known.status.success(), "{command}: {}", String::from_utf8_lossy(&known.stderr));
            let help = String::from_utf8(known.stdout).unwrap();
            for option in words.filter(|word| word.starts_with("--")) {
                assert!(help.contains(option), "{command}: no {option}");
            }
        }
    }
}

#[test]
fn the_protocol_has_the_number_of_our_mark() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/iproute2/eniup.conf");
    let text = fs::read_to_string(file).unwrap();
    let line = text.lines().find(|line| !line.starts_with('#')).unwrap();
    assert_eq!(line.split_whitespace().collect::<Vec<_>>(), [eniup::policy::MARK.to_string().as_str(), "eniup"]);
}
