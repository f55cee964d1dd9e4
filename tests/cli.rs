//! The command line as a user meets it: verbs, exit codes, and one line that says what is wrong, where, and what to do.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use support::machine::{
    Machine, Run, difference, drop_capabilities, dump, inside, ip, read_leaves, run, scenario, with_scenario,
    with_two_enis,
};
use vpc_lab::imds::{Action, Faults, Method, Occurrences, Rule};

/// This exit code, and one line that holds all these words; besides it only that something is waited for.
fn assert_says(run: &Run, exit: i32, words: &[&str]) -> Result<()> {
    ensure!(run.exit == exit, "exit {} instead of {exit}: {}", run.exit, run.stderr);
    let lines: Vec<&str> = run.stderr.lines().filter(|line| !line.starts_with(" INFO waiting for")).collect();
    ensure!(lines.len() == 1, "not one line: {lines:#?}");
    for word in words {
        ensure!(lines[0].contains(word), "`{word}` is missing: {}", lines[0]);
    }
    Ok(())
}

/// [`assert_says`], with nothing on stdout and the network as it was.
fn assert_refused(machine: &Machine, arguments: &str, exit: i32, words: &[&str]) -> Result<()> {
    let before = dump()?;
    let run = machine.eniup(arguments)?;
    assert_says(&run, exit, words).with_context(|| format!("eniup {arguments}"))?;
    ensure!(run.stdout.is_empty(), "eniup {arguments} says on stdout: {}", run.stdout);
    let difference = difference(&before, &dump()?);
    ensure!(difference.is_empty(), "eniup {arguments} changed something:\n{difference}");
    Ok(())
}

