//! ENIs of which metadata does not tell all at the moment: what they have stays theirs, whatever metadata gives to others, and what
//! their rules would capture is given to nobody.

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use eniup::metadata::eni_directory;
use eniup::net::MacAddr;
use eniup::policy::{ARRIVAL_DOUBT, PROOF_PAUSE};
use support::machine::{
    Machine, age_arrivals, age_notes, difference, inside, ip, on_a_machine, read_leaves, scenario, with_scenario,
};
use support::moments::{arrange, observe, settled_dump, ways};
use support::{Scenario, scenarios};
use vpc_lab::imds::{Action, Faults, Occurrences, Rule};

/// Two secondary ENIs, 2 and 3, in one subnet, `10.0.1.0/24`.
const SHARED: &str = "three-enis-of-which-two-share";
const BOTH: [u8; 2] = [2, 3];

type Leaves = BTreeMap<String, String>;

fn path(eni: u8, key: &str) -> String {
    let mac = MacAddr::from_bytes(&[2, 0, 0, 0, 0, eni]).expect("six bytes are a MAC address");
    format!("{}{key}", eni_directory(mac))
}

fn told(name: &str) -> Result<Leaves> {
    read_leaves(&scenario(name)?.folder.join("metadata.json"))
}

/// With one line more in a key.
fn and(mut leaves: Leaves, eni: u8, key: &str, line: &str) -> Leaves {
    let body = leaves.entry(path(eni, key)).or_default();
    *body = format!("{body}\n{line}").trim().into();
    leaves
}

/// Each read of this key, or of this list of keys, ends with 503 from now on.
fn fail(machine: &Machine, path: &str) {
    let rules = vec![Rule::new(
        &format!("*/{}", path.trim_start_matches("network/")),
        Occurrences::Always,
        Action::Status(503),
    )];
    machine.service.set_faults(Faults { rules, ..Faults::default() });
}

fn be_well(machine: &Machine) {
    machine.service.set_faults(Faults::default());
}

/// The ENIs that have the address.
fn holders(address: &str) -> Result<Vec<u8>> {
    let shown = ip("-o addr show")?;
    let has = |eni: &u8| {
        shown.lines().any(|line| line.contains(&format!(" eth0{eni} ")) && line.contains(&format!(" {address}/")))
    };
    Ok((1..=3).filter(has).collect())
}

/// The ENI by which the kernel sends what comes from the address.
fn leaves_by(address: &str) -> Result<u8> {
    let way = ip(&format!("route get 198.51.100.7 from {address}"))?;
    let link = way.split_whitespace().skip_while(|word| *word != "dev").nth(1).context("no way")?;
    Ok(link.trim_start_matches("eth0").parse()?)
}

/// What one bad read says of an ENI.
#[derive(Clone, Copy, Debug)]
enum Lie {
    Unlisted,
    Unread,
    WithoutSubnet,
    /// Nothing but its name and number.
    Bare,
}

impl Lie {
    fn tell(self, machine: &Machine, mac: MacAddr, told: &Leaves) {
        let directory = eni_directory(mac);
        let mut leaves = told.clone();
        match self {
            Lie::Unlisted => leaves.retain(|path, _| !path.starts_with(&directory)),
            Lie::Unread => fail(machine, &format!("{directory}*")),
            Lie::Bare => leaves.retain(|path, _| {
                let key = path.strip_prefix(&directory);
                key.is_none_or(|key| ["interface-id", "device-number", "network-card"].contains(&key))
            }),
            Lie::WithoutSubnet => leaves.retain(|path, _| !path.starts_with(&format!("{directory}subnet-ip"))),
        }
        machine.publish(leaves);
    }
}

/// Others have routes by the links of ENIs there, rules, or ENIs of their own: what keeps an ENI's traffic from those is there because
/// of what is known of *another* ENI.
fn beside_others() -> Result<Vec<Scenario>> {
    let is_beside_others = |scenario: &Scenario| {
        let support::Machine { foreign_address, group, main, rules, enslave, twice, .. } = &scenario.machine;
        let has_others = !(foreign_address.is_empty() && group.is_empty() && main.is_empty() && rules.is_empty());
        (has_others || scenario.configuration().is_some()) && enslave.is_empty() && twice.is_empty()
    };
    Ok(scenarios()?.into_iter().filter(is_beside_others).collect())
}

#[test]
fn one_bad_read_of_an_eni_sends_nothing_another_way() {
    inside(|| {
        let mut tried = 0;
        for scenario in beside_others()? {
            let told = read_leaves(&scenario.folder.join("metadata.json"))?;
            let primary = scenario.attached.primary;
            let enis: Vec<MacAddr> = scenario.attached.ready.keys().filter(|mac| **mac != primary).copied().collect();
            on_a_machine(|machine| {
                arrange(machine, &scenario)?;
                machine.eniup("reconcile --timeout 300ms")?;
                let before = ways(&observe()?)?;
                ensure!(before.len() > 1, "nothing is there: {before:?}");
                for mac in enis {
                    for (lie, verb) in [
                        (Lie::Unlisted, "reconcile --automatic"),
                        (Lie::Unread, "reconcile --automatic"),
                        (Lie::Unread, "reconcile"),
                        (Lie::WithoutSubnet, "reconcile --automatic"),
                        (Lie::Bare, "reconcile --automatic"),
                    ] {
                        lie.tell(machine, mac, &told);
                        let run = machine.eniup(&format!("{verb} --timeout 300ms"))?;
                        let after = ways(&observe()?)?;
                        let other: Vec<_> = before.iter().filter(|(way, by)| after.get(way) != Some(by)).collect();
                        ensure!(other.is_empty(), "{verb}, {lie:?} {mac}: {other:?}\n{}: {}", run.exit, run.stderr);
                        be_well(machine);
                        machine.publish(told.clone());
                        let well = machine.eniup("reconcile --automatic --timeout 300ms")?;
                        ensure!(ways(&observe()?)? == before, "{lie:?} {mac}, afterwards: {}", well.stderr);
                        tried += 1;
                    }
                }
                Ok(())
            })
            .with_context(|| scenario.name.clone())?;
        }
        ensure!(tried > 50, "only {tried} tried");
        Ok(())
    });
}

/// Whose security groups one read tells wrongly is somebody else's for that moment; what is there stays there, and does as before.
#[test]
fn the_only_other_eni_that_comes_to_be_ignored_sends_nothing_another_way() {
    const BOTH_DEFAULTS: &str = "anothers-default-in-main-is-not-the-primarys";
    inside(|| {
        for verb in ["reconcile --automatic", "reconcile"] {
            on_a_machine(|machine| {
                arrange(machine, &scenario(BOTH_DEFAULTS)?)?;
                machine.configure("[[ignore]]\nsecurity_group = 'eks-*'\n")?;
                let verb = format!("{verb} --timeout 300ms");
                let of_group = |group: &str| -> Result<Leaves> {
                    let mut leaves = told(BOTH_DEFAULTS)?;
                    for eni in 1..=2 {
                        leaves.insert(path(eni, "security-groups"), if eni == 2 { group } else { "web" }.into());
                        leaves.insert(path(eni, "security-group-ids"), "sg-1".into());
                    }
                    leaves.insert(path(2, "interface-id"), "eni-00000002".into());
                    Ok(leaves)
                };
                machine.publish(of_group("web")?);
                let run = machine.eniup(&verb)?;
                ensure!(run.exit == 0 && leaves_by("10.0.0.10")? == 1, "{}: {}", run.exit, run.stderr);
                let before = ways(&observe()?)?;
                machine.publish(of_group("eks-nodes")?);
                let run = machine.eniup(&verb)?;
                ensure!(run.exit == 0 && ways(&observe()?)? == before, "{}: {}", run.exit, run.stderr);
                // Once nothing of ours is there any more, and main is the primary's, there is nothing to keep apart from.
                ip("-6 route del default dev eth02")?;
                let released = machine.eniup("release --eni eni-00000002")?;
                ensure!(released.exit == 0, "{}: {}", released.exit, released.stderr);
                machine.eniup(&verb)?;
                ensure!(!ip("rule show")?.contains(" to 10.0.1.0/24 "), "{}", ip("rule show")?);
                Ok(())
            })
            .with_context(|| verb)?;
        }
        Ok(())
    });
}

const IGNORED: &str = "ignored-eni-in-a-subnet-of-its-own";

/// Of an ENI that is ignored nothing in the kernel is ours; that it was there only the ledger knows, and what `main` has.
#[test]
fn an_ignored_eni_that_is_not_listed_sends_nothing_another_way_when_the_ledger_is_lost() {
    inside(|| {
        for ledger in [None, Some("{"), Some("{\"version\": 999}")] {
            on_a_machine(|machine| {
                let scenario = scenario(IGNORED)?;
                arrange(machine, &scenario)?;
                let verb = "reconcile --automatic --timeout 300ms";
                machine.eniup(verb)?;
                let before = ways(&observe()?)?;
                let file = machine.directory.join("ledger.json");
                match ledger {
                    Some(text) => std::fs::write(file, text)?,
                    None => std::fs::remove_file(file)?,
                }
                let third = MacAddr::from_bytes(&[2, 0, 0, 0, 0, 3]).context("a MAC address")?;
                Lie::Unlisted.tell(machine, third, &told(IGNORED)?);
                let run = machine.eniup(verb)?;
                ensure!(run.exit == 0 && ways(&observe()?)? == before, "{}: {}", run.exit, run.stderr);
                Ok(())
            })
            .with_context(|| format!("{ledger:?}"))?;
        }
        Ok(())
    });
}

