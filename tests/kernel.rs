//! The real kernel, in network namespaces of the tests' own, with iproute2 as second opinion and eniup as a user runs it.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use support::machine::{
    Kernel, command, difference, dump, inside, ip, on_a_machine, output, read_leaves, scenario, with_scenario,
    with_two_enis,
};
use support::scenarios;
use vpc_lab::metadata::Published;

/// What carries our mark, and all addresses of ENIs: an iproute2 that does not know `IFA_PROTO` does not show theirs.
fn ours() -> Result<BTreeSet<String>> {
    let is_ours = |line: &String| line.contains("proto 176") || line.starts_with("-d -o addr: eth");
    Ok(dump()?.into_iter().filter(is_ours).collect())
}

/// iproute2 of 2022 and before does not know an address's `proto`, neither to set nor to show it. With such a one the
/// mark on addresses is left out of the comparison on both sides; all else stays in.
fn knows_address_protocols() -> bool {
    ip("addr add 127.0.0.9/32 dev lo proto 176").is_ok() && ip("addr del 127.0.0.9/32 dev lo").is_ok()
}

fn for_this_ip(script: &str) -> String {
    let without = |line: &str| match line.starts_with("ip addr") {
        true => line.replace(" proto 176", ""),
        false => line.to_string(),
    };
    match knows_address_protocols() {
        true => script.to_string(),
        false => script.lines().map(|line| without(line) + "\n").collect(),
    }
}

#[test]
fn the_printed_plan_run_through_iproute2_gives_the_same_kernel_state_as_netlink() {
    inside(|| {
        for scenario in scenarios()?.iter().filter(|scenario| !scenario.folder.join("machine.json").exists()) {
            let metadata = scenario.folder.join("metadata.json");
            let by_netlink = on_a_machine(|machine| {
                machine.become_attached(&metadata, &scenario.attached)?;
                machine.eniup("reconcile --timeout 1s")?;
                machine.assert_settled()?;
                dump()
            })?;
            let by_commands = on_a_machine(|machine| {
                machine.become_attached(&metadata, &scenario.attached)?;
                let script = for_this_ip(&machine.eniup("plan")?.stdout);
                let output = output(command("sh").args(["-ec", &script]))?;
                ensure!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
                machine.assert_settled()?;
                dump()
            })?;
            ensure!(by_netlink.len() > 10, "the dump is empty");
            let difference = difference(&by_commands, &by_netlink);
            ensure!(difference.is_empty(), "{} (- ip, + eniup):\n{difference}", scenario.name);
        }
        Ok(())
    });
}

#[test]
fn from_any_scenario_to_any_other_one_run_converges_on_the_kernel() {
    converges_from_any_scenario_to_any_other(Kernel::Own, 1);
}

#[test]
fn on_a_kernel_that_forgets_the_mark_of_addresses_too() {
    // Of the whole ones every third: what differs is read from the ledger in the same way for each.
    converges_from_any_scenario_to_any_other(Kernel::Old, 3);
}

#[test]
fn what_a_kernel_of_tomorrow_tells_beside_breaks_no_dump() {
    converges_from_any_scenario_to_any_other(Kernel::New, 3);
}

/// An IPv4 address that was there before keeps its length, so that depends on the way (`docs/decisions.md`).
fn without_length(line: &str) -> String {
    let length = |word: &str| word.contains('.') && word.contains('/');
    match line.split_once("   inet ") {
        Some((link, rest)) => {
            let words =
                rest.split(' ').map(|word| if length(word) { word.split('/').next().unwrap_or(word) } else { word });
            format!("{link}   inet {}", words.collect::<Vec<_>>().join(" "))
        }
        None => line.to_string(),
    }
}