/// Kills a program as a fault of its own would and gives whether the kernel wrote a core.
fn dies_with_core(mut command: Command) -> Result<bool> {
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    let allow = move || match unsafe { libc::setrlimit(libc::RLIMIT_CORE, &limit) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    };
    let folder = tempfile::tempdir()?;
    // SAFETY: one system call between fork and exec, which allocates nothing.
    unsafe { command.pre_exec(allow) };
    let mut child = command.current_dir(folder.path()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    // Until it is past its beginning.
    std::thread::sleep(Duration::from_millis(500));
    // SAFETY: the child was not waited for, so the number is its own.
    ensure!(unsafe { libc::kill(child.id() as i32, libc::SIGABRT) } == 0);
    let status = child.wait()?;
    ensure!(status.signal() == Some(libc::SIGABRT), "{status}");
    Ok(status.core_dumped())
}

/// It would hold the token.
#[test]
fn a_process_that_dies_leaves_no_core() {
    inside(|| {
        with_two_enis(|machine| {
            let rule = Rule::new("*", Occurrences::Always, Action::Hang).only(Method::Get);
            machine.service.set_faults(Faults { rules: vec![rule], ..Faults::default() });
            let mut sleep = Command::new("sleep");
            sleep.arg("60");
            ensure!(dies_with_core(sleep)?, "cores cannot be had of any program: is the hard limit 0?");
            ensure!(!dies_with_core(machine.command("reconcile --timeout 60s"))?, "there is a core of eniup");
            Ok(())
        })
    });
}

#[test]
fn help_and_version_are_answers() {
    inside(|| {
        with_two_enis(|machine| {
            for (arguments, word) in [
                ("--help", "eniup plan"),
                ("--version", env!("CARGO_PKG_VERSION")),
                ("help plan", "--metadata"),
                ("reconcile --help", "--timeout"),
                ("release -h", "--dry-run"),
            ] {
                let run = machine.eniup(arguments)?;
                ensure!(run.exit == 0 && run.stderr.is_empty(), "{arguments}: exit {}: {}", run.exit, run.stderr);
                ensure!(run.stdout.contains(word), "{arguments}: `{word}` is missing:\n{}", run.stdout);
            }
            Ok(())
        })
    });
}

#[test]
fn what_can_be_told_from_the_arguments_alone_is_a_usage_error_with_a_hint() {
    inside(|| {
        with_two_enis(|machine| {
            let before = dump()?;
            for (arguments, words) in [
                ("", &["Usage"][..]),
                ("reconsile", &["reconsile", "reconcile"]),
                ("plan --jsn", &["--jsn", "--json"]),
                ("plan --frobnicate", &["--frobnicate"]),
                ("plan extra", &["extra"]),
                ("reconcile --timeout soon", &["soon", "--timeout"]),
                ("reconcile --timeout 30", &["30", "--timeout", "unit"]),
                ("reconcile --timeout -1s", &["-1"]),
                ("watch --interval 2h", &["2h", "--interval", "100ms to 1h"]),
                ("watch --interval 1ms", &["1ms", "100ms to 1h"]),
                ("plan --metadata", &["--metadata"]),
                ("-q -v plan", &["-q", "-v"]),
                ("status --imds-endpoint 169.254.169.254", &["169.254.169.254", "http://169.254.169.254"]),
                ("status --imds-endpoint https://127.0.0.1/", &["https://127.0.0.1", "http://"]),
                ("status --imds-endpoint http://", &["http://169.254.169.254"]),
                ("watch --imds-endpoint xx", &["xx", "http://"]),
                ("reconcile --imds-endpoint file:///etc/passwd", &["file:///etc/passwd", "http://"]),
            ] {
                let run = machine.eniup(arguments)?;
                ensure!(run.exit == 64 && run.stdout.is_empty(), "{arguments}: exit {}: {}", run.exit, run.stdout);
                for word in words {
                    ensure!(run.stderr.contains(word), "{arguments}: `{word}` is missing: {}", run.stderr);
                }
            }
            ensure!(difference(&before, &dump()?).is_empty(), "something was changed");
            Ok(())
        })
    });
}

#[test]
fn a_snapshot_that_cannot_be_used_is_named_with_what_is_wrong() {
    inside(|| {
        with_two_enis(|machine| {
            fs::create_dir_all(&machine.directory)?;
            let file = machine.directory.join("snapshot.json");
            let plan = format!("plan --metadata {}", file.display());
            let primary = r#"{"leaves": {"mac": "02:00:00:00:00:01"}}"#;
            let without_primary = r#"{"leaves": {"network/interfaces/macs/02:00:00:00:00:01/interface-id": "eni-01"}}"#;
            let contents: [(&[u8], &[&str]); 10] = [
                (b"", &["JSON", "line 1"]),
                (b"mac: 02:00:00:00:00:01", &["JSON", "line 1 column 1"]),
                (b"{\"leaves\": {\"mac\": \"02:00", &["line 1 column"]),
                (b"[]", &["`leaves`"]),
                (b"{}", &["missing field `leaves`"]),
                (b"{\"leaves\": {}}", &["`leaves` is empty", "`mac`"]),
                (b"{\"leaves\": {\"mac\": 7}}", &["expected a string", "line 1 column"]),
                (b"{\"leaves\": {\"mac\": \"\xff\xfe\"}}", &["not UTF-8 (byte 20)"]),
                (primary.as_bytes(), &["network/interfaces/macs/"]),
                (without_primary.as_bytes(), &["no key `mac`"]),
            ];
            for (content, words) in contents {
                fs::write(&file, content)?;
                assert_refused(machine, &plan, 1, &[words, &[file.to_str().unwrap_or_default()]].concat())?;
            }
            fs::remove_file(&file)?;
            assert_refused(machine, &plan, 1, &["snapshot.json", "No such file"])?;
            assert_refused(machine, "plan --metadata /proc", 1, &["/proc", "Is a directory"])?;
            assert_refused(machine, "plan --metadata /dev/zero", 1, &["/dev/zero", "larger than 64 MiB"])
        })
    });
}

#[test]
fn metadata_that_is_not_to_be_had_has_its_own_message_and_changes_nothing() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let always = |path: &str, action: Action| Rule::new(path, Occurrences::Always, action);
            let faults = [
                (always("*", Action::Status(401)).only(Method::Get), &["401", "token"][..]),
                (always("*", Action::Status(403)), &["403", "modify-instance-metadata-options"]),
                (always("/latest/api/token", Action::Status(404)), &["/latest/api/token", "404"]),
                (always("*", Action::Status(500)), &["500", "ask it all the time"]),
                (always("*", Action::Hang), &["within", "IMDSv2"]),
                (always("*", Action::Garbage), &["within"]),
                (always("*", Action::Redirect("http://127.0.0.1:1/".into())), &["302"]),
                (always("mac", Action::NotUtf8), &["mac", "UTF-8"]),
                (always("network/interfaces/macs/", Action::NotUtf8), &["network/interfaces/macs/", "UTF-8"]),
                (always("mac", Action::Body("eth0".into())), &["`mac`", "`eth0` is not a MAC address"]),
                (always("mac", Action::HugeBody(1 << 20)), &["mac", "longer than"]),
                (always("mac", Action::Status(404)), &["no key `mac`"]),
            ];
            for (rule, words) in faults {
                machine.service.set_faults(Faults { rules: vec![rule.clone()], ..Faults::default() });
                let started = Instant::now();
                for verb in ["reconcile", "plan", "status"] {
                    let arguments = format!("{verb} --timeout 400ms");
                    assert_refused(machine, &arguments, 69, words).with_context(|| format!("{rule:?}"))?;
                }
                ensure!(started.elapsed() < Duration::from_secs(10), "{rule:?}: {:?}", started.elapsed());
            }
            let nowhere = "--imds-endpoint http://127.0.0.1:1 --timeout 400ms";
            for verb in ["reconcile", "plan", "status"] {
                let words = &["http://127.0.0.1:1", "refused", "EC2"];
                assert_refused(machine, &format!("{verb} {nowhere}"), 69, words)?;
            }
            Ok(())
        })
    });
}