/// An old value of what the configuration asks for would make it eniup's, and what eniup has put there stays once it is left alone again.
#[test]
fn what_is_left_alone_becomes_ours_on_proof_only_and_by_hand_at_once() {
    inside(|| {
        let of_group = |group: &str| -> Result<Leaves> {
            let mut leaves = told(SHARED)?;
            for eni in 1..=3 {
                leaves.insert(path(eni, "security-groups"), if eni == 3 { group } else { "web" }.into());
                leaves.insert(path(eni, "security-group-ids"), "sg-1".into());
            }
            if group.is_empty() {
                leaves.remove(&path(3, "security-groups"));
            }
            Ok(leaves)
        };
        for is_by_hand in [false, true] {
            with_scenario(SHARED, |machine| {
                machine.configure("[[ignore]]\nsecurity_group = 'eks-*'\n")?;
                let run = |verb: &str, group: &str, is_managed: bool| -> Result<()> {
                    machine.publish(of_group(group)?);
                    let run = machine.eniup(&format!("{verb} --timeout 300ms"))?;
                    let exit = if is_managed || group == "eks-nodes" { 0 } else { 3 };
                    ensure!(run.exit == exit, "{verb} {group}: {} {}", run.exit, run.stderr);
                    ensure!(ip("addr show eth03")?.contains("10.0.1.") == is_managed, "{verb} {group}: {}", run.stderr);
                    Ok(())
                };
                run("reconcile", "eks-nodes", false)?;
                if is_by_hand {
                    return run("reconcile", "web", true);
                }
                run("reconcile --automatic", "web", false)?;
                run("reconcile --automatic", "eks-nodes", false)?;
                // Nobody knows, and then an old value.
                run("reconcile --automatic", "", false)?;
                age_notes(machine, PROOF_PAUSE)?;
                run("reconcile --automatic", "web", false)?;
                age_notes(machine, PROOF_PAUSE)?;
                run("reconcile --automatic", "web", true)
            })
            .with_context(|| format!("by hand: {is_by_hand}"))?;
        }
        Ok(())
    });
}

/// It is given to nobody meanwhile.
#[test]
fn what_goes_to_an_eni_that_is_still_left_alone_stays_where_it_is() {
    inside(|| {
        let with_groups = |group: &str, holder: u8| -> Result<Leaves> {
            let mut leaves = and(told(SHARED)?, holder, "local-ipv4s", "10.0.1.77");
            for eni in 1..=3 {
                leaves.insert(path(eni, "security-groups"), if eni == 3 { group } else { "web" }.into());
                leaves.insert(path(eni, "security-group-ids"), "sg-1".into());
            }
            Ok(leaves)
        };
        with_scenario(SHARED, |machine| {
            machine.configure("[[ignore]]\nsecurity_group = 'eks-*'\n")?;
            let verb = "reconcile --automatic --timeout 300ms";
            machine.publish(with_groups("eks-nodes", 2)?);
            machine.eniup(verb)?;
            ensure!(holders("10.0.1.77")? == [2], "{:?}", holders("10.0.1.77")?);
            age_arrivals(machine, ARRIVAL_DOUBT)?;
            machine.publish(with_groups("web", 3)?);
            let run = machine.eniup(verb)?;
            let is_named = run.stderr.contains("eni-03 is pending: it was left alone until now");
            ensure!(run.exit == 3 && is_named, "{}: {}", run.exit, run.stderr);
            ensure!(holders("10.0.1.77")? == [2] && leaves_by("10.0.1.77")? == 2, "{}", run.stderr);
            age_notes(machine, PROOF_PAUSE)?;
            let run = machine.eniup(verb)?;
            ensure!(run.exit == 0 && holders("10.0.1.77")? == [3], "{}: {}", run.exit, run.stderr);
            Ok(())
        })
    });
}

/// A family that the primary does not have: the only default is the first ENI's that has it, and stays so while that is left alone.
#[test]
fn a_default_in_main_of_an_eni_that_comes_to_be_ignored_is_in_nobodys_way() {
    inside(|| {
        let mut leaves = told(SHARED)?;
        for eni in BOTH {
            leaves.insert(path(eni, "ipv6s"), format!("2600:1f16::2{eni}"));
            leaves.insert(path(eni, "subnet-ipv6-cidr-blocks"), "2600:1f16::/64".into());
        }
        with_scenario(SHARED, |machine| {
            machine.publish(leaves);
            machine.reconcile(0)?;
            let default = || ip("-6 route show default table main");
            ensure!(default()?.contains("dev eth02"), "{}", default()?);
            machine.configure("[[ignore]]\nmac = '02:00:00:00:00:02'\n")?;
            for verb in ["reconcile --automatic", "reconcile"] {
                let run = machine.eniup(&format!("{verb} --timeout 300ms"))?;
                ensure!(run.exit == 0 && default()?.contains("dev eth02"), "{verb}: {} {}", run.exit, run.stderr);
            }
            Ok(())
        })
    });
}

/// The routes of the one that had the number before are in the place of those of the one that has it now.
#[test]
fn an_eni_gets_the_table_of_another_one_in_its_subnet_that_has_another_number_now() {
    inside(|| {
        with_scenario(SHARED, |machine| {
            let mut alone = told(SHARED)?;
            alone.retain(|key, _| !key.starts_with(&path(3, "")));
            machine.publish(alone);
            machine.reconcile(0)?;
            ensure!(ip("route show table 20001")?.contains("dev eth02"), "{}", ip("route show table 20001")?);
            let mut both = told(SHARED)?;
            both.insert(path(2, "device-number"), "2".into());
            both.insert(path(3, "device-number"), "1".into());
            machine.publish(both);
            machine.reconcile(0)?;
            ensure!(leaves_by("10.0.1.20")? == 2 && leaves_by("10.0.1.22")? == 3, "{}", ip("rule show")?);
            machine.assert_settled()
        })
    });
}

/// An ENI that is left alone keeps its own, and nothing of those that are gone.
#[test]
fn of_enis_that_are_gone_nothing_stays_because_of_one_that_is_left_alone() {
    inside(|| {
        with_scenario(IGNORED, |machine| {
            machine.reconcile(0)?;
            let narrow = |subnet: &str| Ok::<_, anyhow::Error>(ip("rule show")?.contains(&format!(" to {subnet} ")));
            ensure!(narrow("10.0.1.0/24")? && narrow("10.0.2.0/24")?, "{}", ip("rule show")?);
            let mut without_second = told(IGNORED)?;
            without_second.retain(|key, _| !key.starts_with(&path(2, "")));
            machine.publish(without_second);
            ip("link del eth02")?;
            machine.configure(&scenario(IGNORED)?.configuration().context("none")?)?;
            let run = machine.eniup("reconcile --automatic --timeout 300ms")?;
            ensure!(run.exit == 0 && narrow("10.0.1.0/24")? && !narrow("10.0.2.0/24")?, "{}", ip("rule show")?);
            Ok(())
        })
    });
}

/// `main`'s default is an ignored ENI's: whoever is connected to the primary is not cut off because a third one leaves.
#[test]
fn the_primary_keeps_its_own_default_when_the_last_managed_eni_goes() {
    inside(|| {
        let scenario = scenario(IGNORED)?;
        on_a_machine(|machine| {
            arrange(machine, &scenario)?;
            let verb = "reconcile --automatic --timeout 300ms";
            machine.eniup(verb)?;
            let before = ways(&observe()?)?;
            let mut without_second = told(IGNORED)?;
            without_second.retain(|key, _| !key.starts_with(&path(2, "")));
            machine.publish(without_second);
            ip("link del eth02")?;
            let run = machine.eniup(verb)?;
            let after = ways(&observe()?)?;
            ensure!(run.exit == 0 && !after.is_empty(), "{}: {}", run.exit, run.stderr);
            let other: Vec<_> = after.iter().filter(|(way, by)| before.get(way) != Some(by)).collect();
            ensure!(other.is_empty(), "{other:?}: {}", run.stderr);
            Ok(())
        })
    });
}

/// An ENI that may come to be in a subnet keeps nothing for itself that is another's by now.
#[test]
fn what_the_primary_has_given_away_leaves_by_its_new_eni_while_a_third_cannot_be_read() {
    inside(|| {
        const ALL: &str = "one-shared-subnet";
        let of = |eni: u8| Ok::<_, anyhow::Error>(and(told(ALL)?, eni, "ipv4-prefix", "10.0.0.96/28"));
        with_scenario(ALL, |machine| {
            machine.publish(of(1)?);
            machine.reconcile(0)?;
            // As a container's packet.
            ip("link add br7 address 02:97:00:00:00:01 type veth peer name br8")?;
            ip("link set br8 up")?;
            ip("link set br7 up")?;
            std::fs::write("/proc/sys/net/ipv4/conf/all/forwarding", "1")?;
            let way = || ip("route get 10.0.0.201 from 10.0.0.97 iif br7");
            ensure!(way()?.contains("dev eth01 "), "{}", way()?);
            machine.publish(of(2)?);
            fail(machine, &path(3, "local-ipv4s"));
            let run = machine.eniup("reconcile --timeout 300ms")?;
            ensure!(run.exit == 3 && way()?.contains("dev eth02 "), "{}{}: {}", way()?, run.exit, run.stderr);
            Ok(())
        })
    });
}

