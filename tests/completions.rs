//! Completion as somebody meets it who types: what the program says may come next, and bash with the script that is installed.

mod support;

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use support::machine::{Machine, drop_capabilities, inside, run, with_two_enis};

/// What may come next, each with what is said of it.
fn candidates(machine: &Machine, words: &[&str]) -> Result<Vec<String>> {
    let run = run(machine.command("complete -- eniup").args(words))?;
    ensure!(run.exit == 0 && run.stderr.is_empty(), "{words:?}: exit {}: {}", run.exit, run.stderr);
    Ok(run.stdout.lines().map(String::from).collect())
}

/// These among others, and none of those.
fn assert_offers(machine: &Machine, words: &[&str], some: &[&str], none: &[&str]) -> Result<()> {
    let offered = candidates(machine, words)?;
    let values: Vec<&str> = offered.iter().map(|line| line.split('\t').next().unwrap_or_default()).collect();
    for value in some {
        ensure!(values.contains(value), "{words:?}: {value} is not offered: {offered:#?}");
    }
    for value in none {
        ensure!(!values.contains(value), "{words:?}: {value} is offered: {offered:#?}");
    }
    Ok(())
}

#[test]
fn commands_options_enis_links_and_addresses_are_offered() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            for (words, some, none) in [
                (&["re"][..], &["reconcile", "release"][..], &["plan", "complete"][..]),
                (&[""], &["plan", "status", "completions"], &["complete"]),
                (&["plan", "--d"], &["--detailed-exitcode"], &["--json", "--dry-run"]),
                (&["--color", ""], &["auto", "always", "never"], &["json"]),
                (&["reconcile", "--log-format", "j"], &["json", "journal"], &["plain"]),
                (&["completions", ""], &["bash", "zsh", "fish"], &[]),
                (&["wait", "--eni", ""], &["eni-02"], &["eth02", "device-number-1"]),
                (&["wait", "--eni=eni-"], &["--eni=eni-02"], &[]),
                (&["wait", "--ip", "10.0.1."], &["10.0.1.20", "10.0.1.21"], &["10.0.0.10", "127.0.0.1"]),
                (&["explain", "--from", ""], &["10.0.0.10", "10.0.1.20"], &["127.0.0.1", "::1"]),
                (&["explain", "--oif", "eth"], &["eth01", "eth02"], &["lo", "peer01"]),
                (&["explain", "--from", "10.0.1.20", "--iif", ""], &["lo", "eth01"], &[]),
            ] {
                assert_offers(machine, words, some, none)?;
            }
            let addresses = candidates(machine, &["explain", "--from", ""])?;
            ensure!(addresses.contains(&"10.0.1.20\teth02".into()), "{addresses:?}");
            ensure!(addresses.iter().any(|line| line.contains(':')), "no IPv6: {addresses:?}");
            ensure!(!addresses.iter().any(|line| line.starts_with("fe80")), "{addresses:?}");
            Ok(())
        })
    });
}

#[test]
fn nobody_who_types_waits_for_metadata_or_reads_an_error() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            machine.service.set_disabled(true);
            fs::create_dir_all("/etc/eniup").ok();
            let begun = Instant::now();
            for words in [
                &["wait", "--eni", ""][..],
                &["frobnicate", ""],
                &["plan", "--metadata", "/nowhere/"],
                &["--config", "/nowhere", "wait", "--ip", ""],
                &["plan", "--timeout", ""],
                &["\u{1b}", "--\u{ff}"],
                &[],
            ] {
                candidates(machine, words)?;
                let mut command = machine.command("complete -- eniup");
                drop_capabilities(command.args(words).env("AWS_EC2_METADATA_SERVICE_ENDPOINT", "nonsense"));
                let run = run(&mut command)?;
                ensure!(run.exit == 0 && run.stderr.is_empty(), "{words:?}: exit {}: {}", run.exit, run.stderr);
            }
            let took = begun.elapsed();
            ensure!(took < Duration::from_secs(5), "{took:?} for 14 of them");
            let nothing = run(&mut machine.command("complete"))?;
            ensure!(nothing.exit == 0 && nothing.stdout.is_empty() && nothing.stderr.is_empty(), "{}", nothing.stderr);
            Ok(())
        })
    });
}