/// The last attempt of all is cut short by the deadline; what was wrong before is what helps.
#[test]
fn what_was_wrong_is_said_though_the_deadline_cuts_the_last_attempt() {
    inside(|| {
        with_two_enis(|machine| {
            let first = |path: &str, n: u64| Rule::new(path, Occurrences::FirstN(n), Action::NotUtf8);
            let then = |path: &str| Rule::new(path, Occurrences::Always, Action::Hang);
            let fail = |path: &str, n| {
                let rules = vec![first(path, n), then(path)];
                machine.service.set_faults(Faults { rules, ..Faults::default() });
            };
            fail("mac", 1);
            assert_refused(machine, "plan --timeout 700ms", 69, &["mac", "UTF-8"])?;
            // All attempts of one reading, and the next one hangs.
            let key = second_eni("local-ipv4s");
            fail(&key, 4);
            assert_says(&machine.eniup("reconcile --timeout 2500ms")?, 3, &["eni-02 is pending", "UTF-8"])?;
            Ok(())
        })
    });
}

/// What metadata may get wrong about the second ENI alone, by the key; what eniup then says of it; and whether it waits.
const ONE_ENI_WRONG: [(&str, &str, &str); 9] = [
    ("local-ipv4s", "10.0.1.20\n10.0.1.2l", "`10.0.1.2l` is not an address"),
    ("local-ipv4s", "10.0.9.20", "10.0.9.20 is outside the ENI's subnet 10.0.1.0/24"),
    ("local-ipv4s", "127.0.0.1", "127.0.0.1 cannot be the address of an ENI"),
    ("subnet-ipv4-cidr-block", "10.0.1.0/33", "`10.0.1.0/33` is not a CIDR"),
    ("subnet-ipv4-cidr-block", "10.0.1.0", "`10.0.1.0` is not a CIDR"),
    ("subnet-ipv4-cidr-block", "0.0.0.0/0", "0.0.0.0/0 cannot be a subnet"),
    ("device-number", "one", "`one` is not what it holds"),
    ("device-number", "4000", "out of range"),
    ("interface-id", "", "`interface-id`"),
];

fn second_eni(key: &str) -> String {
    format!("network/interfaces/macs/02:00:00:00:00:02/{key}")
}