#[test]
fn what_an_eni_has_that_cannot_be_read_goes_to_no_other() {
    const VERBS: [&str; 2] = ["reconcile --automatic --timeout 2s", "reconcile --timeout 2s"];
    inside(|| {
        for holder in BOTH {
            let other = 5 - holder;
            let of = |eni: u8| Ok::<_, anyhow::Error>(and(told(SHARED)?, eni, "local-ipv4s", "10.0.1.77"));
            let both = and(of(holder)?, other, "local-ipv4s", "10.0.1.77");
            for (verb, key, claims) in [
                (VERBS[0], "local-ipv4s", of(other)?),
                (VERBS[1], "local-ipv4s", of(other)?),
                (VERBS[0], "interface-id", of(other)?),
                (VERBS[0], "device-number", both.clone()),
                (VERBS[1], "device-number", both.clone()),
            ] {
                with_scenario(SHARED, |machine| {
                    machine.publish(of(holder)?);
                    machine.reconcile(0)?;
                    let rules = ip("rule show")?;
                    machine.publish(claims.clone());
                    fail(machine, &path(holder, key));
                    let run = machine.eniup(verb)?;
                    let said = format!("eni-0{other} is pending: 10.0.1.77 overlaps what");
                    ensure!(run.exit == 3 && run.stderr.contains(&said), "{}: {}", run.exit, run.stderr);
                    ensure!(holders("10.0.1.77")? == [holder], "{:?}: {}", holders("10.0.1.77")?, run.stderr);
                    ensure!(leaves_by("10.0.1.77")? == holder, "{}", run.stderr);
                    let status = machine.eniup("status --timeout 2s")?;
                    ensure!(
                        status.exit == 3 && !status.stdout.contains("drifted"),
                        "{}: {}",
                        status.exit,
                        status.stdout
                    );
                    let plan = machine.eniup("plan --timeout 2s")?;
                    ensure!(plan.stdout.is_empty(), "left to do: {}", plan.stdout);
                    let gone = rules.lines().find(|rule| !ip("rule show").is_ok_and(|rules| rules.contains(*rule)));
                    ensure!(
                        gone.is_none_or(|rule| rule.starts_with(&format!("2000{}", other - 1))),
                        "{gone:?}: {}",
                        run.stderr
                    );
                    be_well(machine);
                    machine.publish(of(other)?);
                    machine.reconcile(0)?;
                    ensure!(holders("10.0.1.77")? == [other] && leaves_by("10.0.1.77")? == other, "it is not moved");
                    Ok(())
                })
                .with_context(|| format!("{verb}: {key} of ENI {holder} cannot be read"))?;
            }
        }
        Ok(())
    });
}

#[test]
fn what_the_primary_has_that_cannot_be_read_goes_to_no_other() {
    inside(|| {
        let of = |eni: u8| Ok::<_, anyhow::Error>(and(told("one-shared-subnet")?, eni, "local-ipv4s", "10.0.0.77"));
        with_scenario("one-shared-subnet", |machine| {
            machine.publish(of(1)?);
            machine.reconcile(0)?;
            ensure!(holders("10.0.0.77")? == [1]);
            machine.publish(of(2)?);
            fail(machine, &path(1, "local-ipv4s"));
            let run = machine.eniup("reconcile --automatic --timeout 2s")?;
            ensure!(run.exit == 3 && holders("10.0.0.77")? == [1], "{}: {}", run.exit, run.stderr);
            ensure!(leaves_by("10.0.0.77")? == 1, "{}", run.stderr);
            Ok(())
        })
    });
}

/// The other way round: the primary's rules come first, so it would take what it is given from all others.
#[test]
fn what_an_eni_has_goes_to_the_primary_only_when_metadata_gives_it_to_no_other() {
    const VERBS: [&str; 2] = ["reconcile --automatic --timeout 2s", "reconcile --timeout 2s"];
    inside(|| {
        let of = |eni: u8| Ok::<_, anyhow::Error>(and(told("one-shared-subnet")?, eni, "local-ipv4s", "10.0.0.77"));
        let both = and(of(1)?, 2, "local-ipv4s", "10.0.0.77");
        for (verb, claims, unread) in [
            (VERBS[0], of(1)?, Some("local-ipv4s")),
            (VERBS[1], of(1)?, Some("local-ipv4s")),
            (VERBS[0], both.clone(), None),
            (VERBS[1], both, None),
        ] {
            with_scenario("one-shared-subnet", |machine| {
                machine.publish(of(2)?);
                machine.reconcile(0)?;
                machine.publish(claims.clone());
                unread.into_iter().for_each(|key| fail(machine, &path(2, key)));
                let run = machine.eniup(verb)?;
                let said = "eni-01 is pending: 10.0.0.77 overlaps what";
                ensure!(run.exit == 3 && run.stderr.contains(said), "{}: {}", run.exit, run.stderr);
                let to_neighbour = ip("route get 10.0.0.9 from 10.0.0.77")?;
                ensure!(
                    holders("10.0.0.77")? == [2] && leaves_by("10.0.0.77")? == 2 && to_neighbour.contains("dev eth02"),
                    "{:?} {to_neighbour}: {}",
                    holders("10.0.0.77")?,
                    run.stderr
                );
                // What the machine stands on is never in doubt.
                ensure!(!ip("addr show eth01")?.is_empty() && !run.stderr.contains("first address"), "{}", run.stderr);
                be_well(machine);
                machine.publish(of(1)?);
                machine.reconcile(0)?;
                ensure!(holders("10.0.0.77")? == [1] && leaves_by("10.0.0.77")? == 1, "it is not moved");
                Ok(())
            })
            .with_context(|| format!("{verb}, {unread:?}"))?;
        }
        Ok(())
    });
}

/// Metadata may name them in another order, or lack the one that the distribution has put on the link: what is ours and told stays, and
/// what is told and not there comes.
#[test]
fn which_of_the_primarys_addresses_is_the_distributions_tells_its_link() {
    inside(|| {
        let list = path(1, "local-ipv4s");
        let of_primary = |addresses: &[&str]| -> Result<Leaves> {
            let mut leaves = told("one-shared-subnet")?;
            leaves.insert(list.clone(), addresses.join("\n"));
            Ok(leaves)
        };
        with_scenario("one-shared-subnet", |machine| {
            if holders("10.0.0.10")? != [1] {
                ip("addr add 10.0.0.10/24 dev eth01")?;
            }
            machine.publish(of_primary(&["10.0.0.10", "10.0.0.11"])?);
            machine.reconcile(0)?;
            ensure!(holders("10.0.0.11")? == [1]);
            for verb in ["reconcile --automatic", "reconcile"] {
                for other in [&["10.0.0.11", "10.0.0.10"][..], &["10.0.0.11"]] {
                    machine.publish(of_primary(other)?);
                    let run = machine.eniup(&format!("{verb} --timeout 2s"))?;
                    ensure!(run.exit == 0 && holders("10.0.0.11")? == [1], "{other:?}: {} {}", run.exit, run.stderr);
                    ensure!(!run.stderr.contains("addr "), "{other:?}: {}", run.stderr);
                }
            }
            // As DHCP has it.
            ip("addr replace 10.0.0.10/24 dev eth01 valid_lft 3600 preferred_lft 3600")?;
            machine.publish(of_primary(&["10.0.0.200", "10.0.0.11", "10.0.0.10"])?);
            machine.reconcile(0)?;
            ensure!(holders("10.0.0.200")? == [1] && holders("10.0.0.11")? == [1] && holders("10.0.0.10")? == [1]);
            machine.assert_settled()
        })
    });
}

/// By it people are connected.
#[test]
fn what_the_primary_has_by_dhcp_goes_to_no_other_whatever_metadata_says() {
    inside(|| {
        for verb in ["reconcile --automatic --timeout 2s", "reconcile --timeout 2s"] {
            with_scenario("one-shared-subnet", |machine| {
                if holders("10.0.0.10")? != [1] {
                    ip("addr add 10.0.0.10/24 dev eth01")?;
                }
                machine.reconcile(0)?;
                let mut lie = and(told("one-shared-subnet")?, 2, "local-ipv4s", "10.0.0.10");
                lie.insert(path(1, "local-ipv4s"), "10.0.0.11".into());
                machine.publish(lie);
                let run = machine.eniup(verb)?;
                let said = "eni-02 is pending: 10.0.0.10 overlaps what eni-01, the primary, has on its link";
                ensure!(run.exit == 3 && run.stderr.contains(said), "{}: {}", run.exit, run.stderr);
                ensure!(holders("10.0.0.10")? == [1] && leaves_by("10.0.0.10")? == 1, "{}", run.stderr);
                let neighbour = ip("route get 10.0.0.99 from 10.0.0.10")?;
                ensure!(neighbour.contains("dev eth01 "), "{neighbour}{}", run.stderr);
                Ok(())
            })
            .with_context(|| verb)?;
        }
        Ok(())
    });
}

/// Whoever configures that ENI may not know of it.
#[test]
fn what_metadata_gives_to_an_ignored_eni_goes_on_proof_only() {
    inside(|| {
        with_scenario(SHARED, |machine| {
            machine.configure("[[ignore]]\nid = 'eni-03'\n")?;
            let verb = |verb: &str| format!("{verb} --timeout 2s");
            let of = |eni: u8| Ok::<_, anyhow::Error>(and(told(SHARED)?, eni, "local-ipv4s", "10.0.1.77"));
            machine.publish(of(2)?);
            let run = machine.eniup(&verb("reconcile"))?;
            ensure!(run.exit == 0 && holders("10.0.1.77")? == [2], "{}: {}", run.exit, run.stderr);
            age_arrivals(machine, ARRIVAL_DOUBT)?;
            machine.publish(of(3)?);
            let run = machine.eniup(&verb("reconcile --automatic"))?;
            ensure!(run.exit == 0 && holders("10.0.1.77")? == [2], "{}: {}", run.exit, run.stderr);
            ensure!(leaves_by("10.0.1.77")? == 2, "{}", run.stderr);
            age_notes(machine, PROOF_PAUSE)?;
            let run = machine.eniup(&verb("reconcile --automatic"))?;
            ensure!(holders("10.0.1.77")?.is_empty(), "{}: {}", run.exit, run.stderr);
            Ok(())
        })
    });
}