fn converges_from_any_scenario_to_any_other(kernel: Kernel, step: usize) {
    inside(|| {
        let scenarios = scenarios()?;
        let whole = scenarios.iter().filter(|scenario| scenario.attached.is_complete());
        let whole: Vec<_> = whole.step_by(step).collect();
        let mut fresh = BTreeMap::new();
        for scenario in &whole {
            let state = on_a_machine(|machine| {
                machine.become_attached(&scenario.folder.join("metadata.json"), &scenario.attached)?;
                machine.reconcile(0)?;
                ours()
            })?;
            fresh.insert(&scenario.name, state);
        }
        on_a_machine(|machine| {
            machine.kernel = kernel;
            // A walk over every ordered pair of whole ones: 0→1→0→2→0→…→1→2→1→3→1→…
            let mut walk = vec![whole[0]];
            for (n, from) in whole.iter().enumerate() {
                walk.extend(whole[n + 1..].iter().flat_map(|to| [*to, *from]));
                walk.extend(whole.get(n + 1));
            }
            // Those with a pending ENI are waited for, so each is visited once, between two whole ones.
            let pending = scenarios.iter().filter(|scenario| !scenario.attached.is_complete());
            walk.extend(pending.enumerate().flat_map(|(n, to)| [to, whole[n % whole.len()]]));
            let mut from = "nothing";
            for to in walk {
                machine.become_attached(&to.folder.join("metadata.json"), &to.attached)?;
                let run =
                    machine.eniup(if to.attached.is_complete() { "reconcile" } else { "reconcile --timeout 1s" })?;
                ensure!([0, 3].contains(&run.exit), "{from} → {}: {}", to.name, run.stderr);
                let plan = machine.eniup("plan")?;
                ensure!(plan.stdout.is_empty(), "{from} → {}: left to do:\n{}", to.name, plan.stdout);
                if let Some(wanted) = fresh.get(&to.name) {
                    let wanted: Vec<String> = wanted.iter().map(|line| without_length(line)).collect();
                    let state: Vec<String> = ours()?.iter().map(|line| without_length(line)).collect();
                    let difference = difference(&wanted, &state);
                    ensure!(difference.is_empty(), "{from} → {}:\n{difference}", to.name);
                }
                from = &to.name;
            }
            Ok(())
        })
    });
}

/// Objects of every sort that are not ours, some of them hard to tell from ours.
const FOREIGN: &str = "
link set eth02 up
link add br0 address 02:88:00:00:00:01 type bridge
link add veth0 address 02:88:00:00:00:02 type veth peer name veth1 address 02:88:00:00:00:03
link set veth0 master br0
link set br0 up
link set veth0 up
link set veth1 up
link add link eth02 name mac0 address 02:88:00:00:00:04 type macvlan mode bridge
addr add 172.17.0.1/16 dev br0
addr add 10.0.1.20/24 dev mac0
addr add 10.77.0.1/24 dev eth02
addr add 10.0.1.99/32 dev eth02
addr add 10.0.1.98/24 dev eth02 valid_lft 3600 preferred_lft 1800
addr add fd00:77::1/64 dev br0 nodad
addr add 10.0.0.77/32 dev lo
route add 192.0.2.0/24 dev br0
route add blackhole 192.0.3.0/24
route add unreachable 192.0.4.0/24 table 20001 proto static
route add prohibit 192.0.5.0/24 table 20001 metric 7
route add 192.0.6.0/24 via 172.17.0.9 mtu 1400 table 20001 proto 175
route add 192.0.7.0/24 nexthop via 172.17.0.9 weight 1 nexthop via 172.17.0.8 weight 2
route add default via 172.17.0.9 table 100 proto static
-6 route add 2001:db8:7::/48 dev br0
-6 route add blackhole 2001:db8:8::/48 table 20001
rule add priority 100 from 10.0.1.20 lookup 100
rule add priority 19900 lookup main suppress_prefixlength 0
rule add priority 19900 lookup main suppress_prefixlength 7 suppress_ifgroup 20000
rule add priority 20001 from 10.0.1.20 lookup 20001
rule add priority 24001 from 10.0.1.0/24 iif lo lookup 20001 protocol 175
rule add priority 20001 oif eth02 lookup 20001 protocol static
rule add priority 300 fwmark 0x10/0xff lookup 100
rule add priority 301 ipproto tcp dport 22 lookup 100
rule add priority 302 uidrange 0-0 lookup 100
rule add priority 303 from 10.9.0.0/16 blackhole
rule add priority 304 not from 10.8.0.0/16 lookup 100
rule add priority 5210 from all fwmark 0x80000/0xff0000 lookup main
-6 rule add priority 20001 from 2600:1f16:67f:f201::14 lookup 20001
-6 rule add priority 305 from 2001:db8::/32 prohibit
";