#[test]
fn what_is_wrong_with_one_eni_leaves_it_as_it_is_and_stops_no_other() {
    inside(|| {
        let metadata = scenario("three-enis-of-which-two-share")?.folder.join("metadata.json");
        for (key, value, words) in ONE_ENI_WRONG {
            with_scenario("three-enis-of-which-two-share", |machine| {
                let whole = read_leaves(&metadata)?;
                machine.reconcile(0)?;
                let mut leaves = whole.clone();
                leaves.insert(second_eni(key), value.into());
                machine.publish(leaves);
                ip("addr del 10.0.1.22/24 dev eth03")?;
                let second = ip("addr show eth02")?;
                let run = machine.eniup("reconcile --timeout 400ms -q")?;
                ensure!(ip("addr show eth03")?.contains("10.0.1.22/24"), "{key}: the other ENI was not done");
                ensure!(ip("addr show eth02")? == second, "{key}: the ENI in trouble was touched");
                ensure!(ip("route show table 20001")?.contains("default via 10.0.1.1"), "{key}: its route is gone");
                // Without an id it goes by its MAC.
                let name = if key == "interface-id" { "02:00:00:00:00:02" } else { "eni-02" };
                assert_says(&run, 3, &[words, name, key])?;
                ensure!(run.stderr.lines().count() == 1, "more than what went wrong: {}", run.stderr);
                machine.publish(whole);
                let well = machine.eniup("reconcile -q")?;
                ensure!(well.exit == 0 && well.stderr.is_empty(), "{key}: exit {}: {}", well.exit, well.stderr);
                machine.assert_settled()
            })?;
        }
        Ok(())
    });
}

#[test]
fn a_key_that_is_not_utf8_a_listed_name_that_is_no_mac_and_one_table_for_two_stop_no_other_eni() {
    inside(|| {
        with_scenario("three-enis-of-which-two-share", |machine| {
            let whole = read_leaves(&scenario("three-enis-of-which-two-share")?.folder.join("metadata.json"))?;
            machine.reconcile(0)?;
            let before = of_the_second_eni()?;

            let rule = Rule::new("*:02/local-ipv4s", Occurrences::Always, Action::NotUtf8);
            machine.service.set_faults(Faults { rules: vec![rule], ..Faults::default() });
            let run = machine.eniup("reconcile --timeout 400ms")?;
            assert_trouble(&run, &["eni-02 is pending", "`local-ipv4s`", "UTF-8"])?;
            ensure!(of_the_second_eni()? == before, "UTF-8: {:#?}", of_the_second_eni()?);
            machine.service.set_faults(Faults::default());

            let mut leaves = whole.clone();
            leaves.insert("network/interfaces/macs/02:00:00:00:00/device-number".into(), "3".into());
            machine.publish(leaves);
            let run = machine.eniup("reconcile --timeout 400ms")?;
            assert_trouble(&run, &["network/interfaces/macs/", "`02:00:00:00:00` is not a MAC address"])?;
            ensure!(of_the_second_eni()? == before, "no MAC: {:#?}", of_the_second_eni()?);

            let mut leaves = whole.clone();
            leaves.insert(second_eni("device-number"), "2".into());
            machine.publish(leaves);
            let run = machine.eniup("reconcile --timeout 400ms")?;
            assert_trouble(&run, &["eni-02 is pending", "the same routing table"])?;
            assert_trouble(&run, &["eni-03 is pending", "the same routing table"])?;
            ensure!(of_the_second_eni()? == before, "one table: {:#?}", of_the_second_eni()?);
            Ok(())
        })
    });
}

#[test]
fn metadata_that_goes_away_while_an_eni_is_waited_for_does_not_undo_the_report_of_the_others() {
    inside(|| {
        with_scenario("three-enis-of-which-two-share", |machine| {
            let mut leaves = read_leaves(&scenario("three-enis-of-which-two-share")?.folder.join("metadata.json"))?;
            leaves.insert(second_eni("device-number"), "0".into());
            machine.publish(leaves);
            let mut child = machine.command("reconcile --timeout 3s").stderr(Stdio::piped()).spawn()?;
            let deadline = Instant::now() + Duration::from_secs(10);
            while !ip("addr show eth03")?.contains("10.0.1.40/32") {
                ensure!(Instant::now() < deadline, "the ENI that is ready was not done");
                std::thread::yield_now();
            }
            machine.service.set_disabled(true);
            let exit = child.wait()?.code();
            let mut said = String::new();
            child.stderr.take().context("no stderr")?.read_to_string(&mut said)?;
            ensure!(exit == Some(3), "exit {exit:?}: {said}");
            ensure!(said.contains("eni-02 is pending") && said.contains("403"), "{said}");
            ensure!(!said.contains("nothing was changed"), "it says what is not so: {said}");
            Ok(())
        })
    });
}

/// Everything that the kernel has for the second ENI: its link, addresses, table and rules.
fn of_the_second_eni() -> Result<Vec<String>> {
    let is_of = |line: &String| line.contains("eth02") || line.contains(" 20001 ");
    Ok(dump()?.into_iter().filter(is_of).collect())
}

