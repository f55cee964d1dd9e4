//! The ledger as a file: whatever stands in its place costs what it would have said, and a line in the log.

mod support;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use support::machine::{Kernel, Machine, difference, inside, ip, with_scenario, with_two_enis};
use support::moments::settled_dump;

fn path(machine: &Machine) -> PathBuf {
    machine.directory.join("ledger.json")
}

/// A run repairs what is broken though the ledger is as it is, with so many lines about that in the log; the next is
/// silent.
fn assert_costs(machine: &Machine, what: &str, lines: usize) -> Result<()> {
    ip("rule del priority 24001")?;
    let run = machine.eniup("reconcile")?;
    ensure!(run.exit == 0, "{what}: exit {}: {}", run.exit, run.stderr);
    let said = run.stderr.lines().filter(|line| line.contains("ledger.json")).count();
    ensure!(said == lines, "{what}: {said} lines in the log: {}", run.stderr);
    machine.assert_settled().with_context(|| what.to_string())
}

#[test]
fn a_ledger_that_cannot_be_read_costs_a_line_in_the_log() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let whole = fs::read(path(machine))?;
            let mut bodies: Vec<Vec<u8>> = (0..whole.len() - 1).step_by(23).map(|end| whole[..end].to_vec()).collect();
            bodies.extend([b"[]".to_vec(), b"null".to_vec(), b"{\"version\": \"one\"}".to_vec(), vec![0xff; 4096]]);
            ensure!(bodies.len() > 10, "the ledger is too short to be cut");
            for body in bodies {
                fs::write(path(machine), &body)?;
                assert_costs(machine, &body.escape_ascii().to_string(), 1)?;
            }
            Ok(())
        })
    });
}

#[test]
fn one_that_cannot_be_written_costs_a_line_in_the_log_and_no_address() {
    inside(|| {
        with_two_enis(|machine| {
            fs::create_dir_all(path(machine).join("in the way"))?;
            let run = machine.eniup("reconcile")?;
            ensure!(run.exit == 0, "exit {}: {}", run.exit, run.stderr);
            ensure!(run.stderr.contains("going on without it"), "{}", run.stderr);
            ensure!(ip("addr show eth02")?.contains("10.0.1.20/24"), "the ENI was not done");
            Ok(())
        })
    });
}

/// Changes one field of the ledger after a run and releases: what was noted is not believed, so the link stays up.
fn assert_ignored(field: &str, value: serde_json::Value) -> Result<()> {
    with_two_enis(|machine| {
        let found = settled_dump()?;
        machine.reconcile(0)?;
        let text = fs::read_to_string(path(machine))?;
        let mut ledger: serde_json::Value = serde_json::from_str(&text)?;
        ensure!(ledger[field] != serde_json::Value::Null, "the ledger has no {field}");
        ledger[field] = value;
        fs::write(path(machine), ledger.to_string())?;
        assert_costs(machine, field, 0)?;
        fs::write(path(machine), ledger.to_string())?;
        let release = machine.eniup("release")?;
        ensure!(release.exit == 0, "release: {}", release.stderr);
        ensure!(ip("link show eth02")?.contains(",UP"), "{field}: the link was put back by notes of another's links");

        // The judge first: with its own notes the link goes down.
        machine.reconcile(0)?;
        ip("link set eth02 up")?;
        fs::write(path(machine), text)?;
        machine.eniup("release")?;
        let difference = difference(&found, &settled_dump()?);
        ensure!(difference.is_empty(), "by its own notes:\n{difference}");
        Ok(())
    })
}

#[test]
fn notes_of_another_version_boot_or_instance_are_ignored() {
    inside(|| {
        assert_ignored("version", 99.into())?;
        assert_ignored("boot", "00000000-0000-0000-0000-000000000000 net:[1]".into())?;
        assert_ignored("primary", "02:00:00:00:00:99".into())
    });
}

/// As a kill between any two writes leaves it: the old ledger, with part of a new one beside it.
#[test]
fn a_ledger_half_written_when_the_run_was_killed_is_as_if_it_had_not_begun() {
    inside(|| {
        with_two_enis(|machine| {
            let found = settled_dump()?;
            machine.reconcile(0)?;
            let left = fs::read_dir(&machine.directory)?.filter_map(|entry| Some(entry.ok()?.file_name()));
            let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with('.')).collect();
            ensure!(left.is_empty(), "{left:?} is left behind");
            // By each number that the next process may have.
            for number in 1..99 {
                fs::write(path(machine).with_file_name(format!(".ledger.json.{number}")), "{\"version\": 1, ")?;
            }
            assert_costs(machine, "half a ledger beside the whole one", 0)?;
            let release = machine.eniup("release")?;
            ensure!(release.exit == 0, "release: {}", release.stderr);
            let difference = difference(&found, &settled_dump()?);
            ensure!(difference.is_empty(), "after release:\n{difference}");
            Ok(())
        })
    });
}

/// That the mark is really forgotten in the tests that say so: without the ledger nobody knows whose an address is.
#[test]
fn on_a_kernel_that_forgets_the_mark_of_addresses_the_ledger_alone_says_which_are_ours() {
    inside(|| {
        with_two_enis(|machine| {
            for (kernel, is_known) in [(Kernel::Own, true), (Kernel::Old, false)] {
                machine.kernel = kernel;
                machine.reconcile(0)?;
                let whole = fs::read(path(machine))?;
                fs::remove_file(path(machine))?;
                ensure!(machine.eniup("release")?.exit == 0, "release failed");
                let is_gone = !ip("addr show eth02")?.contains("10.0.1.20");
                ensure!(is_gone == is_known, "{kernel:?}: without a ledger the address is gone: {is_gone}");
                fs::write(path(machine), whole)?;
                ensure!(machine.eniup("release")?.exit == 0, "release failed");
                ensure!(!ip("addr show eth02")?.contains("10.0.1.20"), "{kernel:?}: the ledger's address is left over");
            }
            Ok(())
        })
    });
}