/// It is still the other one's, on whose link it is.
#[test]
fn one_read_that_names_anothers_address_first_of_the_primarys_gives_it_nothing() {
    inside(|| {
        for verb in ["reconcile --automatic --timeout 2s", "reconcile --timeout 2s"] {
            for address in ["10.0.0.12", "10.0.0.13"] {
                with_scenario("one-shared-subnet", |machine| {
                    // As DHCP has it.
                    ip("addr replace 10.0.0.10/24 dev eth01 valid_lft 3600 preferred_lft 3600")?;
                    let whole = and(told("one-shared-subnet")?, 2, "local-ipv4s", "10.0.0.13");
                    machine.publish(whole.clone());
                    machine.reconcile(0)?;
                    ensure!(holders(address)? == [2], "{:?}", holders(address)?);
                    let mut lie = whole;
                    let own = lie[&path(1, "local-ipv4s")].clone();
                    // Before its own ones, and instead of them.
                    for lies in [format!("{address}\n{own}"), address.to_string()] {
                        lie.insert(path(1, "local-ipv4s"), lies);
                        machine.publish(lie.clone());
                        let run = machine.eniup(verb)?;
                        ensure!(run.exit == 3 && holders(address)? == [2], "{}: {}", run.exit, run.stderr);
                        let neighbour = ip(&format!("route get 10.0.0.99 from {address}"))?;
                        let is_its = neighbour.contains("dev eth02 ") && leaves_by(address)? == 2;
                        ensure!(is_its, "{neighbour}{}", run.stderr);
                    }
                    Ok(())
                })
                .with_context(|| format!("{verb}: {address}"))?;
            }
        }
        Ok(())
    });
}

/// Without DHCPv6 none of its IPv6 addresses is the distribution's but the first, as long as that is not ours.
#[test]
fn a_new_address_of_the_primary_comes_whichever_is_the_first() {
    inside(|| {
        with_scenario("one-shared-subnet", |machine| {
            let of_primary = |addresses: &str| -> Result<Leaves> {
                let mut leaves = told("one-shared-subnet")?;
                leaves.insert(path(1, "local-ipv4s"), addresses.into());
                Ok(leaves)
            };
            machine.publish(of_primary("10.0.0.10\n10.0.0.200")?);
            machine.reconcile(0)?;
            machine.publish(of_primary("10.0.0.200")?);
            machine.reconcile(0)?;
            machine.publish(of_primary("10.0.0.200\n10.0.0.201")?);
            machine.reconcile(0)?;
            ensure!(holders("10.0.0.200")? == [1] && holders("10.0.0.201")? == [1], "{}", ip("addr show eth01")?);
            machine.assert_settled()
        })
    });
}

/// ENI 2 had the prefix, by whose rule everything in it leaves; an address in it is ENI 3's.
#[test]
fn a_prefix_takes_no_address_in_it_by_one_read_and_an_address_waits_for_its_end() {
    inside(|| {
        let with_prefix = || Ok::<_, anyhow::Error>(and(told(SHARED)?, 2, "ipv4-prefix", "10.0.1.96/28"));
        let with_address = || Ok::<_, anyhow::Error>(and(told(SHARED)?, 3, "local-ipv4s", "10.0.1.97"));
        // A read from before.
        with_scenario(SHARED, |machine| {
            machine.publish(with_address()?);
            machine.reconcile(0)?;
            machine.publish(with_prefix()?);
            let run = machine.eniup("reconcile --automatic --timeout 2s")?;
            let said = "eni-02 is pending: 10.0.1.96/28 overlaps what was eni-03's a moment ago";
            ensure!(run.exit == 3 && run.stderr.contains(said), "{}: {}", run.exit, run.stderr);
            ensure!(holders("10.0.1.97")? == [3] && leaves_by("10.0.1.97")? == 3, "{}", run.stderr);
            Ok(())
        })?;
        // A fourth ENI, without a link here, cannot be read: nobody knows what it is given.
        for verb in ["reconcile --timeout 2s", "reconcile --automatic --timeout 2s"] {
            let unread = |mut leaves: Leaves| {
                for (key, body) in [("mac", "02:00:00:00:00:04"), ("subnet-ipv4-cidr-block", "10.0.1.0/24")] {
                    leaves.insert(path(4, key), body.into());
                }
                leaves
            };
            with_scenario(SHARED, |machine| {
                machine.publish(with_prefix()?);
                machine.reconcile(0)?;
                machine.publish(unread(with_address()?));
                let run = machine.eniup(verb)?;
                ensure!(run.exit == 3 && holders("10.0.1.97")?.is_empty(), "{}: {}", run.exit, run.stderr);
                ensure!(
                    run.stderr.contains("eni-03 is pending: 10.0.1.97 overlaps what was eni-02's"),
                    "{}",
                    run.stderr
                );
                machine.publish(with_address()?);
                machine.reconcile(0)?;
                ensure!(holders("10.0.1.97")? == [3] && leaves_by("10.0.1.97")? == 3, "it does not come");
                machine.publish(unread(with_prefix()?));
                let run = machine.eniup(verb)?;
                ensure!(run.exit == 3 && holders("10.0.1.97")? == [3], "{}: {}", run.exit, run.stderr);
                ensure!(leaves_by("10.0.1.97")? == 3, "{}", run.stderr);
                Ok(())
            })
            .with_context(|| verb)?;
        }
        Ok(())
    });
}

/// The machine stands on them.
#[test]
fn the_primarys_first_addresses_are_never_in_dispute() {
    inside(|| {
        with_scenario("one-shared-subnet", |machine| {
            machine.publish(and(told("one-shared-subnet")?, 2, "local-ipv4s", "10.0.0.10"));
            let run = machine.eniup("reconcile --timeout 2s")?;
            let said = "eni-02 is pending: 10.0.0.10 overlaps what metadata gives to eni-01";
            ensure!(run.exit == 3 && run.stderr.contains(said), "{}: {}", run.exit, run.stderr);
            ensure!(!run.stderr.contains("eni-01 is pending"), "{}", run.stderr);
            let rules = ip("rule show")?;
            ensure!(rules.contains("from 10.0.0.8/30 to 10.0.0.0/24 iif lo lookup 20000"), "{rules}");
            Ok(())
        })
    });
}

#[test]
fn what_the_primary_has_and_another_one_is_given_too_stays_with_it() {
    inside(|| {
        for verb in ["reconcile --automatic --timeout 2s", "reconcile --timeout 2s"] {
            with_scenario("one-shared-subnet", |machine| {
                let of_primary = and(told("one-shared-subnet")?, 1, "local-ipv4s", "10.0.0.77");
                machine.publish(of_primary.clone());
                machine.reconcile(0)?;
                machine.publish(and(of_primary, 2, "local-ipv4s", "10.0.0.77"));
                let run = machine.eniup(verb)?;
                ensure!(run.exit == 3 && holders("10.0.0.77")? == [1], "{}: {}", run.exit, run.stderr);
                ensure!(leaves_by("10.0.0.77")? == 1, "{}", run.stderr);
                Ok(())
            })?;
        }
        Ok(())
    });
}

/// A third one, of which nothing is known, has an old copy.
#[test]
fn what_is_in_dispute_stays_where_it_is() {
    inside(|| {
        for verb in ["reconcile --automatic --timeout 2s", "reconcile --timeout 2s"] {
            with_scenario(SHARED, |machine| {
                let of = |eni: u8| Ok::<_, anyhow::Error>(and(told(SHARED)?, eni, "local-ipv4s", "10.0.1.77"));
                machine.publish(of(2)?);
                machine.reconcile(0)?;
                ip("addr add 10.0.1.77/32 dev eth01")?;
                machine.publish(of(3)?);
                fail(machine, &path(1, "local-ipv4s"));
                let run = machine.eniup(verb)?;
                let said = "eni-03 is pending: 10.0.1.77 overlaps what eni-01 has";
                ensure!(run.exit == 3 && run.stderr.contains(said), "{}: {}", run.exit, run.stderr);
                ensure!(
                    holders("10.0.1.77")? == [1, 2] && leaves_by("10.0.1.77")? == 2,
                    "{:?}: {}",
                    holders("10.0.1.77")?,
                    run.stderr
                );
                machine.eniup("reconcile --timeout 2s")?;
                let plan = machine.eniup("plan --timeout 2s")?;
                ensure!(plan.stdout.is_empty(), "left to do: {}after {}", plan.stdout, run.stderr);
                ensure!(holders("10.0.1.77")? == [1, 2] && leaves_by("10.0.1.77")? == 2, "by hand it goes");
                ip("addr del 10.0.1.77/32 dev eth01")?;
                let run = machine.eniup("reconcile --timeout 2s")?;
                ensure!(holders("10.0.1.77")? == [3] && leaves_by("10.0.1.77")? == 3, "{}: {}", run.exit, run.stderr);
                Ok(())
            })
            .with_context(|| verb)?;
        }
        Ok(())
    });
}

/// ENI 2 is whole, and waits for the primary, which has its first address and of which nothing is known.
#[test]
fn what_an_eni_has_that_waits_for_another_goes_to_no_third() {
    inside(|| {
        with_scenario(SHARED, |machine| {
            let of = |eni: u8| Ok::<_, anyhow::Error>(and(told(SHARED)?, eni, "local-ipv4s", "10.0.1.77"));
            machine.publish(of(2)?);
            machine.reconcile(0)?;
            ip("addr add 10.0.1.20/32 dev eth01")?;
            machine.publish(of(3)?);
            fail(machine, &path(1, "local-ipv4s"));
            let run = machine.eniup("reconcile --timeout 2s")?;
            let said = [
                "eni-02 is pending: its first address: 10.0.1.20 overlaps what eni-01 has",
                "eni-03 is pending: 10.0.1.77 overlaps what eni-02 has",
            ];
            ensure!(run.exit == 3 && said.iter().all(|said| run.stderr.contains(said)), "{}: {}", run.exit, run.stderr);
            ensure!(holders("10.0.1.77")? == [2] && leaves_by("10.0.1.77")? == 2, "{}", run.stderr);
            Ok(())
        })
    });
}