/// Exit code 3, and a line with all these words.
fn assert_trouble(run: &Run, words: &[&str]) -> Result<()> {
    ensure!(run.exit == 3, "exit {}: {}", run.exit, run.stderr);
    let is_it = |line: &str| words.iter().all(|word| line.contains(word));
    ensure!(run.stderr.lines().any(is_it), "no line with {words:?}: {}", run.stderr);
    Ok(())
}

#[test]
fn without_privilege_plan_and_status_work_and_the_others_say_what_is_needed() {
    inside(|| {
        with_two_enis(|machine| {
            let before = dump()?;
            for (arguments, exit) in
                [("reconcile", 77), ("release", 77), ("plan", 0), ("status", 0), ("reconcile --dry-run", 0)]
            {
                let mut command = machine.command(arguments);
                drop_capabilities(&mut command);
                let run = run(&mut command)?;
                match exit {
                    0 => ensure!(run.exit == 0 && run.stderr.is_empty(), "{arguments}: {}", run.stderr),
                    exit => assert_says(&run, exit, &["CAP_NET_ADMIN", "sudo"]).context(arguments)?,
                }
            }
            ensure!(!machine.directory.exists(), "something was written");
            ensure!(difference(&before, &dump()?).is_empty(), "something was changed");
            Ok(())
        })
    });
}

#[test]
fn a_runtime_directory_that_cannot_be_used_is_named_and_nothing_is_changed() {
    inside(|| {
        with_two_enis(|machine| {
            fs::write("/run/file", "")?;
            for (directory, words) in [
                ("/proc/nowhere", &["/proc/nowhere", "RUNTIME_DIRECTORY"]),
                ("/run/file", &["/run/file", "RUNTIME_DIRECTORY"]),
            ] {
                machine.directory = directory.into();
                assert_refused(machine, "reconcile", 1, words)?;
                assert_refused(machine, "release", 1, words)?;
            }
            Ok(())
        })
    });
}

#[test]
fn only_its_owner_can_hold_the_lock() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let mode = fs::metadata(machine.directory.join("lock"))?.permissions().mode() & 0o777;
            ensure!(mode == 0o600, "mode {mode:o}: whoever can open it can keep every run waiting");
            Ok(())
        })
    });
}

#[test]
fn a_reader_that_goes_away_is_no_failure_and_a_full_device_is_one() {
    inside(|| {
        with_two_enis(|machine| {
            for arguments in ["plan", "plan --json", "status", "status --json", "--help", "reconcile --dry-run"] {
                let (reader, writer) = std::io::pipe()?;
                drop(reader);
                let run = run(machine.command(arguments).stdout(writer))?;
                ensure!(run.exit == 0 && run.stderr.is_empty(), "{arguments}: exit {}: {}", run.exit, run.stderr);

                let full = fs::File::options().write(true).open("/dev/full")?;
                let run = support::machine::run(machine.command(arguments).stdout(full))?;
                ensure!(run.exit == 1, "{arguments} on a full device: exit {}", run.exit);
                if arguments != "--help" {
                    assert_says(&run, 1, &["stdout", "No space left"]).context(arguments)?;
                }
            }
            Ok(())
        })
    });
}

#[test]
fn the_exit_code_tells_the_truth_also_when_stderr_cannot_be_written() {
    inside(|| {
        with_two_enis(|machine| {
            for (arguments, exit) in [
                ("reconcile --imds-endpoint http://127.0.0.1:1 --timeout 300ms", 69),
                ("reconsile", 64),
                ("reconcile", 0),
            ] {
                let full = fs::File::options().write(true).open("/dev/full")?;
                let status = machine.command(arguments).stderr(full).stdout(Stdio::null()).status()?;
                ensure!(status.code() == Some(exit), "{arguments}: {status}");
            }
            Ok(())
        })
    });
}

