//! Full tunnels that come after eniup, on the real kernel: what wg-quick does by its ip(8) commands, and eniup's answer.

mod support;

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use support::machine::{Machine, command, inside, ip, on_a_machine, output, scenario};

/// As wg-quick(8) has it in `add_default`; no priority is given, so the kernel takes the one before the first there is.
const UP: [&str; 8] = [
    "link add wg0 type veth peer name wire",
    "link set wg0 up",
    "-4 route add 0.0.0.0/0 dev wg0 table 51820",
    "-4 rule add not fwmark 51820 table 51820",
    "-4 rule add table main suppress_prefixlength 0",
    "-6 route add ::/0 dev wg0 table 51820",
    "-6 rule add not fwmark 51820 table 51820",
    "-6 rule add table main suppress_prefixlength 0",
];

/// As in its `del_if`: while there is one, delete one.
fn take_down() -> Result<usize> {
    let mut deleted = 0;
    for family in ["-4", "-6"] {
        for (shown, named) in [
            ("lookup 51820", "table 51820"),
            ("from all lookup main suppress_prefixlength 0", "table main suppress_prefixlength 0"),
        ] {
            while ip(&format!("{family} rule show"))?.contains(shown) {
                ip(&format!("{family} rule delete {named}"))?;
                deleted += 1;
                ensure!(deleted < 100, "wg-quick would never end: {}", ip("rule")?);
            }
        }
    }
    ip("link del wg0")?;
    Ok(deleted)
}

fn bring_up() -> Result<()> {
    UP.iter().try_for_each(|line| ip(line).map(drop))
}

fn rules() -> Result<BTreeSet<String>> {
    let all = format!("{}{}", ip("-4 rule show")?, ip("-6 rule show")?);
    Ok(all.lines().map(String::from).collect())
}

fn on_a_dual_stack_machine<T: Send>(test: impl FnOnce(&mut Machine) -> Result<T> + Send) -> Result<T> {
    let scenario = scenario("two-subnets-dual-stack")?;
    on_a_machine(|machine| {
        machine.become_attached(&scenario.folder.join("metadata.json"), &scenario.attached)?;
        machine.reconcile(0)?;
        test(machine)
    })
}

/// The way of a packet that is not marked, as ip(8) tells it.
fn way(to: &str, from: &str) -> Result<String> {
    ip(&format!("route get {to} from {from}"))
}

#[test]
fn a_tunnel_that_comes_after_eniup_takes_no_enis_traffic_once_eniup_has_run() {
    inside(|| {
        on_a_dual_stack_machine(|machine| {
            bring_up()?;
            for (to, from) in [("203.0.113.9", "10.0.1.20"), ("2600::9", "2600:1f16:67f:f201::14")] {
                ensure!(way(to, from)?.contains("dev wg0"), "the tunnel takes nothing: {}", way(to, from)?);
            }
            machine.reconcile(0)?;
            machine.assert_settled()?;
            for (to, from) in [("203.0.113.9", "10.0.1.20"), ("2600::9", "2600:1f16:67f:f201::14")] {
                ensure!(way(to, from)?.contains("dev eth02"), "{}", way(to, from)?);
            }
            // All else stays the tunnel's.
            ensure!(ip("route get 203.0.113.9")?.contains("dev wg0"), "{}", ip("route get 203.0.113.9")?);
            ensure!(way("203.0.113.9", "10.0.0.10")?.contains("dev wg0"), "{}", way("203.0.113.9", "10.0.0.10")?);
            Ok(())
        })
    });
}

#[test]
fn wg_quick_can_take_its_rules_away_and_bring_them_back_and_the_next_run_cleans_up() {
    inside(|| {
        on_a_dual_stack_machine(|machine| {
            let before = rules()?;
            for _ in 0..3 {
                bring_up()?;
                machine.reconcile(0)?;
                machine.assert_settled()?;
                ensure!(rules()?.iter().any(|rule| rule.contains("goto 19900")), "{:#?}", rules()?);
                // Its own four, and what eniup has said again of them.
                ensure!(take_down()? == 6, "{:#?}", rules()?);
                machine.reconcile(0)?;
                machine.assert_settled()?;
                ensure!(rules()? == before, "{:#?}", rules()?);
            }
            Ok(())
        })
    });
}

#[test]
fn a_tunnel_that_comes_back_before_the_next_run_is_passed_again() {
    inside(|| {
        on_a_dual_stack_machine(|machine| {
            bring_up()?;
            machine.reconcile(0)?;
            take_down()?;
            bring_up()?;
            ensure!(way("203.0.113.9", "10.0.1.20")?.contains("dev wg0"), "{:#?}", rules()?);
            machine.reconcile(0)?;
            machine.assert_settled()?;
            ensure!(way("203.0.113.9", "10.0.1.20")?.contains("dev eth02"), "{:#?}", rules()?);
            Ok(())
        })
    });
}

/// Tailscale's rule is there without an exit node, too; rules of an administrator behind it hold for ENIs as for all others.
#[test]
fn what_an_administrator_forbids_stays_forbidden_behind_a_rule_that_is_passed() {
    inside(|| {
        on_a_dual_stack_machine(|machine| {
            ip("rule add priority 6000 to 198.51.100.0/24 prohibit")?;
            ip("rule add priority 6001 ipproto tcp dport 25 unreachable")?;
            for passed in ["", "rule add priority 5270 lookup 52"] {
                if !passed.is_empty() {
                    ip(passed)?;
                }
                machine.reconcile(0)?;
                machine.assert_settled()?;
                ensure!(way("198.51.100.1", "10.0.1.20").is_err(), "it is forbidden no more: {:#?}", rules()?);
                ensure!(way("8.8.8.8", "10.0.1.20 ipproto tcp dport 25").is_err(), "{:#?}", rules()?);
                ensure!(way("8.8.8.8", "10.0.1.20")?.contains("dev eth02"), "{:#?}", rules()?);
            }
            Ok(())
        })
    });
}

#[test]
fn a_rule_that_cannot_be_passed_is_named() {
    inside(|| {
        on_a_dual_stack_machine(|machine| {
            ip("rule add priority 1 lookup 51820")?;
            let plan = machine.eniup("plan")?;
            ensure!(plan.stderr.contains("somebody's rule 1 takes traffic of ENIs"), "{}", plan.stderr);
            let status = machine.eniup("status")?;
            ensure!(status.stdout.contains("somebody's rule 1 takes traffic of ENIs"), "{}", status.stdout);
            Ok(())
        })
    });
}

#[test]
fn release_takes_the_way_past_a_tunnel_and_leaves_the_tunnel() {
    inside(|| {
        on_a_dual_stack_machine(|machine| {
            bring_up()?;
            let theirs: BTreeSet<String> = rules()?.into_iter().filter(|rule| !rule.contains("proto 176")).collect();
            machine.reconcile(0)?;
            ensure!(rules()?.iter().any(|rule| rule.contains(" goto ")), "{:#?}", rules()?);
            machine.eniup("release")?;
            ensure!(rules()? == theirs, "{:#?}", rules()?);
            Ok(())
        })
    });
}

#[test]
fn the_printed_way_past_a_tunnel_run_through_iproute2_is_the_same() {
    inside(|| {
        on_a_dual_stack_machine(|machine| {
            bring_up()?;
            let script = machine.eniup("plan")?.stdout;
            ensure!(script.contains(" goto "), "{script}");
            let made = output(command("sh").args(["-ec", &script]))?;
            ensure!(made.status.success(), "{script}\n{}", String::from_utf8_lossy(&made.stderr));
            machine.assert_settled()
        })
    });
}