/// As networkd does and as NetworkManager does, both by DHCP: the kernel's key of such an address is that of ours.
#[test]
fn on_a_kernel_that_forgets_the_mark_of_addresses_one_that_took_the_place_of_ours_is_not_ours() {
    inside(|| {
        for lifetime in ["", "noprefixroute valid_lft 3600 preferred_lft 3600"] {
            with_two_enis(|machine| {
                machine.kernel = Kernel::Old;
                machine.reconcile(0)?;
                let ours = "10.0.1.20/24 dev eth02";
                ensure!(ip("addr show eth02")?.contains("inet 10.0.1.20/24"), "{}", ip("addr show eth02")?);
                ip(&format!("addr del {ours}"))?;
                ip(&format!("addr add {ours} {lifetime}"))?;
                ip("route add default via 10.0.1.1 dev eth02 src 10.0.1.20 metric 4096 onlink")?;
                for verb in ["reconcile", "reconcile", "release"] {
                    let run = machine.eniup(verb)?;
                    ensure!(run.exit == 0, "{verb}: {}", run.stderr);
                    let addresses = ip("addr show eth02")?;
                    ensure!(
                        addresses.contains("inet 10.0.1.20/24"),
                        "{verb} ({lifetime}): {}\n{addresses}",
                        run.stderr
                    );
                    ensure!(ip("route show default")?.contains("eth02"), "{verb} ({lifetime}): {}", run.stderr);
                }
                Ok(())
            })?;
        }
        Ok(())
    });
}

/// A release beside it leaves it alone, and knows what is to be put back when that is over.
#[test]
fn what_is_noted_of_an_ignored_eni_is_known_after_a_release_of_the_rest() {
    inside(|| {
        for kernel in [Kernel::Own, Kernel::Old] {
            with_two_enis(|machine| {
                machine.kernel = kernel;
                let found = settled_dump()?;
                machine.reconcile(0)?;
                machine.configure("[[ignore]]\nmac = '02:00:00:00:00:02'\n")?;
                let beside = machine.eniup("release")?;
                ensure!(beside.exit == 0, "{}: {}", beside.exit, beside.stderr);
                ensure!(ip("addr show eth02")?.contains("10.0.1.20/24"), "what is ignored is gone");
                machine.configure("")?;
                let release = machine.eniup("release")?;
                ensure!(release.exit == 0, "{}: {}", release.exit, release.stderr);
                let difference = difference(&found, &settled_dump()?);
                ensure!(difference.is_empty(), "{kernel:?}:\n{difference}");
                let left = fs::read_to_string(path(machine))?;
                ensure!(!left.contains("altnames"), "what is put back is noted still: {left}");
                Ok(())
            })?;
        }
        Ok(())
    });
}

/// What has been put back is not put back again by the next release, though something else had to stay.
#[test]
fn a_release_that_leaves_something_knows_no_more_of_what_it_has_put_back() {
    inside(|| {
        with_two_enis(|machine| {
            fs::write("/proc/sys/net/ipv4/conf/eth02/promote_secondaries", "0")?;
            machine.reconcile(0)?;
            ip("addr add 10.0.1.99/24 dev eth02 noprefixroute")?;
            let release = machine.eniup("release")?;
            ensure!(release.exit == 1 && ip("addr show eth02")?.contains("10.0.1.20/24"), "{}", release.stderr);
            ip("link set eth02 mtu 1400")?;
            ip("link property add dev eth02 altname device-number-1")?;
            let set = settled_dump()?;
            let again = machine.eniup("release")?;
            ensure!(again.exit == 1, "{}", again.stderr);
            let difference = difference(&set, &settled_dump()?);
            ensure!(difference.is_empty(), "{difference}");
            Ok(())
        })
    });
}

/// There is no ::1 then, whose mark tells that the kernel keeps marks.
#[test]
fn without_ipv6_an_address_that_took_the_place_of_ours_is_not_ours() {
    inside(|| {
        with_scenario("one-eni-gets-its-secondary-addresses", |machine| {
            fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")?;
            fs::write("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "1")?;
            ensure!(!ip("-6 addr show lo")?.contains("::1"), "there is IPv6 still");
            machine.reconcile(0)?;
            let ours = "10.0.0.11/32 dev eth01";
            ip(&format!("addr del {ours}"))?;
            ip(&format!("addr add {ours} noprefixroute"))?;
            let release = machine.eniup("release")?;
            ensure!(release.exit == 0, "{}", release.stderr);
            ensure!(ip("addr show eth01")?.contains("10.0.0.11/32"), "somebody's address is gone: {}", release.stderr);
            Ok(())
        })
    });
}

/// Which boot and namespace notes are of is told by a socket, which needs no port.
#[test]
fn notes_are_known_where_all_udp_ports_are_in_use() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            ensure!(ip("link show eth02")?.contains("device-number-1"), "it has no such name");
            fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40127")?;
            let mut taken = Vec::new();
            while let Ok(socket) = std::net::UdpSocket::bind(("0.0.0.0", 0)) {
                taken.push(socket);
            }
            ensure!(taken.len() > 100, "{} ports are in use", taken.len());
            let release = machine.eniup("release")?;
            ensure!(release.exit == 0, "{}", release.stderr);
            ensure!(!ip("link show eth02")?.contains("device-number-1"), "its notes were not known");
            Ok(())
        })
    });
}