fn add_foreign_objects() -> Result<()> {
    for line in FOREIGN.trim().lines() {
        ip(line)?;
    }
    if knows_address_protocols() {
        ip("addr add 10.0.1.97/32 dev eth02 proto 175")?;
    }
    Ok(())
}

/// Addresses with a lifetime count down, and so do a bridge's timers.
fn without_countdown(lines: Vec<String>) -> Vec<String> {
    let is_counting = |word: &str| {
        let is_lifetime = word.ends_with("sec") && word.trim_end_matches("sec").parse::<u32>().is_ok();
        is_lifetime || word.is_empty() || word.contains('.') && word.parse::<f64>().is_ok()
    };
    let strip = |line: String| line.split(' ').filter(|word| !is_counting(word)).collect::<Vec<_>>().join(" ");
    lines.into_iter().map(strip).collect()
}

#[test]
fn foreign_objects_of_every_sort_are_untouched_and_release_leaves_the_machine_as_it_was() {
    inside(|| {
        with_two_enis(|machine| {
            add_foreign_objects()?;
            let before = without_countdown(dump()?);
            machine.reconcile(0)?;
            machine.assert_settled()?;
            let during = without_countdown(dump()?);
            // Links are set and routes of the kernel come with a link that goes up; nothing else of before is gone.
            let is_link = |line: &&String| line.starts_with("-d -o link:");
            let gone: Vec<&String> =
                before.iter().filter(|line| !during.contains(line)).filter(|line| !is_link(line)).collect();
            ensure!(gone.is_empty(), "gone after reconcile: {gone:#?}");
            ensure!(!ours()?.is_empty(), "nothing was done");

            let release = machine.eniup("release")?;
            ensure!(release.exit == 0, "release: {}", release.stderr);
            let after = without_countdown(dump()?);
            let difference = difference(&before, &after);
            ensure!(difference.is_empty(), "after release:\n{difference}");
            Ok(())
        })
    });
}

#[test]
fn release_puts_links_back_as_they_were_found() {
    inside(|| {
        with_two_enis(|machine| {
            let before = dump()?;
            machine.reconcile(0)?;
            ensure!(ip("link show eth02")?.contains(",UP"), "the link is not up");
            let release = machine.eniup("release")?;
            ensure!(release.exit == 0, "release: {}", release.stderr);
            let difference = difference(&before, &dump()?);
            ensure!(difference.is_empty(), "after release:\n{difference}");
            Ok(())
        })
    });
}

#[test]
fn notes_of_another_namespace_say_nothing_of_this_ones_links() {
    inside(|| {
        let directory = with_two_enis(|machine| {
            machine.reconcile(0)?;
            Ok(machine.directory.clone())
        })?;
        with_two_enis(|machine| {
            machine.directory = directory;
            ip("link set eth02 up")?;
            ip("link property add dev eth02 altname eni-02")?;
            let before = dump()?;
            let release = machine.eniup("release")?;
            ensure!(release.exit == 0 && release.stderr.is_empty(), "release: {}", release.stderr);
            let difference = difference(&before, &dump()?);
            ensure!(difference.is_empty(), "after release:\n{difference}");
            Ok(())
        })
    });
}

#[test]
fn release_leaves_a_link_up_that_somebody_else_uses_by_now() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            ip("addr add 10.77.0.1/24 dev eth02")?;
            let release = machine.eniup("release")?;
            ensure!(release.exit == 0, "release: {}", release.stderr);
            ensure!(ip("link show eth02")?.contains(",UP"), "the link went down");
            ensure!(ip("addr show eth02")?.contains("10.77.0.1/24"), "the address is gone");
            let accept_ra = fs::read_to_string("/proc/thread-self/net/../../../sys/net/ipv6/conf/eth02/accept_ra");
            ensure!(accept_ra.is_err() || accept_ra?.trim() == "0", "router advertisements are taken again");
            ensure!(machine.eniup("release --dry-run")?.stdout.is_empty(), "release is not done");
            Ok(())
        })
    });
}