#[test]
fn one_eni_is_released_and_the_other_keeps_all_it_has() {
    inside(|| {
        with_scenario("three-enis-of-which-two-share", |machine| {
            let mut leaves = read_leaves(&scenario("three-enis-of-which-two-share")?.folder.join("metadata.json"))?;
            leaves.insert(
                "network/interfaces/macs/02:00:00:00:00:02/interface-id".into(),
                "eni-0123456789abcdef0".into(),
            );
            machine.publish(leaves);
            machine.reconcile(0)?;
            let of = |words: &[&str]| -> Result<Vec<String>> {
                let is_its = |line: &String| words.iter().any(|word| line.contains(word));
                Ok(dump()?.into_iter().filter(is_its).collect())
            };
            let (second, third) = (["eth02", "lookup 20001", "table 20001"], ["eth03", "lookup 20002", "table 20002"]);
            let before = of(&third)?;
            let preview = machine.eniup("release --eni eni-0123456789abcdef0 --dry-run")?;
            ensure!(preview.exit == 0 && preview.stdout.contains("eth02"), "{}{}", preview.stdout, preview.stderr);
            ensure!(!preview.stdout.contains("eth03"), "{}", preview.stdout);
            let run = machine.eniup("release --eni eni-0123456789abcdef0")?;
            ensure!(run.exit == 0, "exit {}: {}", run.exit, run.stderr);
            ensure!(of(&third)? == before, "another ENI's objects are touched");
            let left = of(&second)?;
            ensure!(!left.iter().any(|line| line.contains("176") || line.contains("20001")), "{left:#?}");
            ensure!(
                !left.iter().any(|line| line.contains("eni-0123456789abcdef0") || line.contains("group 20000")),
                "{left:#?}"
            );
            // Its name is gone as well.
            let again = machine.eniup("release --eni eni-0123456789abcdef0")?;
            let says = "no link is called eni-0123456789abcdef0; there are ";
            ensure!(again.exit == 1 && again.stderr.contains(says), "exit {}: {}", again.exit, again.stderr);
            machine.reconcile(0)?;
            ensure!(machine.eniup("release")?.exit == 0 && of(&["176"])?.is_empty(), "{:#?}", of(&["176"])?);
            Ok(())
        })
    });
}

#[test]
fn manual_pages_are_printed_by_name() {
    inside(|| {
        with_two_enis(|machine| {
            for (arguments, title) in [
                ("man", ".TH eniup 8"),
                ("man eniup", ".TH eniup 8"),
                ("man plan", ".TH eniup-plan 8"),
                ("man eniup-config-show", ".TH eniup-config-show 8"),
                ("man eniup.toml", ".TH eniup.toml 5"),
                ("man --config /nowhere status", ".TH eniup-status 8"),
            ] {
                let run = machine.eniup(arguments)?;
                ensure!(run.exit == 0 && run.stdout.contains(title), "{arguments}: {}{}", run.stdout, run.stderr);
            }
            let wrong = machine.eniup("man plam")?;
            ensure!(wrong.exit == 64 && wrong.stderr.contains("did you mean"), "{}", wrong.stderr);
            Ok(())
        })
    });
}

#[test]
fn release_is_silent_when_nothing_is_ours() {
    inside(|| {
        with_two_enis(|machine| {
            for arguments in ["release --dry-run", "release"] {
                let before = dump()?;
                let run = machine.eniup(arguments)?;
                ensure!(run.exit == 0 && run.stdout.is_empty() && run.stderr.is_empty(), "{arguments}: {}", run.stderr);
                ensure!(difference(&before, &dump()?).is_empty(), "{arguments} changed something");
            }
            Ok(())
        })
    });
}

#[test]
fn plan_tells_by_its_exit_code_whether_there_are_differences() {
    inside(|| {
        with_two_enis(|machine| {
            let exit = |arguments: &str| Ok::<i32, anyhow::Error>(machine.eniup(arguments)?.exit);
            ensure!(exit("plan")? == 0 && exit("plan --detailed-exitcode")? == 2);
            ensure!(exit("reconcile --dry-run")? == 0 && exit("reconcile --dry-run --detailed-exitcode")? == 2);
            ensure!(exit("reconcile --detailed-exitcode")? == 64, "it has a meaning with --dry-run only");
            let dry_run = machine.eniup("reconcile --dry-run")?;
            ensure!(dry_run.stdout == machine.eniup("plan")?.stdout && !dry_run.stdout.is_empty());
            machine.reconcile(0)?;
            ensure!(exit("plan")? == 0 && exit("plan --detailed-exitcode")? == 0);
            ensure!(exit("reconcile --dry-run --detailed-exitcode")? == 0);
            ensure!(machine.eniup("plan")?.stdout.is_empty());
            Ok(())
        })
    });
}

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect()
}