/// A container network has its addresses on no link of the machine, but a route to each.
#[test]
fn a_containers_address_goes_to_no_eni_while_it_may_be_anothers() {
    inside(|| {
        for verb in ["reconcile --automatic --timeout 2s", "reconcile --timeout 2s"] {
            with_scenario(SHARED, |machine| {
                let before = told(SHARED)?;
                ip("link add pod0 type veth peer name pod1")?;
                ip("link set pod0 up")?;
                ip("route add 10.0.1.77/32 dev pod0")?;
                machine.publish(and(before.clone(), 3, "local-ipv4s", "10.0.1.77"));
                fail(machine, &path(2, "local-ipv4s"));
                let run = machine.eniup(verb)?;
                let said = "eni-03 is pending: a route in main leads to 10.0.1.77 as to a container's address";
                ensure!(run.exit == 3 && run.stderr.contains(said), "{}: {}", run.exit, run.stderr);
                ensure!(holders("10.0.1.77")?.is_empty(), "{}", run.stderr);
                be_well(machine);
                machine.reconcile(0)?;
                ensure!(holders("10.0.1.77")? == [3]);
                Ok(())
            })
            .with_context(|| verb)?;
        }
        Ok(())
    });
}

/// As if it were not attached, with what it had given to another one.
#[test]
fn what_an_eni_has_that_is_not_listed_goes_to_another_on_proof_only() {
    inside(|| {
        for holder in BOTH {
            with_scenario(SHARED, |machine| {
                let other = 5 - holder;
                machine.publish(and(told(SHARED)?, holder, "local-ipv4s", "10.0.1.77"));
                machine.reconcile(0)?;
                let mut lie = and(told(SHARED)?, other, "local-ipv4s", "10.0.1.77");
                lie.retain(|key, _| !key.starts_with(&path(holder, "")));
                machine.publish(lie);
                let run = machine.eniup("reconcile --automatic --timeout 2s")?;
                let said = format!("eni-0{other} is pending: 10.0.1.77 overlaps what eni-0{holder} has");
                ensure!(run.exit == 3 && run.stderr.contains(&said), "{}: {}", run.exit, run.stderr);
                ensure!(run.stderr.contains("whose link is still here stays"), "{}: {}", run.exit, run.stderr);
                ensure!(holders("10.0.1.77")? == [holder] && leaves_by("10.0.1.77")? == holder, "{}", run.stderr);
                age_notes(machine, PROOF_PAUSE)?;
                let run = machine.eniup("reconcile --automatic")?;
                ensure!(run.exit == 0, "{}: {}", run.exit, run.stderr);
                ensure!(holders("10.0.1.77")? == [other] && leaves_by("10.0.1.77")? == other, "{}", run.stderr);
                Ok(())
            })
            .with_context(|| format!("ENI {holder}"))?;
        }
        Ok(())
    });
}

/// It waits for the one that is to have the address, so it may as well wait for the proof.
#[test]
fn a_run_that_has_the_time_proves_by_itself_that_an_eni_is_gone() {
    inside(|| {
        with_scenario(SHARED, |machine| {
            machine.publish(and(told(SHARED)?, 2, "local-ipv4s", "10.0.1.77"));
            machine.reconcile(0)?;
            let mut moved = and(told(SHARED)?, 3, "local-ipv4s", "10.0.1.77");
            moved.retain(|key, _| !key.starts_with(&path(2, "")));
            machine.publish(moved);
            let begun = Instant::now();
            let run = machine.eniup("reconcile --automatic --timeout 25s")?;
            ensure!(run.exit == 0 && run.stderr.contains("stays: metadata has to"), "{}: {}", run.exit, run.stderr);
            ensure!(
                begun.elapsed() >= Duration::from_millis(PROOF_PAUSE),
                "before that it is no proof: {}",
                run.stderr
            );
            ensure!(holders("10.0.1.77")? == [3] && leaves_by("10.0.1.77")? == 3, "{}", run.stderr);
            Ok(())
        })
    });
}

/// Nobody else is given it, but aggregated rules of a neighbour might take it in.
#[test]
fn what_a_link_has_is_covered_by_no_other_enis_rule() {
    const VERBS: [&str; 2] = ["reconcile --automatic --timeout 2s", "reconcile --timeout 2s"];
    inside(|| {
        for verb in VERBS {
            for key in ["device-number", "interface-id", "subnet-ipv4-cidr-block"] {
                with_scenario(SHARED, |machine| {
                    let before = and(told(SHARED)?, 2, "local-ipv4s", "10.0.1.78");
                    machine.publish(and(before.clone(), 3, "local-ipv4s", "10.0.1.77"));
                    machine.reconcile(0)?;
                    // From before it had that address, and not whole.
                    let mut stale = before;
                    stale.remove(&path(3, key));
                    machine.publish(stale);
                    let run = machine.eniup(verb)?;
                    ensure!(run.exit == 3 && holders("10.0.1.77")? == [3], "{}: {}", run.exit, run.stderr);
                    ensure!(leaves_by("10.0.1.77")? == 3 && leaves_by("10.0.1.78")? == 2, "{}", run.stderr);
                    Ok(())
                })
                .with_context(|| format!("{verb}, {key}"))?;
            }
        }
        Ok(())
    });
}

/// networkd, keepalived or an administrator has put it there; metadata lacks it once.
#[test]
fn an_address_that_somebody_else_has_configured_keeps_its_way_without_proof() {
    inside(|| {
        for (holder, ignored) in [(1, false), (3, false), (3, true)] {
            with_scenario(SHARED, |machine| {
                let address = if holder == 1 { "10.0.0.77" } else { "10.0.1.77" };
                let before = and(told(SHARED)?, 2, "local-ipv4s", "10.0.1.78");
                machine.configure(if ignored { "[[ignore]]\nid = 'eni-03'\n" } else { "" })?;
                ip("link set eth03 up")?;
                ip(&format!("addr add {address}/32 dev eth0{holder}"))?;
                machine.publish(and(before.clone(), holder, "local-ipv4s", address));
                machine.eniup("reconcile")?;
                // Whoever has an ENI of its own has its own rules; here it is enough that eniup has none for it.
                let way = if ignored { 1 } else { holder };
                ensure!(leaves_by(address)? == way, "by {}: {}", leaves_by(address)?, ip("rule show")?);
                machine.publish(before);
                let run = machine.eniup("reconcile --automatic --timeout 2s")?;
                ensure!(run.exit == 0 && holders(address)? == [holder], "{}: {}", run.exit, run.stderr);
                ensure!(leaves_by(address)? == way, "by {}: {}", leaves_by(address)?, run.stderr);
                let neighbour = ip(&format!("route get 10.0.1.9 from {address}"))?;
                ensure!(ignored || neighbour.contains(&format!("dev eth0{holder} ")), "{neighbour}{}", run.stderr);
                Ok(())
            })
            .with_context(|| format!("ENI {holder}, ignored: {ignored}"))?;
        }
        Ok(())
    });
}

/// FACTS of EC2: minutes after a detachment, after a forced one until the instance is stopped.
#[test]
fn an_eni_that_is_listed_still_takes_nothing_from_its_successor() {
    inside(|| {
        for verb in ["reconcile --automatic --timeout 2s", "reconcile --timeout 2s"] {
            with_scenario(SHARED, |machine| {
                // ENI 4, without a link: by the device number of ENI 3 and with an address that has gone to ENI 2.
                let mut leaves = and(told(SHARED)?, 2, "local-ipv4s", "10.0.1.77");
                let of_third: Vec<_> =
                    leaves.range(path(3, "")..).map(|(key, body)| (key.clone(), body.clone())).collect();
                for (key, body) in
                    of_third.iter().filter_map(|(key, body)| Some((key.strip_prefix(&path(3, ""))?, body)))
                {
                    leaves.insert(path(4, key), body.clone());
                }
                for (key, body) in
                    [("mac", "02:00:00:00:00:04"), ("interface-id", "eni-04"), ("local-ipv4s", "10.0.1.50\n10.0.1.77")]
                {
                    leaves.insert(path(4, key), body.into());
                }
                machine.publish(leaves);
                let run = machine.eniup(verb)?;
                let said = "eni-04 is pending: no link here has its MAC, so others go before it";
                ensure!(run.exit == 3 && run.stderr.contains(said), "{}: {}", run.exit, run.stderr);
                ensure!(!run.stderr.contains("eni-02 is") && !run.stderr.contains("eni-03 is"), "{}", run.stderr);
                ensure!(holders("10.0.1.77")? == [2] && leaves_by("10.0.1.77")? == 2, "{}", run.stderr);
                ensure!(holders("10.0.1.22")? == [3] && leaves_by("10.0.1.22")? == 3, "{}", run.stderr);
                let status = machine.eniup("status --timeout 2s")?;
                ensure!(status.stdout.contains("others go before it"), "{}", status.stdout);
                ensure!(machine.eniup("plan --timeout 2s")?.stdout.is_empty(), "something is left to do");
                Ok(())
            })
            .with_context(|| verb)?;
        }
        Ok(())
    });
}

/// The primary has no IPv6, so what unbound sockets send leaves by ENI 2.
#[test]
fn what_unbound_sockets_talk_from_is_not_changed_by_one_read() {
    inside(|| {
        let address = |n: u8| format!("2600:1f16:67f:f201::{n}");
        let told = |of_second: &[u8], of_third: &[u8]| -> Result<Leaves> {
            let mut leaves = told(SHARED)?;
            for (eni, numbers) in [(2, of_second), (3, of_third)] {
                leaves.insert(path(eni, "subnet-ipv6-cidr-blocks"), "2600:1f16:67f:f201::/64".into());
                leaves.insert(path(eni, "ipv6s"), numbers.iter().map(|n| address(*n)).collect::<Vec<_>>().join("\n"));
            }
            Ok(leaves)
        };
        for (of_second, of_third) in [(&[20, 21][..], &[20, 30][..]), (&[21], &[30]), (&[21, 20], &[30])] {
            with_scenario(SHARED, |machine| {
                machine.publish(told(&[20, 21], &[30])?);
                machine.reconcile(0)?;
                let source = || -> Result<bool> {
                    Ok(ip("-6 route get 2001:db8::7")?.contains(&format!("dev eth02 proto 176 src {} ", address(20))))
                };
                ensure!(source()?, "not from the first: {}", ip("-6 route get 2001:db8::7")?);
                machine.publish(told(of_second, of_third)?);
                let run = machine.eniup("reconcile --automatic --timeout 2s")?;
                ensure!(source()?, "{}: {}", ip("-6 route get 2001:db8::7")?, run.stderr);
                machine.publish(told(&[20, 21], &[30])?);
                machine.reconcile(0)?;
                ensure!(source()?, "{}", ip("-6 route get 2001:db8::7")?);
                machine.assert_settled()
            })
            .with_context(|| format!("{of_second:?}, {of_third:?}"))?;
        }
        Ok(())
    });
}