/// A run that repairs what happened to the second ENI's link.
fn repairs(what_happens: &[&str]) -> Result<()> {
    with_two_enis(|machine| {
        machine.reconcile(0)?;
        let whole: Vec<String> = ours()?.into_iter().collect();
        for command in what_happens {
            ip(command)?;
        }
        let broken: Vec<String> = ours()?.into_iter().collect();
        ensure!(broken != whole, "nothing was broken by {what_happens:?}");
        machine.reconcile(0)?;
        machine.assert_settled()?;
        let repaired: Vec<String> = ours()?.into_iter().collect();
        let difference = difference(&whole, &repaired);
        ensure!(difference.is_empty(), "{what_happens:?}:\n{difference}");
        Ok(())
    })
}

#[test]
fn a_bounced_link_is_repaired_by_the_next_run() {
    inside(|| repairs(&["link set eth02 down", "link set eth02 up"]));
}

#[test]
fn a_link_that_went_down_is_repaired_by_the_next_run() {
    inside(|| repairs(&["link set eth02 down"]));
}

#[test]
fn flushed_addresses_routes_and_rules_are_repaired_by_the_next_run() {
    inside(|| repairs(&["addr flush dev eth02", "route flush table 20001", "rule del priority 24001"]));
}

#[test]
fn a_renamed_link_gets_its_rule_and_loses_the_old_one() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            ip("link set eth02 down")?;
            ip("link set eth02 name ens6")?;
            machine.reconcile(0)?;
            machine.assert_settled()?;
            let rules = ip("rule")?;
            ensure!(rules.contains("oif ens6") && !rules.contains("oif eth02"), "{rules}");
            Ok(())
        })
    });
}

#[test]
fn a_detached_eni_leaves_nothing_behind() {
    inside(|| {
        with_two_enis(|machine| {
            let alone = scenario("one-eni-gets-its-secondary-addresses")?;
            machine.reconcile(0)?;
            machine.become_attached(&alone.folder.join("metadata.json"), &alone.attached)?;
            machine.reconcile(0)?;
            machine.assert_settled()?;
            let left = ours()?;
            ensure!(left.iter().all(|line| line.contains("-o addr: eth01")), "left behind: {left:#?}");
            Ok(())
        })
    });
}

#[test]
fn two_runs_at_once_wait_for_each_other_and_no_longer_than_they_may() {
    inside(|| {
        with_two_enis(|machine| {
            fs::create_dir_all(&machine.directory)?;
            let lock = fs::File::create(machine.directory.join("lock"))?;
            lock.lock()?;
            let started = std::time::Instant::now();
            let busy = machine.eniup("reconcile --timeout 300ms")?;
            let took = started.elapsed();
            ensure!(
                busy.exit == 75 && busy.stderr.contains("another eniup run"),
                "exit {}: {}",
                busy.exit,
                busy.stderr
            );
            ensure!((300..3000).contains(&took.as_millis()), "it waited {took:?}");
            lock.unlock()?;
            machine.reconcile(0)?;
            Ok(())
        })
    });
}

#[test]
fn many_runs_at_once_end_in_one_result() {
    inside(|| {
        with_two_enis(|machine| {
            let children: Result<Vec<_>> = (0..8)
                .map(|_| {
                    let mut command = machine.command("reconcile");
                    Ok(command.stderr(std::process::Stdio::piped()).spawn()?)
                })
                .collect();
            let mut talkers = 0;
            for child in children? {
                let output = child.wait_with_output()?;
                ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                talkers += usize::from(!output.stderr.is_empty());
            }
            ensure!(talkers == 1, "{talkers} runs changed something");
            machine.assert_settled()
        })
    });
}