/// The keys that `docs/json.md` promises: `` - `key`: … `` below a heading.
fn documented(heading: &str) -> Result<BTreeSet<&'static str>> {
    let text = include_str!("../docs/json.md");
    let section = text.split(&format!("\n## {heading}\n")).nth(1).with_context(|| format!("no heading {heading}"))?;
    let section = section.split("\n## ").next().unwrap_or_default();
    Ok(section.lines().filter_map(|line| line.strip_prefix("- `")?.split('`').next()).collect())
}

#[test]
fn json_has_the_documented_keys_and_no_others() {
    inside(|| {
        with_two_enis(|machine| {
            let parse =
                |arguments: &str| -> Result<Value> { Ok(serde_json::from_str(&machine.eniup(arguments)?.stdout)?) };
            let plan = parse("plan --json")?;
            ensure!(keys(&plan) == documented("plan")?, "{:?}", keys(&plan));
            ensure!(keys(&plan["steps"][0]) == documented("plan: a step")?, "{:?}", keys(&plan["steps"][0]));
            let lines = machine.eniup("plan")?.stdout;
            let steps = plan["steps"].as_array().context("no list")?;
            let commands: Vec<String> =
                steps.iter().map(|step| format!("{}  # {}\n", text(&step["command"]), text(&step["reason"]))).collect();
            ensure!(commands.concat() == lines, "JSON and text differ:\n{}", commands.concat());

            let settings = parse("config show --json")?;
            let value = &settings["values"][0];
            ensure!(keys(&settings) == documented("config show")?, "{settings}");
            ensure!(keys(value) == documented("config show: a value")?, "{value}");

            machine.reconcile(0)?;
            let status = parse("status --json")?;
            let eni = &status["enis"][1];
            for (value, heading) in [
                (&status, "status"),
                (eni, "status: an ENI"),
                (&eni["link"], "status: a link"),
                (&eni["addresses"][0], "status: an address"),
            ] {
                ensure!(keys(value) == documented(heading)?, "{heading}: {:?}", keys(value));
            }
            ensure!(eni["state"] == "ready" && eni["link"]["name"] == "eth02" && eni["table"] == 20001, "{eni:#}");

            let diagnosis = parse("doctor --json")?;
            ensure!(keys(&diagnosis) == documented("doctor")?, "{:?}", keys(&diagnosis));
            for check in diagnosis["checks"].as_array().context("no list")? {
                ensure!(keys(check) == documented("doctor: a check")?, "{:?}", keys(check));
                ensure!(keys(&check["findings"][0]) == documented("doctor: a finding")?, "{check}");
            }

            let snapshot = parse("snapshot")?;
            ensure!(keys(&snapshot) == documented("snapshot")?, "{:?}", keys(&snapshot));

            machine.publish(BTreeMap::from([
                ("mac".into(), "02:00:00:00:00:01".into()),
                ("network/interfaces/macs/02:00:00:00:00:01/device-number".into(), "0".into()),
            ]));
            let pending = parse("plan --json")?;
            let trouble = &pending["troubles"][0];
            ensure!(keys(trouble) == documented("plan: a trouble")?, "{trouble}");
            ensure!(trouble["state"] == "pending", "{trouble}");
            Ok(())
        })
    });
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[test]
fn status_is_a_table_of_both_sides() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            ip("addr add 10.77.0.1/24 dev eth02")?;
            ip("addr del 10.0.1.21/32 dev eth02")?;
            let status = machine.eniup("status")?;
            ensure!(status.exit == 0 && status.stderr.is_empty(), "exit {}: {}", status.exit, status.stderr);
            let rows: Vec<String> = status.stdout.lines().map(words).collect();
            for row in [
                "eni-02 secondary ENI, drifted",
                "why a run would do `ip addr add 10.0.1.21/32 dev eth02 noprefixroute proto 176`",
                "link eth02, up, MTU 9001, also device-number-1, eni-02",
                "table 20001",
                "address public in metadata on the link",
                "10.0.1.20 - yes 10.0.1.20/24, by eniup",
                "10.0.1.21 - yes no",
                "10.77.0.1 - no 10.77.0.1/24",
                "1 change would bring the kernel into agreement: see `eniup plan`, run `eniup reconcile`.",
            ] {
                ensure!(rows.iter().any(|line| line == row), "`{row}` is missing:\n{}", status.stdout);
            }
            // Columns stand below each other.
            let table: Vec<&str> = status.stdout.lines().skip_while(|line| !line.contains("eni-02")).collect();
            let column = |word: &str| table.iter().find_map(|line| line.find(word)).context(word.to_string());
            ensure!(column("on the link")? == column("10.0.1.20/24")? && column("in metadata")? == column("yes")?);
            Ok(())
        })
    });
}