/// A read of before the two were attached the other way round, while the other one cannot be read.
#[test]
fn the_table_of_an_eni_that_cannot_be_read_is_no_others() {
    inside(|| {
        for verb in ["reconcile --automatic --timeout 2s", "reconcile --timeout 2s"] {
            with_scenario(SHARED, |machine| {
                machine.reconcile(0)?;
                let mut stale = told(SHARED)?;
                stale.insert(path(3, "device-number"), "1".into());
                machine.publish(stale);
                fail(machine, &path(2, "local-ipv4s"));
                let before = settled_dump()?;
                let run = machine.eniup(verb)?;
                let said = "eni-03 is pending: it has network card and device number 0/1, and so has eni-02";
                ensure!(run.exit == 3 && run.stderr.contains(said), "{}: {}", run.exit, run.stderr);
                let difference = difference(&before, &settled_dump()?);
                ensure!(difference.is_empty(), "changed:\n{difference}");
                Ok(())
            })
            .with_context(|| verb)?;
        }
        Ok(())
    });
}

/// The primary has no IPv6, so what unbound sockets send leaves by ENI 2. One read gives the primary IPv6, of which nothing is on the
/// machine.
#[test]
fn the_only_default_of_a_family_goes_on_proof_only() {
    inside(|| {
        for has_another in [false, true] {
            with_scenario(SHARED, |machine| {
                let mut leaves = told(SHARED)?;
                leaves.insert(path(2, "ipv6s"), "2600:1f16::20".into());
                leaves.insert(path(2, "subnet-ipv6-cidr-blocks"), "2600:1f16::/64".into());
                machine.publish(leaves.clone());
                machine.reconcile(0)?;
                let has_default = || Ok::<_, anyhow::Error>(ip("-6 route show default")?.contains("dev eth02"));
                ensure!(has_default()?);
                leaves.insert(path(1, "ipv6s"), "2600:1f16:0:1::10".into());
                leaves.insert(path(1, "subnet-ipv6-cidr-blocks"), "2600:1f16:0:1::/64".into());
                machine.publish(leaves);
                if has_another {
                    ip("-6 route add default via fe80::1 dev eth01 metric 1024 proto ra")?;
                } else {
                    let run = machine.eniup("reconcile --automatic")?;
                    ensure!(run.exit == 0 && run.stderr.contains("the default in main by ENI"), "{}", run.stderr);
                    ensure!(has_default()?, "{}", run.stderr);
                    age_notes(machine, PROOF_PAUSE)?;
                }
                let run = machine.eniup("reconcile --automatic")?;
                ensure!(run.exit == 0 && !has_default()?, "{}: {}", run.exit, run.stderr);
                machine.assert_settled()
            })?;
        }
        Ok(())
    });
}

/// Unbound sockets talk by it and from its address.
#[test]
fn who_stands_in_for_the_primary_does_so_when_another_eni_comes() {
    inside(|| {
        with_scenario(SHARED, |machine| {
            let mut leaves = told(SHARED)?;
            let default = || ip("-6 route show default table main");
            for eni in [3, 2] {
                leaves.insert(path(eni, "ipv6s"), format!("2600:1f16::2{eni}"));
                leaves.insert(path(eni, "subnet-ipv6-cidr-blocks"), "2600:1f16::/64".into());
                machine.publish(leaves.clone());
                machine.reconcile(0)?;
                ensure!(default()?.contains("dev eth03 ") && default()?.lines().count() == 1, "{}", default()?);
                machine.assert_settled()?;
            }
            // The other one takes its place when it has none any more.
            leaves.retain(|key, _| !key.starts_with(&path(3, "ipv6s")) && *key != path(3, "subnet-ipv6-cidr-blocks"));
            machine.publish(leaves);
            machine.reconcile(0)?;
            ensure!(default()?.contains("dev eth02 ") && default()?.lines().count() == 1, "{}", default()?);
            machine.assert_settled()
        })
    });
}

/// So nobody has to stand in.
#[test]
fn a_default_that_is_chosen_for_main_is_the_only_one() {
    inside(|| {
        with_scenario(SHARED, |machine| {
            let run = || machine.eniup("reconcile --timeout 2s");
            let mut leaves = told(SHARED)?;
            for eni in BOTH {
                leaves.insert(path(eni, "ipv6s"), format!("2600:1f16::2{eni}"));
                leaves.insert(path(eni, "subnet-ipv6-cidr-blocks"), "2600:1f16::/64".into());
            }
            machine.publish(leaves);
            for (chosen, by) in [("", 2), ("[[eni]]\nid = 'eni-03'\nroutes = [{ to = '::/0', table = 'main' }]\n", 3)] {
                machine.configure(chosen)?;
                let said = run()?;
                let default = ip("-6 route show default table main")?;
                let is_only = default.contains(&format!("dev eth0{by} ")) && default.lines().count() == 1;
                ensure!(said.exit == 0 && is_only, "{chosen}: {}{default}", said.stderr);
            }
            Ok(())
        })
    });
}

/// Management by the primary, which has no default, and all else by another ENI, as configured: that one's default stays while it
/// cannot be read or is left alone, and the primary's answers go by the primary.
#[test]
fn a_default_in_main_that_stays_is_not_the_primarys() {
    inside(|| {
        let chosen = "[[eni]]\nid = 'eni-02'\nroutes = [{ to = '0.0.0.0/0', table = 'main' }]\n";
        for has_third in [false, true] {
            with_scenario(SHARED, |machine| {
                machine.configure(chosen)?;
                let run = |verb: &str| machine.eniup(&format!("{verb} --timeout 300ms"));
                let mut leaves = told(SHARED)?;
                leaves.retain(|key, _| has_third || !key.starts_with(&path(3, "")));
                machine.publish(leaves.clone());
                ip("route del default dev eth01")?;
                run("reconcile")?;
                let is_right = || {
                    let default = ip("route show default table main")?;
                    let is_only = default.contains("dev eth02 ") && default.lines().count() == 1;
                    Ok::<_, anyhow::Error>(is_only && leaves_by("10.0.0.10")? == 1)
                };
                ensure!(is_right()?, "{}{}", ip("route")?, ip("rule")?);
                for lie in [Lie::Unread, Lie::WithoutSubnet, Lie::Unlisted] {
                    let mac = MacAddr::from_bytes(&[2, 0, 0, 0, 0, 2]).context("six bytes")?;
                    lie.tell(machine, mac, &leaves);
                    let said = run("reconcile --automatic")?;
                    ensure!(is_right()?, "{lie:?}: {} {}{}", said.exit, said.stderr, ip("rule")?);
                    // As networkd does when it is restarted.
                    for rule in ip("rule show")?.lines().filter(|rule| rule.contains(" lookup 20000 ")) {
                        ip(&format!("rule del priority {}", rule.split(':').next().context("no priority")?))?;
                    }
                    let said = run("reconcile --automatic")?;
                    ensure!(is_right()?, "{lie:?}, flushed: {} {}{}", said.exit, said.stderr, ip("rule")?);
                    be_well(machine);
                }
                machine.publish(leaves);
                machine.configure(&format!("{chosen}[[ignore]]\nid = 'eni-02'\n"))?;
                for verb in ["reconcile --automatic", "reconcile"] {
                    let said = run(verb)?;
                    ensure!(is_right()?, "ignored, {verb}: {} {}{}", said.exit, said.stderr, ip("rule")?);
                }
                Ok(())
            })?;
        }
        Ok(())
    });
}

/// That is for sockets that are bound to no address; what the primary sends from its own would be dropped by the VPC there.
#[test]
fn what_is_chosen_for_main_takes_nothing_from_the_primary() {
    inside(|| {
        let chosen = "[[eni]]\nid = 'eni-02'\nroutes = [{ to = '10.50.0.0/16', table = 'both' }]\n";
        with_scenario(SHARED, |machine| {
            machine.configure(chosen)?;
            let run = |verb: &str| machine.eniup(&format!("{verb} --timeout 300ms"));
            let said = run("reconcile")?;
            ensure!(said.exit == 0, "{}", said.stderr);
            let left = run("plan")?;
            ensure!(left.stdout.is_empty(), "left to do: {}", left.stdout);
            let is_right = || {
                let by = |from: &str, eni: u8| {
                    Ok::<_, anyhow::Error>(
                        ip(&format!("route get 10.50.0.1 {from}"))?.contains(&format!("dev eth0{eni} ")),
                    )
                };
                Ok::<_, anyhow::Error>(by("", 2)? && by("from 10.0.0.10", 1)? && by("from 10.0.1.22", 3)?)
            };
            ensure!(is_right()?, "{}", ip("rule")?);
            let leaves = told(SHARED)?;
            for lie in [Lie::Unread, Lie::WithoutSubnet, Lie::Unlisted] {
                let mac = MacAddr::from_bytes(&[2, 0, 0, 0, 0, 2]).context("six bytes")?;
                lie.tell(machine, mac, &leaves);
                let said = run("reconcile --automatic")?;
                ensure!(is_right()?, "{lie:?}: {} {}{}", said.exit, said.stderr, ip("rule")?);
                be_well(machine);
            }
            machine.publish(leaves);
            machine.configure(&format!("{chosen}[[ignore]]\nid = 'eni-02'\n"))?;
            for verb in ["reconcile --automatic", "reconcile"] {
                let said = run(verb)?;
                ensure!(is_right()?, "ignored, {verb}: {} {}{}", said.exit, said.stderr, ip("rule")?);
            }
            // With the route its rule goes.
            machine.configure("")?;
            run("reconcile")?;
            ensure!(!ip("rule")?.contains("10.50.0.0/16"), "{}", ip("rule")?);
            machine.assert_settled()
        })
    });
}