/// What bash would insert for this line, with the cursor at its end.
fn in_bash(machine: &Machine, line: &str) -> Result<Vec<String>> {
    const TYPE: &str = r#"
        set -u
        source <(eniup completions bash)
        complete -p eniup | grep -q -- '-F _eniup eniup$' || exit 3
        COMP_LINE=$1 COMP_POINT=${#1} COMPREPLY=()
        _eniup
        [[ ${#COMPREPLY[@]} -eq 0 ]] || printf '%s\n' "${COMPREPLY[@]}""#;
    in_a_shell(machine, "bash", &["--norc", "--noprofile", "-c", TYPE, "bash", line])
}

/// The lines that a shell prints which has the binary on its PATH.
fn in_a_shell(machine: &Machine, shell: &str, arguments: &[&str]) -> Result<Vec<String>> {
    let binary = std::path::Path::new(env!("CARGO_BIN_EXE_eniup")).parent().context("no folder")?;
    let mut command = support::machine::command(shell);
    let path =
        std::env::join_paths(std::iter::once(binary.into()).chain(std::env::split_paths(support::tools::path())))?;
    command.env("PATH", path).env("AWS_EC2_METADATA_SERVICE_ENDPOINT", &machine.endpoint);
    let run = run(command.args(arguments))?;
    ensure!(run.exit == 0 && run.stderr.is_empty(), "{arguments:?}: exit {}: {}", run.exit, run.stderr);
    Ok(run.stdout.lines().map(String::from).collect())
}

#[test]
#[ignore = "needs zsh: tests/judges/run"]
fn zsh_inserts_what_is_meant() {
    const TYPE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/judges/complete.zsh");
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            for (line, expected) in [
                ("eniup wai", "eniup wait "),
                ("eniup completions f", "eniup completions fish "),
                ("eniup -v wait --eni eni-02", "eniup -v wait --eni eni-02 "),
                ("eniup explain --oif eth02", "eniup explain --oif eth02 "),
                // As far as it is clear.
                ("eniup explain --from 10.0.1", "eniup explain --from 10.0.1.2"),
                ("eniup plan --timeout x", "eniup plan --timeout x"),
            ] {
                let typed = in_a_shell(machine, "zsh", &["-f", TYPE, line])?;
                ensure!(typed == [expected], "`{line}`: {typed:?} instead of `{expected}`");
            }
            Ok(())
        })
    });
}

#[test]
#[ignore = "needs fish: tests/judges/run"]
fn fish_offers_what_is_meant() {
    const TYPE: &str = "eniup completions fish | source; complete -C $argv[1]";
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            for (line, expected) in [
                ("eniup wai", &["wait"][..]),
                ("eniup -v wait --eni eni-02", &["eni-02"]),
                ("eniup explain --oif eth02", &["eth02"]),
                ("eniup explain --from 10.0.1.2", &["10.0.1.20", "10.0.1.21"]),
                ("eniup plan --timeout x", &[]),
            ] {
                let offered = in_a_shell(machine, "fish", &["--no-config", "-c", TYPE, line])?;
                // What is said of each stands behind a tab.
                let offered: Vec<&str> = offered.iter().filter_map(|offer| offer.split('\t').next()).collect();
                ensure!(offered == expected, "`{line}`: {offered:?} instead of {expected:?}");
            }
            Ok(())
        })
    });
}

#[test]
fn bash_inserts_what_is_meant_also_behind_a_colon_or_an_equals_sign() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            for (line, expected) in [
                ("eniup wai", &["wait"][..]),
                ("eniup -v  wait --eni eni-02", &["eni-02"]),
                ("eniup wait --eni=eni-02", &["eni-02"]),
                ("eniup explain --oif eth02", &["eth02"]),
                ("eniup explain --from 10.0.1.2", &["10.0.1.20", "10.0.1.21"]),
                ("eniup plan --timeout x", &[]),
            ] {
                let offered = in_bash(machine, line)?;
                ensure!(offered == expected, "`{line}`: {offered:?} instead of {expected:?}");
            }
            // bash replaces what stands behind the last colon.
            let all = in_bash(machine, "eniup explain --from ")?;
            let ipv6 = all.iter().find(|address| address.matches(':').count() > 2).context("no IPv6 address")?;
            let (head, tail) = ipv6.rsplit_once(':').context("no colon")?;
            let offered = in_bash(machine, &format!("eniup explain --from {head}:"))?;
            ensure!(
                offered.contains(&tail.to_string()) && !offered.iter().any(|offer| offer.contains(head)),
                "{offered:?}"
            );
            Ok(())
        })
    });
}

#[test]
fn the_script_is_the_one_that_is_packaged_and_needs_no_configuration() {
    inside(|| {
        with_two_enis(|machine| {
            for shell in ["bash", "zsh", "fish"] {
                let run = machine.eniup(&format!("completions {shell} --config /nowhere"))?;
                ensure!(run.exit == 0 && run.stderr.is_empty() && run.stdout.contains("eniup complete -- "), "{shell}");
            }
            ensure!(machine.eniup("completions tcsh")?.exit == 64);
            Ok(())
        })
    });
}
