//! The configuration: what the files mean, how mistakes are told, and that a bad one changes nothing.

mod support;

use std::fs;

use anyhow::{Context, Result, ensure};
use eniup::config::{self, Config, File, Problems, Rules, Settings};
use support::machine::{Machine, difference, dump, inside, with_scenario};

fn read(text: &str) -> Result<Settings, Problems> {
    config::read(&[File { name: "a.toml".into(), text: text.into() }])
}

/// Line, column and what is wrong, of each mistake.
fn mistakes(text: &str) -> Vec<(usize, usize, String)> {
    let problems = read(text).err().map(|problems| problems.0).unwrap_or_default();
    problems.into_iter().map(|problem| (problem.line, problem.column, problem.what)).collect()
}

#[test]
fn no_file_and_an_empty_file_mean_the_defaults() {
    assert_eq!(config::read(&[]).unwrap().config, Config::default());
    assert_eq!(read("# nothing\n").unwrap().config, Config::default());
}

#[test]
fn every_key_reaches_its_field() {
    let text = "rules = 'per-address'\ntimeout = '2m'\n[numbers]\nmark = 200\ntable_base = 21_000\n\
                guard_priority = 0x4E20\nsubnet_rule_offset = 3_500\nlink_group = 7\n";
    let expected = Config {
        mark: 200,
        table_base: 21_000,
        guard_priority: 20_000,
        subnet_rule_offset: 3_500,
        link_group: 7,
        rules: Rules::PerAddress,
        timeout: std::time::Duration::from_secs(120),
    };
    let settings = read(text).unwrap();
    assert_eq!(settings.config, expected);
    assert_eq!(settings.origins["numbers.mark"].to_string(), "a.toml:4");
}

#[test]
fn all_mistakes_are_told_at_once_each_with_its_place() {
    let text = "ruls = 'per-address'\nrules = 'per-adress'\ntimeout = 30\n[numbers]\nmark = 2\n  table-base = 1\n";
    let expected = [
        (1, 1, "unknown key `ruls`"),
        (2, 9, "`rules`: \"per-adress\" is not one of \"aggregated\", \"per-address\""),
        (3, 11, "`timeout`: a text in quotes is expected, not a whole number"),
        (5, 8, "`mark`: protocol 2 is the kernel's, and eniup removes what carries its mark"),
        (6, 3, "unknown key `table-base`"),
    ];
    let expected: Vec<_> = expected.iter().map(|(line, column, what)| (*line, *column, what.to_string())).collect();
    assert_eq!(mistakes(text), expected);
}

#[test]
fn broken_toml_does_not_hide_what_is_wrong_elsewhere_in_the_file() {
    let lines: Vec<usize> = mistakes("rules = \ntimeout \"3\"\nruls = 1\n").iter().map(|(line, ..)| *line).collect();
    assert_eq!(lines, [1, 2, 3]);
}

#[test]
fn the_offending_text_is_underlined_and_the_nearest_word_offered() {
    let shown = read("# wide: 語\nruls = \"per-address\"\n").unwrap_err().to_string();
    let expected = "\
the configuration has 1 error; nothing was changed

error: unknown key `ruls`
 --> a.toml:2:1
  |
2 | ruls = \"per-address\"
  | ^^^^
  |
  = help: did you mean `rules`?";
    assert_eq!(shown, expected);
}

#[test]
fn numbers_that_cannot_be_together_are_told_where_the_last_of_them_stands() {
    let (line, _, what) = mistakes("[numbers]\nguard_priority = 20000\n").remove(0);
    assert!(line == 2 && what.contains("below `table_base` (20000)"), "{what}");
    let (line, _, what) = mistakes("[numbers]\nlink_group = 3\ntable_base = 25000\n").remove(0);
    assert!(line == 3 && what.contains("32766"), "{what}");
}

fn write(machine: &Machine, text: &str) -> Result<String> {
    fs::create_dir_all(&machine.directory)?;
    let file = machine.directory.join("config.toml");
    fs::write(&file, text)?;
    Ok(file.display().to_string())
}

#[test]
fn a_bad_file_changes_nothing_and_every_verb_says_so() {
    inside(|| {
        with_scenario("three-enis-of-which-two-share", |machine| {
            machine.reconcile(0)?;
            let before = dump()?;
            let file = write(machine, "ruls = 'per-address'\n[numbers]\nmark = 0\n")?;
            for verb in ["reconcile", "reconcile --dry-run", "plan", "status", "release", "release --dry-run"] {
                let run = machine.eniup(&format!("{verb} --config {file}"))?;
                ensure!(run.exit == 78 && run.stdout.is_empty(), "{verb}: exit {}: {}", run.exit, run.stdout);
                for words in ["config.toml:1:1", "`rules`", "config.toml:3:8", "2 errors"] {
                    ensure!(run.stderr.contains(words), "{verb}: `{words}` is missing: {}", run.stderr);
                }
            }
            ensure!(difference(&before, &dump()?).is_empty(), "something was changed");
            Ok(())
        })
    });
}

#[test]
fn a_file_that_was_asked_for_and_cannot_be_read_is_named() {
    inside(|| {
        with_scenario("three-enis-of-which-two-share", |machine| {
            let latin = machine.directory.join("latin.toml");
            fs::create_dir_all(&machine.directory)?;
            fs::write(&latin, b"# caf\xe9\n")?;
            let latin = latin.display().to_string();
            for (file, words) in [
                ("/run/nothing.toml", "No such file"),
                ("/run", "Is a directory"),
                ("/dev/zero", "larger than 1 MiB"),
                (&latin, "not UTF-8 (byte 5)"),
            ] {
                let run = machine.eniup(&format!("plan --config {file}"))?;
                ensure!(run.exit == 78 && run.stdout.is_empty(), "{file}: exit {}: {}", run.exit, run.stdout);
                ensure!(run.stderr.contains(file) && run.stderr.contains(words), "{file}: {}", run.stderr);
            }
            Ok(())
        })
    });
}

#[test]
fn the_form_of_the_rules_is_chosen_in_the_file() {
    inside(|| {
        with_scenario("three-enis-of-which-two-share", |machine| {
            let file = write(machine, "rules = 'per-address'\n")?;
            let few = machine.eniup("plan")?.stdout.matches(" rule add ").count();
            let many = machine.eniup(&format!("plan --config {file}"))?.stdout.matches(" rule add ").count();
            ensure!(many > few, "{many} rules with one for each address, {few} otherwise");
            let run = machine.eniup(&format!("reconcile --config {file}"))?;
            ensure!(run.exit == 0, "exit {}: {}", run.exit, run.stderr);
            let plan = machine.eniup(&format!("plan --detailed-exitcode --config {file}"))?;
            ensure!(plan.exit == 0 && plan.stdout.is_empty(), "something is left to do: {}", plan.stdout);
            Ok(())
        })
        .context("per-address")
    });
}