/// Without the primary's rules beside it the route would take what the primary sends.
#[test]
fn what_is_chosen_for_main_waits_for_a_primary_that_cannot_be_read() {
    inside(|| {
        let chosen =
            "[[eni]]\nid = 'eni-02'\nmain_routes = 'connected'\nroutes = [{ to = '10.50.0.0/16', table = 'both' }]\n";
        with_scenario(SHARED, |machine| {
            machine.configure(chosen)?;
            let run = |verb: &str| machine.eniup(&format!("{verb} --timeout 300ms"));
            let is_primarys = || {
                let by = |to: &str| {
                    Ok::<_, anyhow::Error>(ip(&format!("route get {to} from 10.0.0.10"))?.contains("dev eth01 "))
                };
                Ok::<_, anyhow::Error>(by("10.50.0.1")? && by("10.0.1.99")?)
            };
            fail(machine, &path(1, "local-ipv4s"));
            let said = run("reconcile")?;
            ensure!(said.exit == 3 && is_primarys()? && leaves_by("10.0.1.20")? == 2, "{}: {}", said.exit, said.stderr);
            be_well(machine);
            let said = run("reconcile")?;
            ensure!(
                said.exit == 0 && is_primarys()? && ip("route get 10.50.0.1")?.contains("dev eth02 "),
                "{}",
                said.stderr
            );
            // What is there stays.
            fail(machine, &path(1, "local-ipv4s"));
            let said = run("reconcile")?;
            ensure!(
                said.exit == 3 && is_primarys()? && ip("route get 10.50.0.1")?.contains("dev eth02 "),
                "{}",
                said.stderr
            );
            Ok(())
        })
    });
}

/// DHCPv6 is quicker than metadata.
#[test]
fn what_is_chosen_for_main_waits_for_the_primarys_family_to_be_told() {
    inside(|| {
        const DUAL: &str = "two-subnets-dual-stack";
        let chosen =
            "[[eni]]\nid = 'eni-02'\nmain_routes = 'connected'\nroutes = [{ to = '2600:9::/32', table = 'main' }]\n";
        with_scenario(DUAL, |machine| {
            machine.configure(chosen)?;
            let run = || machine.eniup("reconcile --timeout 2s");
            let told = told(DUAL)?;
            let own = told[&path(1, "ipv6s")].lines().next().context("no IPv6 address")?.to_string();
            ip(&format!("-6 addr add {own}/128 dev eth01 nodad valid_lft 450 preferred_lft 140"))?;
            ip("-6 route replace default via fe80:ec2::1 dev eth01 metric 512")?;
            let by = |from: &str, eni: u8| {
                Ok::<_, anyhow::Error>(
                    ip(&format!("-6 route get 2600:9::1 {from}"))?.contains(&format!("dev eth0{eni} ")),
                )
            };
            let mut late = told.clone();
            late.retain(|key, _| *key != path(1, "ipv6s"));
            machine.publish(late);
            let said = run()?;
            let is_said = said
                .stderr
                .contains("2600:9::/32 by eth02 comes into main when metadata tells what the primary sends from");
            ensure!(by(&format!("from {own}"), 1)? && is_said, "{}: {}", said.exit, said.stderr);
            machine.publish(told);
            let said = run()?;
            ensure!(said.exit == 0 && by("", 2)? && by(&format!("from {own}"), 1)?, "{}: {}", said.exit, said.stderr);
            Ok(())
        })
    });
}

/// Its subnet means others to everybody else, and what another manager has made of it is followed.
#[test]
fn the_primarys_way_to_an_isolated_enis_subnet_is_the_same_while_that_cannot_be_read() {
    inside(|| {
        with_scenario("ipv4-only-primary-dual-stack-secondary", |machine| {
            machine.configure("[[eni]]\nid = 'eni-02'\nisolate = true\n")?;
            let run = || machine.eniup("reconcile --automatic --timeout 300ms");
            ip("link set eth02 up")?;
            ip("addr add 10.0.1.20/24 dev eth02")?;
            let way = || ip("route get 10.0.1.99 from 10.0.0.10");
            for (fails, exit) in [(false, 0), (true, 3)] {
                if fails {
                    fail(machine, &path(2, "local-ipv4s"));
                }
                let said = run()?;
                ensure!(said.exit == exit && way()?.contains("dev eth02 "), "{}{}: {}", way()?, said.exit, said.stderr);
            }
            Ok(())
        })
    });
}

/// An administrator's gateways in the primary's subnet.
#[test]
fn somebodys_routes_by_the_primary_are_followed_beside_what_is_chosen_for_main() {
    inside(|| {
        let chosen = "[[eni]]\nid = 'eni-02'\nroutes = [{ to = '10.50.0.0/16', table = 'main' }]\n";
        with_scenario(SHARED, |machine| {
            machine.configure(chosen)?;
            let run = |verb: &str| machine.eniup(verb);
            let way = |to: &str| ip(&format!("route get {to} from 10.0.0.10"));
            let is_by = |to: &str, by: &str| Ok::<_, anyhow::Error>(way(to)?.contains(&format!("via {by} ")));
            let settle = || {
                let said = run("reconcile")?;
                let left = run("plan")?;
                ensure!(said.exit == 0 && left.stdout.is_empty(), "{}: {}{}", said.exit, said.stderr, left.stdout);
                Ok(said.stderr)
            };
            // Inside it: the rest goes by the primary's router.
            ip("route add 10.50.7.0/24 via 10.0.0.50 dev eth01")?;
            settle()?;
            ensure!(is_by("10.50.7.1", "10.0.0.50")? && is_by("10.50.0.1", "10.0.0.1")?, "{}", ip("rule")?);
            // Around it: nothing is said for it by eniup.
            ip("route add 10.48.0.0/12 via 10.0.0.50 dev eth01")?;
            let said = settle()?;
            ensure!(said.contains("main has 10.50.0.0/16 by eth02 and 10.48.0.0/12 by the primary's link"), "{said}");
            ensure!(is_by("10.50.7.1", "10.0.0.50")? && way("10.50.0.1")?.contains("dev eth02 "), "{}", ip("rule")?);
            ip("route del 10.48.0.0/12")?;
            // In its place.
            ip("route add 10.50.0.0/16 via 10.0.0.50 dev eth01 metric 5")?;
            settle()?;
            ensure!(is_by("10.50.0.1", "10.0.0.50")? && !ip("rule")?.contains("10.50."), "{}", ip("rule")?);
            Ok(())
        })
    });
}

/// It is the machine's to which the ignored ENI's and the primary's traffic belongs, though all else is released.
#[test]
fn release_leaves_what_keeps_an_ignored_eni_and_the_primary_apart() {
    inside(|| {
        let chosen = "[[eni]]\nid = 'eni-00000002'\nmain_routes = 'connected'\nroutes = [{ to = '10.50.0.0/16', table = 'both' }]\n";
        with_scenario(SHARED, |machine| {
            machine.configure(chosen)?;
            let run = |verb: &str| machine.eniup(verb);
            machine.publish(
                told(SHARED)?.into_iter().map(|(key, body)| (key, body.replace("eni-0", "eni-0000000"))).collect(),
            );
            let said = run("reconcile")?;
            ensure!(ip("route get 10.50.0.1")?.contains("dev eth02 "), "nothing is chosen: {}", said.stderr);
            // By MAC, which the kernel alone tells.
            machine.configure(&format!("{chosen}[[ignore]]\nmac = '02:00:00:00:00:02'\n"))?;
            let is_right = || {
                let by = |way: &str, eni: u8| {
                    Ok::<_, anyhow::Error>(ip(&format!("route get {way}"))?.contains(&format!("dev eth0{eni} ")))
                };
                let of_primary = by("10.50.0.1 from 10.0.0.10", 1)? && by("10.0.1.99 from 10.0.0.10", 1)?;
                Ok::<_, anyhow::Error>(of_primary && by("10.0.0.99 from 10.0.1.20", 2)?)
            };
            for verb in ["reconcile --automatic", "reconcile", "release", "reconcile", "release"] {
                let said = run(verb)?;
                ensure!(said.exit == 0 && is_right()?, "{verb}: {} {}{}", said.exit, said.stderr, ip("rule")?);
            }
            let said = run("release --eni eni-00000002")?;
            ensure!(said.exit == 0 && !ip("rule")?.contains(" lookup 20001"), "{}{}", said.stderr, ip("rule")?);
            let said = run("release")?;
            let left = ip("rule")? + &ip("-6 rule")? + &ip("route show table all")?;
            let grouped = ip("link show group 20000")?;
            ensure!(said.exit == 0 && !left.contains("proto 176") && grouped.is_empty(), "{left}{grouped}");
            Ok(())
        })
    });
}

/// The last resort of IPv6 has a table of its own.
#[test]
fn release_of_one_eni_takes_its_last_resort_too() {
    inside(|| {
        const DUAL: &str = "two-subnets-dual-stack";
        with_scenario(DUAL, |machine| {
            machine.publish(
                told(DUAL)?.into_iter().map(|(key, body)| (key, body.replace("eni-0", "eni-0000000"))).collect(),
            );
            machine.reconcile(0)?;
            let left = || Ok::<_, anyhow::Error>(ip("-6 rule")? + &ip("-6 route show table all")?);
            ensure!(left()?.contains(" lookup 24001 ") && left()?.contains("table 24001"), "{}", left()?);
            let said = machine.eniup("release --eni eni-00000002")?;
            ensure!(said.exit == 0 && !left()?.contains("24001"), "{}: {}", said.exit, left()?);
            Ok(())
        })
    });
}