#[test]
fn one_eni_in_trouble_does_not_stop_the_others() {
    inside(|| {
        for trouble in [
            &["link add br0 type bridge", "link set eth02 master br0"][..],
            &["link add other0 address 02:00:00:00:00:02 type veth peer name other1"][..],
        ] {
            with_scenario("three-enis-of-which-two-share", |machine| {
                for command in trouble {
                    ip(command)?;
                }
                let run = machine.reconcile(3)?;
                ensure!(run.stderr.contains("eni-02 is failed"), "{}", run.stderr);
                ensure!(ip("addr show eth03")?.contains("10.0.1.22/24"), "the other ENI was not done");
                ensure!(!ip("addr show eth02")?.contains("10.0.1.20"), "the ENI in trouble was touched");
                Ok(())
            })?;
        }
        Ok(())
    });
}

#[test]
fn an_operation_that_the_kernel_refuses_fails_its_eni_alone() {
    inside(|| {
        with_scenario("three-enis-of-which-two-share", |machine| {
            // The place of the router's route is taken by somebody else's, so ours cannot be added.
            ip("link set eth02 up")?;
            ip("route add default dev eth02 table 20001 proto static")?;
            let run = machine.reconcile(3)?;
            ensure!(run.stderr.contains("eni-02 is failed"), "{}", run.stderr);
            ensure!(run.stderr.contains("table 20001 proto 176 (something else is in its place)"), "{}", run.stderr);
            ensure!(ip("addr show eth03")?.contains("10.0.1.22/24"), "the other ENI was not done");
            ensure!(ip("route show table 20001")?.contains("default dev eth02"), "the foreign route is gone");
            Ok(())
        })
    });
}

#[test]
fn what_an_administrator_should_know_is_said_when_something_changes_and_not_by_every_run() {
    inside(|| {
        with_two_enis(|machine| {
            ip("link set eth02 group 7")?;
            let run = machine.reconcile(0)?;
            ensure!(run.stderr.contains("eth02 (eni-02) is in link group 7"), "{}", run.stderr);
            ensure!(machine.eniup("plan")?.stderr.contains("link group 7"), "plan does not say it");
            machine.assert_settled()
        })
    });
}

#[test]
fn a_link_whose_router_advertisements_cannot_be_turned_off_stays_down() {
    inside(|| {
        with_scenario("three-enis-of-which-two-share", |machine| {
            fs::write("/proc/sys/net/ipv6/conf/eth03/accept_ra", "0")?;
            make_sysctls_read_only()?;
            let run = machine.reconcile(3)?;
            ensure!(run.stderr.contains("eni-02 is failed") && run.stderr.contains("accept_ra"), "{}", run.stderr);
            ensure!(!ip("link show eth02")?.contains(",UP"), "the link is up");
            ensure!(ip("addr show eth03")?.contains("10.0.1.22/24"), "the other ENI was not done");
            Ok(())
        })
    });
}

/// As in a container: in this sandbox alone.
fn make_sysctls_read_only() -> Result<()> {
    let path = c"/proc/sys".as_ptr();
    let hardened = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    for flags in [libc::MS_BIND, libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY | hardened] {
        // SAFETY: the paths are constants, and no data is passed.
        let result = unsafe { libc::mount(path, path, std::ptr::null(), flags, std::ptr::null()) };
        ensure!(result == 0, "mount: {}", std::io::Error::last_os_error());
    }
    Ok(())
}

