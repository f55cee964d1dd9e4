//! What is packaged calls the binary as it is, in a sandbox, with no logic of its own. `tests/system` runs it.

// Only tools other than ip(8) are needed here.
#[allow(dead_code)]
#[path = "support/tools.rs"]
mod tools;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// `systemd-analyze security` tells exposure in tenths, up to 100.
const EXPOSURE: &str = "20";

fn packaging(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging").join(file)
}

fn units() -> Vec<PathBuf> {
    let files = fs::read_dir(packaging("systemd")).unwrap().map(|entry| entry.unwrap().path());
    let units: Vec<PathBuf> = files.filter(|file| file.extension().is_some_and(|kind| kind != "preset")).collect();
    assert!(units.len() >= 5);
    units
}

fn services() -> Vec<PathBuf> {
    units().into_iter().filter(|unit| unit.extension().is_some_and(|kind| kind == "service")).collect()
}

fn systemd_analyze(arguments: &[&str], units: &[PathBuf]) -> Output {
    let mut command = Command::new("systemd-analyze");
    command.env("PATH", tools::path_to("systemd-analyze")).args(arguments).args(units).output().unwrap()
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat()
}

#[test]
fn each_service_is_exposed_to_two_of_ten_at_most() {
    for service in services() {
        let arguments = ["security", "--offline=yes", "--no-pager", "--threshold", EXPOSURE];
        let output = systemd_analyze(&arguments, std::slice::from_ref(&service));
        let said = said(&output);
        assert!(output.status.success() && said.contains("Overall exposure level"), "{said}");
    }
}

#[test]
fn systemd_has_nothing_to_say_against_the_units() {
    let folder = tempfile::tempdir().unwrap();
    let installed: Vec<PathBuf> = units()
        .iter()
        .map(|unit| {
            // systemd looks whether the program is there.
            let text = fs::read_to_string(unit).unwrap().replace("/usr/sbin/eniup", env!("CARGO_BIN_EXE_eniup"));
            let copy = folder.path().join(unit.file_name().unwrap());
            fs::write(&copy, text).unwrap();
            copy
        })
        .collect();
    let output = systemd_analyze(&["verify", "--man=no"], &installed);
    assert!(output.status.success() && said(&output).is_empty(), "{}", said(&output));
}

/// Every service has the same one, so that a reader has to understand it once.
#[test]
fn the_sandbox_is_the_same_everywhere() {
    let sandbox = |service: &PathBuf| {
        let text = fs::read_to_string(service).unwrap();
        let begin = text.find("CapabilityBoundingSet=CAP_NET_ADMIN\n").expect("a sandbox begins with it");
        let end = text.find("IPAddressAllow=169.254.169.254 fd00:ec2::254\n").expect("a sandbox ends with it");
        text[begin..end].to_string()
    };
    let sandboxes: Vec<String> = services().iter().map(sandbox).collect();
    assert!(sandboxes.len() >= 3 && sandboxes.iter().all(|other| *other == sandboxes[0]));
}

/// Whoever installs the package has to enable it.
#[test]
fn what_can_be_enabled_is_disabled_by_the_presets() {
    let presets = fs::read_to_string(packaging("systemd/90-eniup.preset")).unwrap();
    for unit in units() {
        let name = unit.file_name().unwrap().to_string_lossy().into_owned();
        let can_be_enabled = fs::read_to_string(&unit).unwrap().contains("[Install]");
        assert_eq!(presets.lines().any(|line| line == format!("disable {name}")), can_be_enabled, "{name}");
    }
    assert!(!presets.lines().any(|line| line.starts_with("enable")));
}

/// A rule marks that something has happened, for drivers of EC2's and only where somebody waits for it; the unit does the rest.
#[test]
fn the_udev_rule_does_no_more_than_leave_a_file() {
    let rules = fs::read_to_string(packaging("udev/99-eniup.rules")).unwrap();
    let actions: Vec<&str> = rules.lines().filter(|line| line.contains("+=") || line.contains(":=")).collect();
    let named = r#"ENV{ID_NET_DRIVER}=="ena|ixgbevf|vif", RUN+="/bin/touch /run/eniup/hotplug/event""#;
    let unnamed = r#"ENV{ID_NET_DRIVER}!="?*", DRIVERS=="ena|ixgbevf|vif", RUN+="/bin/touch /run/eniup/hotplug/event""#;
    assert_eq!(actions, [named, unnamed]);
    let path = fs::read_to_string(packaging("systemd/eniup-hotplug.path")).unwrap();
    assert!(path.contains("DirectoryNotEmpty=/run/eniup/hotplug\n"));
    assert!(rules.contains("TEST!=\"/run/eniup/hotplug\", GOTO"));
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

/// The numbers that ip(8) shows names for.
fn names(file: &str) -> Vec<(u32, String)> {
    let text = fs::read_to_string(packaging(file)).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (number, name) = line.split_once('\t').unwrap();
            (number.parse().unwrap(), name.to_string())
        })
        .collect()
}

#[test]
fn the_protocol_has_the_number_of_our_mark() {
    assert_eq!(names("iproute2/rt_protos.d/eniup.conf"), [(eniup::policy::MARK.into(), "eniup".to_string())]);
}

#[test]
fn the_tables_have_the_numbers_of_the_first_cards_enis() {
    let config = eniup::config::Config::default();
    for (number, name) in names("iproute2/rt_tables.d/eniup.conf") {
        let device_number = name.strip_prefix("eniup-").unwrap().parse().unwrap();
        assert_eq!(number, eniup::policy::table(&config, eniup::eni::Slot { network_card: 0, device_number }));
    }
}

/// The file that is installed says nothing, and what it proposes is right.
#[test]
fn the_default_configuration_is_empty_and_its_examples_are_right() {
    let text = fs::read_to_string(packaging("config.toml")).unwrap();
    assert!(text.lines().all(|line| line.is_empty() || line.starts_with('#')));
    let examples: String =
        text.lines().filter_map(|line| line.strip_prefix('#')).map(|line| format!("{line}\n")).collect();
    let examples = examples.lines().filter(|line| !line.starts_with(' ')).collect::<Vec<_>>().join("\n");
    let file = eniup::config::File { name: "config.toml".into(), text: Ok(examples) };
    if let Err(problems) = eniup::config::read(&[file]) {
        panic!("{problems}");
    }
}

/// What a page that is installed links to is installed, too.
#[test]
fn no_installed_page_links_to_one_that_is_not() {
    let build = fs::read_to_string(packaging("build")).unwrap();
    let mut loops = build.lines().filter_map(|line| line.trim().strip_prefix("for page in ")?.strip_suffix("; do"));
    let pages = loops.find(|pages| pages.contains("docs/")).expect("a loop over the documentation");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let listed = Command::new("sh").arg("-c").arg(format!("printf '%s\n' {pages}")).current_dir(root).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    // Each format has the changelog under a name of its own.
    let pages = listed.lines().chain(["CHANGELOG.md"]);
    let installed: Vec<PathBuf> = pages.map(|page| root.join(page).canonicalize().unwrap()).collect();
    let mut links = 0;
    for page in installed.iter().filter(|page| page.extension().is_some_and(|kind| kind == "md")) {
        let text = fs::read_to_string(page).unwrap();
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
        for target in targets.filter(|target| !target.is_empty() && !target.contains("://")) {
            links += 1;
            let file = page.parent().unwrap().join(target).canonicalize().ok();
            let is_installed = file.is_some_and(|file| installed.contains(&file));
            assert!(is_installed, "{} links to {target}", page.display());
        }
    }
    assert!(links > 20, "{links} links");
}