/// The network manager is quicker than metadata, which does not tell its subnet yet.
#[test]
fn what_another_manager_puts_into_main_for_a_pending_eni_is_not_the_primarys() {
    inside(|| {
        for is_alone in [false, true] {
            with_scenario(SHARED, |machine| {
                let mut leaves = told(SHARED)?;
                leaves.retain(|key, _| !is_alone || !key.starts_with(&path(3, "")));
                let mac = MacAddr::from_bytes(&[2, 0, 0, 0, 0, 2]).context("six bytes")?;
                Lie::Bare.tell(machine, mac, &leaves);
                fail(machine, &path(2, "subnet-ipv4-cidr-block"));
                ip("link set eth02 up")?;
                ip("addr add 10.0.1.20/24 dev eth02")?;
                let way = || ip("route get 10.0.1.99 from 10.0.0.10");
                ensure!(way()?.contains("dev eth02 "), "nothing is wrong: {}", way()?);
                for _ in 0..2 {
                    let said = machine.eniup("reconcile --automatic --timeout 300ms")?;
                    ensure!(
                        said.exit == 3 && way()?.contains("dev eth01 "),
                        "{}{}: {}",
                        way()?,
                        said.exit,
                        said.stderr
                    );
                }
                be_well(machine);
                machine.publish(leaves);
                machine.reconcile(0)?;
                ensure!(way()?.contains("dev eth01 "), "{}", way()?);
                machine.assert_settled()
            })?;
        }
        Ok(())
    });
}

/// It may have gone to the one of which metadata does not tell all.
#[test]
fn nothing_is_taken_away_while_an_eni_may_be_given_it() {
    inside(|| {
        for key in ["ipv6s", "local-ipv4s"] {
            with_scenario(SHARED, |machine| {
                machine.publish(and(told(SHARED)?, 2, "local-ipv4s", "10.0.1.77"));
                machine.reconcile(0)?;
                let moved = and(told(SHARED)?, 3, "local-ipv4s", "10.0.1.77");
                machine.publish(moved);
                fail(machine, &path(3, key));
                let run = machine.eniup("reconcile --timeout 2s")?;
                ensure!(run.exit == 3 && holders("10.0.1.77")? == [2], "{}: {}", run.exit, run.stderr);
                ensure!(leaves_by("10.0.1.77")? == 2, "{}", run.stderr);
                be_well(machine);
                machine.reconcile(0)?;
                ensure!(holders("10.0.1.77")? == [3] && leaves_by("10.0.1.77")? == 3);
                machine.assert_settled()
            })
            .with_context(|| key)?;
        }
        Ok(())
    });
}

/// ENI 2's rule for `10.0.1.64/26` comes before the rules of ENI 3.
#[test]
fn an_address_that_a_rule_of_a_pending_eni_captures_waits_for_that_eni() {
    inside(|| {
        with_scenario(SHARED, |machine| {
            let before = and(told(SHARED)?, 2, "local-ipv4s", "10.0.1.77");
            machine.publish(before.clone());
            machine.reconcile(0)?;
            machine.publish(and(before, 3, "local-ipv4s", "10.0.1.70"));
            fail(machine, &path(2, "local-ipv4s"));
            let run = machine.eniup("reconcile --timeout 2s")?;
            let said = "eni-03 is pending: rules of eni-02, of which metadata does not tell all, go before 10.0.1.70's";
            ensure!(run.exit == 3 && run.stderr.contains(said), "{}: {}", run.exit, run.stderr);
            ensure!(holders("10.0.1.70")?.is_empty(), "{}", run.stderr);
            be_well(machine);
            machine.reconcile(0)?;
            ensure!(holders("10.0.1.70")? == [3] && leaves_by("10.0.1.70")? == 3 && leaves_by("10.0.1.77")? == 2);
            Ok(())
        })
    });
}

/// ENI 2 was detached and attached again while no metadata was to be had, and reads device number 0 still. Its old rules lead nowhere, and
/// come before those of ENI 3, to which one of its addresses has failed over.
#[test]
fn rules_that_lead_nowhere_keep_no_address_from_its_way() {
    inside(|| {
        for verb in ["reconcile --automatic --timeout 2s", "reconcile --timeout 2s"] {
            with_scenario(SHARED, |machine| {
                machine.publish(and(told(SHARED)?, 2, "local-ipv4s", "10.0.1.77"));
                machine.reconcile(0)?;
                ip("link del eth02")?;
                ip("link add eth02 address 02:00:00:00:00:02 type veth peer name far02")?;
                ip("link set far02 up")?;
                let mut later = and(told(SHARED)?, 3, "local-ipv4s", "10.0.1.77");
                later.insert(path(2, "device-number"), "0".into());
                machine.publish(later);
                let run = machine.eniup(verb)?;
                ensure!(run.exit == 3 && run.stderr.contains("eni-02 is pending"), "{}: {}", run.exit, run.stderr);
                ensure!(holders("10.0.1.77")? == [3], "{:?}: {}", holders("10.0.1.77")?, run.stderr);
                ensure!(leaves_by("10.0.1.77")? == 3, "it does not leave by it: {}", run.stderr);
                // The one that is in nobody's way fails closed still.
                ensure!(leaves_by("10.0.1.20").is_err(), "it leaves by another ENI: {}", ip("rule show")?);
                Ok(())
            })
            .with_context(|| verb)?;
        }
        Ok(())
    });
}

#[test]
fn no_address_is_taken_out_of_a_prefix_that_is_lost_without_proof() {
    inside(|| {
        with_scenario(SHARED, |machine| {
            machine.publish(and(told(SHARED)?, 2, "ipv4-prefix", "10.0.1.96/28"));
            machine.reconcile(0)?;
            machine.publish(and(told(SHARED)?, 3, "local-ipv4s", "10.0.1.97"));
            let run = machine.eniup("reconcile --automatic --timeout 2s")?;
            let said = [
                "10.0.1.96/28 of ENI 02:00:00:00:00:02 stays",
                "eni-03 is pending: 10.0.1.97 overlaps what was eni-02's",
            ];
            ensure!(run.exit == 3 && said.iter().all(|said| run.stderr.contains(said)), "{}: {}", run.exit, run.stderr);
            ensure!(holders("10.0.1.97")?.is_empty(), "{}", run.stderr);
            age_notes(machine, PROOF_PAUSE)?;
            let run = machine.eniup("reconcile --automatic")?;
            ensure!(holders("10.0.1.97")? == [3] && leaves_by("10.0.1.97")? == 3, "{}: {}", run.exit, run.stderr);
            Ok(())
        })
    });
}

#[test]
fn a_list_of_keys_that_lacks_one_that_is_there_proves_nothing() {
    inside(|| {
        with_scenario(SHARED, |machine| {
            machine.publish(and(told(SHARED)?, 2, "ipv4-prefix", "10.0.1.96/28"));
            machine.reconcile(0)?;
            let rules = ip("rule show")?;
            for listing in ["", "local-ipv4s/\n", "interface-id\nmac"] {
                let empty = Rule::new("*/02:00:00:00:00:02/", Occurrences::Always, Action::Body(listing.into()));
                machine.service.set_faults(Faults { rules: vec![empty], ..Faults::default() });
                let run = machine.eniup("reconcile --timeout 300ms")?;
                ensure!(run.exit == 3 && run.stderr.contains("that list is not whole"), "{}: {}", run.exit, run.stderr);
                let lacks = |rule: &&str| !ip("rule show").is_ok_and(|rules| rules.contains(*rule));
                // Those of ENI 3 may have become narrower.
                let gone: Vec<&str> = rules.lines().filter(|rule| rule.starts_with("20001")).filter(lacks).collect();
                ensure!(gone.is_empty(), "{gone:?}: {}", run.stderr);
            }
            Ok(())
        })
    });
}

/// Two readings in each of which one ENI's list of keys is not found, so that its IPv6 is not known: the other one seems to be alone in
/// the subnet, each in its turn.
#[test]
fn enis_that_cannot_be_read_in_turn_keep_their_ways() {
    inside(|| {
        let address = |eni: u8| format!("2600:1f16:67f:f201::{eni}");
        for turns in [[2, 3], [3, 2]] {
            with_scenario(SHARED, |machine| {
                let mut leaves = told(SHARED)?;
                for eni in BOTH {
                    leaves.insert(path(eni, "subnet-ipv6-cidr-blocks"), "2600:1f16:67f:f201::/64".into());
                    leaves.insert(path(eni, "ipv6s"), address(eni));
                }
                machine.publish(leaves);
                machine.reconcile(0)?;
                for unread in turns {
                    let rule =
                        Rule::new(&format!("*/{}", &path(unread, "")[8..]), Occurrences::Always, Action::Status(404));
                    machine.service.set_faults(Faults { rules: vec![rule], ..Faults::default() });
                    let run = machine.eniup("reconcile --timeout 300ms")?;
                    ensure!(run.exit == 3 && machine.service.requests().faults > 0, "{}: {}", run.exit, run.stderr);
                    for eni in BOTH {
                        let way = ip(&format!("route get 2001:db8::7 from {}", address(eni)))?;
                        ensure!(
                            way.contains(&format!("dev eth0{eni} ")),
                            "{way}{}\n{}",
                            run.stderr,
                            ip("-6 rule show")?
                        );
                    }
                }
                be_well(machine);
                machine.reconcile(0)?;
                machine.assert_settled()
            })
            .with_context(|| format!("{turns:?}"))?;
        }
        Ok(())
    });
}