#[test]
fn the_network_is_as_it_was_when_metadata_cannot_be_used() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let before = dump()?;
            let mac = "02:00:00:00:00:01";
            let raw = |leaves: &[(&str, &str)]| {
                let leaves = leaves.iter().map(|(path, body)| (path.to_string(), body.to_string())).collect();
                Published::raw(leaves, BTreeMap::new())
            };
            let id = format!("network/interfaces/macs/{mac}/interface-id");
            let trees = [
                ("no keys at all", raw(&[])),
                ("no primary MAC", raw(&[(&id, "eni-01")])),
                ("a MAC that is none", raw(&[("mac", "eth0"), (&id, "eni-01")])),
                ("a list without the primary", raw(&[("mac", "02:00:00:00:00:99"), (&id, "eni-01")])),
                ("no list", raw(&[("mac", mac)])),
            ];
            for (what, tree) in trees {
                *machine.tree.lock().unwrap() = tree;
                let run = machine.eniup("reconcile --timeout 200ms")?;
                ensure!(run.exit == 69 && run.stderr.lines().count() == 1, "{what}: exit {}: {}", run.exit, run.stderr);
                ensure!(difference(&before, &dump()?).is_empty(), "{what}: something was changed");
            }
            machine.service.set_disabled(true);
            let run = machine.eniup("reconcile --timeout 5s")?;
            if run.exit != 69 || !run.stderr.contains("403") {
                bail!("403: exit {}: {}", run.exit, run.stderr);
            }
            ensure!(difference(&before, &dump()?).is_empty(), "403: something was changed");
            Ok(())
        })
    });
}

/// With an address goes what came after it with the same network, where `promote_secondaries` is 0, as it is unless systemd sets it.
#[test]
fn what_is_not_ours_does_not_go_with_an_address_of_ours() {
    inside(|| {
        for (promotes, kernel) in [(false, Kernel::Own), (true, Kernel::Own), (false, Kernel::Old)] {
            with_two_enis(|machine| {
                machine.kernel = kernel;
                let whole = read_leaves(&scenario("two-subnets-dual-stack")?.folder.join("metadata.json"))?;
                std::fs::write("/proc/sys/net/ipv4/conf/eth02/promote_secondaries", if promotes { "1" } else { "0" })?;
                machine.reconcile(0)?;
                ip("addr add 10.0.1.77/24 dev eth02 noprefixroute")?;
                let mut another = whole.clone();
                another.insert("network/interfaces/macs/02:00:00:00:00:02/local-ipv4s".into(), "10.0.1.30".into());
                machine.publish(another);
                let has = |address: &str| ip("addr show eth02").map(|shown| shown.contains(&format!("{address}/")));
                let run = machine.eniup("reconcile")?;
                ensure!(run.exit == 0 && has("10.0.1.30")? && has("10.0.1.77")?, "{}: {}", run.exit, run.stderr);
                let said =
                    "10.0.1.20/24 stays on eth02: the kernel would take 10.0.1.77/24 along, which is not eniup's";
                ensure!(has("10.0.1.20")? != promotes && run.stderr.contains(said) != promotes, "{}", run.stderr);
                machine.assert_settled()?;
                let run = machine.eniup("release")?;
                ensure!(run.exit == i32::from(!promotes) && has("10.0.1.77")?, "{}: {}", run.exit, run.stderr);
                ensure!(run.stderr.contains(said) != promotes, "{}", run.stderr);
                // When the other one has gone, so does ours.
                ip("addr del 10.0.1.77/24 dev eth02")?;
                let run = machine.eniup("release")?;
                ensure!(run.exit == 0 && !has("10.0.1.20")?, "{}: {}", run.exit, run.stderr);
                Ok(())
            })
            .with_context(|| format!("promotes: {promotes}, {kernel:?}"))?;
        }
        Ok(())
    });
}

#[test]
fn a_rollback_takes_nothing_of_others_along() {
    inside(|| {
        with_two_enis(|machine| {
            std::fs::write("/proc/sys/net/ipv4/conf/eth02/promote_secondaries", "0")?;
            let mut command = machine.command("reconcile --confirm 2");
            let trial = std::thread::spawn(move || command.output());
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while !ip("addr show eth02")?.contains("10.0.1.20/24") {
                ensure!(std::time::Instant::now() < deadline, "the run on trial does nothing");
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            ip("addr add 10.0.1.77/24 dev eth02 noprefixroute")?;
            let output = trial.join().expect("the thread has not panicked")?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(said.contains("10.0.1.20/24 stays on eth02"), "{said}");
            ensure!(ip("addr show eth02")?.contains("10.0.1.77/24"), "{said}");
            Ok(())
        })
    });
}