fn words(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn colour_is_for_terminals_and_for_those_who_want_it() {
    inside(|| {
        with_two_enis(|machine| {
            let has_colour = |text: &str| text.contains('\u{1b}');
            ensure!(!has_colour(&machine.eniup("status")?.stdout), "a pipe is coloured");
            ensure!(has_colour(&machine.eniup("status --color=always")?.stdout));
            ensure!(has_colour(&on_a_terminal(machine.command("status").env("TERM", "xterm"), 0)?), "no colour");
            for (name, value) in [("NO_COLOR", "1"), ("TERM", "dumb")] {
                let said = on_a_terminal(machine.command("status").env("TERM", "xterm").env(name, value), 0)?;
                ensure!(said.contains("eni-02") && !has_colour(&said), "{name}={value}: {said}");
            }
            ensure!(!has_colour(&on_a_terminal(&mut machine.command("status --color=never"), 0)?));
            Ok(())
        })
    });
}

#[test]
fn what_is_shown_fits_the_terminal_and_elsewhere_lines_are_whole() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            ip("addr del 10.0.1.21/32 dev eth02")?;
            let is_command = |line: &str| line.contains("would change: ") || line.contains("fix: ");
            for arguments in ["status", "doctor", "explain --from 10.0.1.20"] {
                let whole = run(&mut machine.command(arguments))?;
                let longest =
                    whole.stdout.lines().filter(|line| !is_command(line)).map(|line| line.chars().count()).max();
                ensure!(longest > Some(80), "{arguments} has no line that could be too long:\n{}", whole.stdout);
                for width in [60, 80, 120] {
                    let shown = on_a_terminal(machine.command(arguments).env("NO_COLOR", "1"), width)?;
                    let too_long = shown.lines().filter(|line| !is_command(line) && !line.starts_with("           "));
                    let too_long: Vec<&str> =
                        too_long.filter(|line| line.trim_end().chars().count() > usize::from(width)).collect();
                    ensure!(too_long.is_empty(), "{arguments} at {width}: {too_long:#?}");
                    for command in whole.stdout.lines().filter(|line| is_command(line)) {
                        ensure!(shown.contains(command), "{arguments} at {width}: `{command}` is cut:\n{shown}");
                    }
                }
            }
            let narrow = on_a_terminal(machine.command("status").env("NO_COLOR", "1"), 60)?;
            ensure!(narrow.contains("10.0.1.20") && narrow.contains("(no room here for: "), "{narrow}");
            Ok(())
        })
    });
}

/// What the command says to a terminal of so many columns; 0: one that does not know.
fn on_a_terminal(command: &mut Command, columns: u16) -> Result<String> {
    let size = libc::winsize { ws_row: 25, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let (mut ours, mut theirs) = (-1, -1);
    // SAFETY: openpty writes two descriptors, which are ours from here on.
    let (ours, theirs) = unsafe {
        let none = std::ptr::null_mut();
        ensure!(libc::openpty(&mut ours, &mut theirs, none, none.cast(), &size) == 0);
        (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs))
    };
    let mut child = command.stdout(theirs).spawn()?;
    // The command keeps a copy of the other end, without which reading would not end.
    command.stdout(Stdio::null());
    let mut said = Vec::new();
    // EIO is how a terminal says that nobody is left.
    let end = fs::File::from(ours).read_to_end(&mut said);
    ensure!(end.is_ok() || end.is_err_and(|error| error.raw_os_error() == Some(libc::EIO)));
    ensure!(child.wait()?.code().is_some());
    Ok(String::from_utf8(said)?)
}
