//! Removal on proof: what metadata lacks once stays in an automatic run, and works, until it lacks it a second time.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use eniup::config::Config;
use eniup::eni::Attached;
use eniup::net::{MacAddr, Observed};
use eniup::policy::{ARRIVAL_DOUBT, PROOF_PAUSE};
use eniup::proof::{Judgement, Notes, Sighting, Taken, judge};
use support::machine::{
    Machine, age_arrivals, age_notes, difference, inside, ip, on_a_machine, read_leaves, scenario, with_scenario,
    with_two_enis,
};
use support::moments::{arrange, observe, settled_dump};
use support::{Scenario, scenarios};
use vpc_lab::metadata::Published;

/// Those in which a machine may have to give something up, and no link is somebody else's.
fn losing() -> Result<Vec<Scenario>> {
    let is_losing = |scenario: &Scenario| {
        let support::Machine { enslave, twice, .. } = &scenario.machine;
        let is_all_ours = enslave.is_empty() && twice.is_empty();
        scenario.before.is_some() && scenario.attached.is_complete() && is_all_ours
    };
    Ok(scenarios()?.into_iter().filter(is_losing).collect())
}

fn addresses_of(observed: &Observed) -> BTreeSet<(u32, IpAddr)> {
    let ours = observed.addresses.iter().filter(|(_, address)| address.protocol == 176);
    ours.map(|(link, address)| (*link, address.net.addr())).collect()
}

type Leaves = BTreeMap<String, String>;

/// Everything follows from which ENI is the primary, and an instance keeps its own for life: neither a timer's run nor one by
/// hand believes another name, with the old device numbers or with numbers that fit it.
#[test]
fn a_snapshot_that_names_another_primary_changes_nothing() {
    inside(|| {
        let scenario = scenario("two-subnets-dual-stack")?;
        let told = read_leaves(&scenario.folder.join("metadata.json"))?;
        let number = |n: u8| format!("network/interfaces/macs/02:00:00:00:00:0{n}/device-number");
        let mut named: Leaves = told.clone();
        named.insert("mac".into(), "02:00:00:00:00:02".into());
        let mut with_numbers = named.clone();
        with_numbers.extend([(number(1), "1".into()), (number(2), "0".into())]);
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let before = settled_dump()?;
            for (lie, why) in [(named, "device number"), (with_numbers, "whose link is still here")] {
                machine.publish(lie);
                for verb in ["reconcile --automatic", "reconcile"] {
                    let run = machine.eniup(verb)?;
                    ensure!(run.exit == 69 && run.stderr.contains(why), "{verb}: {}: {}", run.exit, run.stderr);
                    let difference = difference(&before, &settled_dump()?);
                    ensure!(difference.is_empty(), "{verb} ({why}):\n{difference}");
                }
            }
            machine.publish(told);
            machine.reconcile(0)?;
            machine.assert_settled()
        })
    });
}

/// Each a snapshot that lacks something of a secondary ENI, whole and well-formed as far as it goes.
fn lies(leaves: &Leaves, primary: MacAddr) -> Vec<(String, Leaves)> {
    let is_of = |path: &str, key: &str| path.ends_with(&format!("/{key}")) && !path.contains(&primary.to_string());
    let without = |is_gone: &dyn Fn(&str) -> bool| -> Leaves {
        leaves.iter().filter(|(path, _)| !is_gone(path)).map(|(path, body)| (path.clone(), body.clone())).collect()
    };
    let first_lines = |key: &str| -> Leaves {
        let shortened = |(path, body): (&String, &String)| {
            let body = if is_of(path, key) { body.lines().next().unwrap_or_default() } else { body };
            (path.clone(), body.to_string())
        };
        leaves.iter().map(shortened).collect()
    };
    let mut lies = vec![
        ("secondary addresses".to_string(), first_lines("local-ipv4s")),
        ("secondary IPv6 addresses".to_string(), first_lines("ipv6s")),
        (
            "all IPv6".to_string(),
            without(&|path| ["ipv6s", "ipv6-prefix", "subnet-ipv6-cidr-blocks"].iter().any(|key| is_of(path, key))),
        ),
        ("prefixes".to_string(), without(&|path| is_of(path, "ipv4-prefix") || is_of(path, "ipv6-prefix"))),
    ];
    let macs: BTreeSet<&str> = leaves.keys().filter_map(|path| path.split('/').nth(3)).collect();
    for mac in macs.into_iter().filter(|mac| *mac != primary.to_string()) {
        lies.push((format!("the ENI {mac}"), without(&|path| path.contains(mac))));
    }
    lies.retain(|(_, lie)| lie != leaves);
    lies
}

/// What the lie is about stays with all its rules; the same lie ten seconds later is the truth. False for one that is seen
/// through at once, or is about nothing that the machine has.
fn postpones(scenario: &Scenario, what: &str, lie: &Leaves) -> Result<bool> {
    let attach = |machine: &mut Machine| -> Result<()> {
        machine.become_attached(&scenario.folder.join("metadata.json"), &scenario.attached)?;
        machine.reconcile(0)?;
        Ok(())
    };
    let by_hand = on_a_machine(|machine| {
        attach(machine)?;
        let before = settled_dump()?;
        machine.publish(lie.clone());
        let run = machine.eniup("reconcile --timeout 500ms")?;
        let after = settled_dump()?;
        Ok((run.exit == 0 && after != before).then_some(after))
    })?;
    let Some(by_hand) = by_hand else { return Ok(false) };
    on_a_machine(|machine| {
        attach(machine)?;
        let (whole, before) = (observe()?, settled_dump()?);
        machine.publish(lie.clone());
        let first = machine.eniup("reconcile --automatic")?;
        ensure!(first.exit == 0, "exit {}: {}", first.exit, first.stderr);
        ensure!(first.stderr.contains("stays: metadata has to lack it twice"), "it says nothing: {}", first.stderr);
        ensure!(addresses_of(&observe()?) == addresses_of(&whole), "gone without proof: {}", first.stderr);
        let is_rule = |line: &&String| line.contains(" rule:");
        let rules = |lines: &[String]| lines.iter().filter(is_rule).cloned().collect::<Vec<_>>();
        let changed = difference(&rules(&before), &rules(&settled_dump()?));
        ensure!(changed.is_empty(), "other rules:\n{changed}");
        let again = machine.eniup("reconcile --automatic")?;
        ensure!(again.exit == 0 && again.stderr.is_empty(), "at once again: {}", again.stderr);
        age_notes(machine, PROOF_PAUSE)?;
        let second = machine.eniup("reconcile --automatic")?;
        ensure!(second.exit == 0, "exit {}: {}", second.exit, second.stderr);
        let difference = difference(&by_hand, &settled_dump()?);
        ensure!(difference.is_empty(), "another end than by hand:\n{difference}");
        Ok(true)
    })
    .with_context(|| format!("{}: metadata lacks {what}", scenario.name))
}

#[test]
fn an_automatic_run_keeps_what_metadata_lacks_once_and_ends_as_one_by_hand_when_it_lacks_it_twice() {
    inside(|| {
        let mut told = 0;
        for scenario in scenarios()? {
            let is_plain = scenario.before.is_none() && !scenario.folder.join("machine.json").exists();
            if !is_plain || !scenario.attached.is_complete() {
                continue;
            }
            let leaves = read_leaves(&scenario.folder.join("metadata.json"))?;
            for (what, lie) in lies(&leaves, scenario.attached.primary) {
                told += usize::from(postpones(&scenario, &what, &lie)?);
            }
        }
        ensure!(told > 15, "only {told} lies were told");
        Ok(())
    });
}

/// What metadata says of the second ENI while it is attached and detached: each moment's own leaves, of all that it has in the
/// end, and whether its MAC is listed.
fn moments(leaves: &Leaves, mac: &str) -> [(&'static str, Leaves, bool); 6] {
    let with = |keys: &[&str], other: &[(&str, &str)]| -> Leaves {
        let is_there = |path: &String| {
            !path.contains(mac) || keys.iter().any(|key| *key == "*" || path.ends_with(&format!("/{key}")))
        };
        let mut then: Leaves = leaves.clone();
        then.retain(|path, _| is_there(path));
        let directory = format!("network/interfaces/macs/{mac}");
        then.extend(other.iter().map(|(key, value)| (format!("{directory}/{key}"), value.to_string())));
        then
    };
    let placeholder = with(&["interface-id", "mac"], &[("device-number", "0")]);
    [
        ("not listed", with(&[], &[]), false),
        ("listed without keys", with(&[], &[]), true),
        ("another device number", placeholder, true),
        ("some addresses", with(&["*"], &[("local-ipv4s", "10.0.1.20"), ("ipv6s", "2600:1f16:67f:f201::14")]), true),
        ("all", with(&["*"], &[]), true),
        ("listed without keys, detached", with(&[], &[]), true),
    ]
}

/// Whichever of its moments follows which, as a service may tell it that is read by turns of several.
#[test]
fn no_moment_of_an_attach_takes_away_what_another_gave() {
    inside(|| {
        let scenario = scenario("two-subnets-dual-stack")?;
        let (mac, primary) = ("02:00:00:00:00:02", scenario.attached.primary.to_string());
        let leaves = read_leaves(&scenario.folder.join("metadata.json"))?;
        let moments = moments(&leaves, mac);
        let publish = |machine: &Machine, (_, leaves, is_listed): &(&str, Leaves, bool)| {
            let macs = [Some(primary.as_str()), is_listed.then_some(mac)].into_iter().flatten();
            let listing: Vec<String> = macs.map(|mac| format!("{mac}/")).collect();
            let listings = [("network/interfaces/macs/".to_string(), listing.join("\n"))];
            *machine.tree.lock().unwrap() = Published::raw(leaves.clone(), listings.into());
        };
        let whole = with_two_enis(|machine| {
            machine.reconcile(0)?;
            Ok(addresses_of(&observe()?))
        })?;
        ensure!(whole.len() > 3, "{whole:?}");
        for first in &moments {
            for second in &moments {
                with_two_enis(|machine| {
                    let what = format!("{}, then {}", first.0, second.0);
                    for moment in [first, second] {
                        publish(machine, moment);
                        let before = addresses_of(&observe()?);
                        let run = machine.eniup("reconcile --automatic --timeout 300ms")?;
                        let is_told = ["not listed", "some addresses", "all"].contains(&moment.0);
                        let exit = if is_told { 0 } else { 3 };
                        ensure!(run.exit == exit, "{what}: exit {} at `{}`: {}", run.exit, moment.0, run.stderr);
                        let after = addresses_of(&observe()?);
                        ensure!(before.is_subset(&after), "{what}: gone at `{}`: {}", moment.0, run.stderr);
                        let is_there = is_told && moment.0 != "not listed";
                        ensure!(!is_there || after.len() > 1, "{what}: nothing is there: {}", run.stderr);
                    }
                    publish(machine, &moments[4]);
                    machine.reconcile(0)?;
                    ensure!(addresses_of(&observe()?) == whole, "{what}: not whole in the end");
                    machine.assert_settled().with_context(|| what)
                })?;
            }
        }
        Ok(())
    });
}

/// One read of another time may name other CIDRs of an ENI and no address in those that it has.
#[test]
fn an_address_that_stays_for_want_of_proof_works_though_its_subnet_is_not_told() {
    inside(|| {
        let leaves = read_leaves(&scenario("two-subnets-dual-stack")?.folder.join("metadata.json"))?;
        let of_second = |key: &str| format!("network/interfaces/macs/02:00:00:00:00:02/{key}");
        let ipv4 = [("local-ipv4s", "10.0.7.20"), ("subnet-ipv4-cidr-block", "10.0.7.0/24")];
        let ipv6 = [("ipv6s", "2600:1f16:67f:f207::14"), ("subnet-ipv6-cidr-blocks", "2600:1f16:67f:f207:0:0:0:0/64")];
        for lie in [ipv4, ipv6] {
            with_two_enis(|machine| {
                machine.reconcile(0)?;
                let before = settled_dump()?;
                let mut told = leaves.clone();
                told.extend(lie.map(|(key, value)| (of_second(key), value.to_string())));
                machine.publish(told);
                let run = machine.eniup("reconcile --automatic --timeout 300ms")?;
                let words = "eni-02 is pending: what it has is of another subnet";
                ensure!(run.exit == 3 && run.stderr.contains(words), "exit {}: {}", run.exit, run.stderr);
                let difference = difference(&before, &settled_dump()?);
                ensure!(difference.is_empty(), "{lie:?}:\n{difference}{}", run.stderr);
                age_notes(machine, PROOF_PAUSE)?;
                let run = machine.eniup("reconcile --automatic --timeout 5s")?;
                ensure!(run.exit == 0, "exit {}: {}", run.exit, run.stderr);
                machine.assert_settled()
            })?;
        }
        Ok(())
    });
}

/// The usual layout where a DHCP client configures each link: eniup adds the way only. One read lacks a whole family, or all of it but
/// a delegated prefix.
#[test]
fn what_a_dhcp_client_has_put_on_a_link_keeps_its_way_for_want_of_proof() {
    const TWO: &str = "two-subnets-dual-stack";
    inside(|| {
        let leaves = read_leaves(&scenario(TWO)?.folder.join("metadata.json"))?;
        let key = |n: u8, key: &str| format!("network/interfaces/macs/02:00:00:00:00:0{n}/{key}");
        let gone: [(u8, &[&str], Option<&str>); 5] = [
            (2, &["ipv6s"], None),
            (2, &["ipv6s"], Some("2600:1f16:67f:f201:1::/80")),
            (2, &["ipv6s", "subnet-ipv6-cidr-blocks"], None),
            (2, &["local-ipv4s", "subnet-ipv4-cidr-block"], None),
            (1, &["ipv6s"], None),
        ];
        for (n, keys, prefix) in gone {
            with_two_enis(|machine| {
                let mut told = leaves.clone();
                told.extend(prefix.map(|prefix| (key(2, "ipv6-prefix"), prefix.to_string())));
                for n in [1, 2] {
                    for list in ["local-ipv4s", "ipv6s"] {
                        let first = told.get(&key(n, list)).and_then(|list| list.lines().next()).unwrap_or_default();
                        let is_there = n == 1 && list == "local-ipv4s";
                        if !is_there && !first.is_empty() {
                            let length = if list == "ipv6s" { 128 } else { 24 };
                            ip(&format!("addr add {first}/{length} dev eth0{n} nodad"))?;
                        }
                        told.insert(key(n, list), first.to_string());
                    }
                }
                machine.publish(told.clone());
                machine.reconcile(0)?;
                let before = settled_dump()?;
                told.retain(|there, _| keys.iter().all(|gone| *there != key(n, gone)));
                machine.publish(told);
                let run = machine.eniup("reconcile --automatic --timeout 300ms")?;
                ensure!(run.exit == 0 && run.stderr.contains("stays"), "exit {}: {}", run.exit, run.stderr);
                let difference = difference(&before, &settled_dump()?);
                ensure!(difference.is_empty(), "changed:\n{difference}{}", run.stderr);
                age_notes(machine, PROOF_PAUSE)?;
                let run = machine.eniup("reconcile --automatic --timeout 5s")?;
                ensure!(run.exit == 0, "exit {}: {}", run.exit, run.stderr);
                machine.assert_settled()
            })
            .with_context(|| format!("{keys:?} of {n}"))?;
        }
        Ok(())
    });
}

#[test]
fn a_link_that_is_gone_is_proof_at_once() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let alone = scenario("one-eni-gets-its-secondary-addresses")?;
            machine.become_attached(&alone.folder.join("metadata.json"), &alone.attached)?;
            let run = machine.eniup("reconcile --automatic")?;
            ensure!(run.exit == 0 && !run.stderr.contains("stays"), "exit {}: {}", run.exit, run.stderr);
            ensure!(!ip("rule")?.contains("20001"), "its rules are still there");
            machine.assert_settled()
        })
    });
}

#[test]
fn what_comes_back_or_is_seen_by_hand_has_to_be_lost_twice_anew() {
    inside(|| {
        let scenario = scenario("secondary-address-goes")?;
        on_a_machine(|machine| {
            arrange(machine, &scenario)?;
            let before = scenario.before.as_ref().context("it has an earlier snapshot")?;
            let addresses = addresses_of(&observe()?);
            for meanwhile in ["reconcile --automatic", "reconcile"] {
                machine.eniup("reconcile --automatic")?;
                machine.become_attached(&scenario.folder.join("before.json"), before)?;
                age_notes(machine, PROOF_PAUSE)?;
                let run = machine.eniup(meanwhile)?;
                ensure!(run.exit == 0, "{meanwhile}: {}", run.stderr);
                machine.become_attached(&scenario.folder.join("metadata.json"), &scenario.attached)?;
                machine.eniup("reconcile --automatic")?;
                ensure!(addresses_of(&observe()?) == addresses, "{meanwhile}: gone after it was lost once");
            }
            Ok(())
        })
    });
}

const AT_FIRST: Taken = Taken { begun: 1_000_000, ended: 1_000_300 };

fn taken(after: u64) -> Taken {
    Taken { begun: AT_FIRST.ended + after, ended: AT_FIRST.ended + after + 5 }
}

/// Where it was before nobody needs to know: that ENI may have had no mark of ours, no link, or no place in the list.
#[test]
fn what_has_just_arrived_goes_to_another_eni_on_proof_only() -> Result<()> {
    let scenario = scenario("two-subnets-dual-stack")?;
    let macs: Vec<MacAddr> = scenario.attached.ready.keys().copied().collect();
    // What metadata gives to the first ENI now, and the second has.
    let source = "10.0.0.77/32".parse()?;
    let mut stale = scenario.attached.clone();
    stale.ready.get_mut(&macs[0]).context("no ENI")?.ipv4s.push("10.0.0.77".parse()?);
    let arrivals = [(macs[1], [(source, AT_FIRST.ended)].into())].into();
    let known = Notes { arrivals, ..Notes::default() };
    let mut observed = eniup::plan::fresh_machine(&scenario.attached);
    let link = observed.links.values().find(|link| link.mac == Some(macs[1])).context("no link")?.index;
    let address = eniup::policy::address(&Config::default(), source, false);
    observed.addresses.insert((link, address));
    let config = Config::default();
    let soon = judge(&stale, &stale, &observed, &known, taken(1_000), &config);
    ensure!(soon.postponed.iter().any(|lost| lost.source == Some(source)), "{:?}", soon.postponed);
    ensure!(!soon.attached.ready[&macs[0]].ipv4s.contains(&"10.0.0.77".parse()?), "both have it");
    ensure!(known.recent_arrivals(taken(1_000)) == known.arrivals);
    let later = judge(&stale, &stale, &observed, &known, taken(ARRIVAL_DOUBT), &config);
    ensure!(later.postponed.is_empty(), "{:?}", later.postponed);
    ensure!(known.recent_arrivals(taken(ARRIVAL_DOUBT)).is_empty());
    ensure!(known.clone().until(AT_FIRST.ended) == known);
    let known = known.until(AT_FIRST.ended - 1);
    ensure!(
        judge(&stale, &stale, &observed, &known, taken(1_000), &config).postponed.is_empty(),
        "a note from the future"
    );
    Ok(())
}

fn judged(scenario: &Scenario, attached: &Attached, known: &BTreeSet<Sighting>, taken: Taken) -> Judgement {
    let known = Notes { sightings: known.clone(), ..Notes::default() };
    judge(attached, attached, &scenario.observed(), &known, taken, &Config::default())
}

#[test]
fn two_snapshots_prove_it_when_the_second_began_ten_seconds_after_the_first_ended() -> Result<()> {
    let mut lost = 0;
    for scenario in losing()? {
        let attached = &scenario.attached;
        let first = judged(&scenario, attached, &BTreeSet::new(), AT_FIRST);
        let soon = judged(&scenario, attached, &first.sightings, taken(PROOF_PAUSE - 1));
        let late = judged(&scenario, attached, &first.sightings, taken(PROOF_PAUSE));
        assert_eq!(soon, first, "{}", scenario.name);
        assert_eq!((&late.attached, late.postponed.len()), (attached, 0), "{}", scenario.name);
        assert_eq!(late.sightings, first.sightings, "{}: forgotten before it is gone", scenario.name);
        lost += first.postponed.len();
    }
    assert!(lost > 3, "only {lost} things were lost");
    Ok(())
}

#[test]
fn a_snapshot_that_did_not_tell_all_is_none_of_the_two() -> Result<()> {
    let scenario = scenario("detached-eni-whose-link-is-still-here-goes")?;
    let mut doubtful = scenario.attached.clone();
    doubtful.malformed.push("an entry that is no MAC address".into());
    let first = judged(&scenario, &doubtful, &BTreeSet::new(), AT_FIRST);
    assert!(first.sightings.is_empty() && !first.postponed.is_empty());
    // Between two that did, it neither proves nor disproves.
    let first = judged(&scenario, &scenario.attached, &BTreeSet::new(), AT_FIRST);
    let between = judged(&scenario, &doubtful, &first.sightings, taken(2 * PROOF_PAUSE));
    assert_eq!((&between.sightings, &between.postponed), (&first.sightings, &first.postponed));
    Ok(())
}

#[test]
fn a_note_from_the_future_proves_nothing() -> Result<()> {
    let scenario = scenario("secondary-address-goes")?;
    let first = judged(&scenario, &scenario.attached, &BTreeSet::new(), AT_FIRST);
    let earlier = Taken { begun: 100, ended: 200 };
    let again = judged(&scenario, &scenario.attached, &first.sightings, earlier);
    assert_eq!(again.postponed, first.postponed);
    assert!(again.sightings.iter().all(|sighting| sighting.since == earlier.ended));
    Ok(())
}

/// The new holder cannot have it: until then it works where it is.
#[test]
fn what_metadata_gives_to_an_eni_that_is_not_ready_stays_where_it_is() {
    inside(|| {
        with_two_enis(|machine| {
            let mut told = read_leaves(&scenario("two-subnets-dual-stack")?.folder.join("metadata.json"))?;
            let list = |n: u8| format!("network/interfaces/macs/02:00:00:00:00:0{n}/local-ipv4s");
            let (first, second) = (told[&list(1)].clone(), told[&list(2)].clone());
            told.insert(list(1), format!("{first}\n10.0.0.77"));
            machine.publish(told.clone());
            machine.reconcile(0)?;
            // Outside of its subnet.
            told.extend([(list(1), first), (list(2), format!("{second}\n10.0.0.77"))]);
            machine.publish(told);
            let run = machine.eniup("reconcile --automatic --timeout 300ms")?;
            ensure!(run.exit == 3 && run.stderr.contains("stays"), "{}: {}", run.exit, run.stderr);
            ensure!(ip("addr show eth01")?.contains("10.0.0.77/"), "it is gone: {}", run.stderr);
            Ok(())
        })
    });
}

/// A detached ENI that metadata lists still, with what it had.
#[test]
fn what_metadata_gives_to_an_eni_without_a_link_stays_where_it_is() {
    inside(|| {
        with_two_enis(|machine| {
            let mut told = read_leaves(&scenario("two-subnets-dual-stack")?.folder.join("metadata.json"))?;
            machine.reconcile(0)?;
            let third = |key: &str| format!("network/interfaces/macs/02:00:00:00:00:09/{key}");
            let of_second: Vec<(String, String)> = told
                .iter()
                .filter_map(|(key, body)| {
                    Some((third(key.strip_prefix("network/interfaces/macs/02:00:00:00:00:02/")?), body.clone()))
                })
                .collect();
            told.extend(of_second);
            told.insert(third("device-number"), "7".into());
            told.insert(third("interface-id"), "eni-09".into());
            told.insert(third("local-ipv4s"), "10.0.1.90\n10.0.1.21".into());
            told.remove(&third("ipv6s"));
            told.remove(&third("subnet-ipv6-cidr-blocks"));
            told.insert("network/interfaces/macs/02:00:00:00:00:02/local-ipv4s".into(), "10.0.1.20".into());
            machine.publish(told);
            let run = machine.eniup("reconcile --automatic --timeout 300ms")?;
            ensure!(run.stderr.contains("10.0.1.21") && run.stderr.contains("stays"), "{}: {}", run.exit, run.stderr);
            ensure!(ip("addr show eth02")?.contains("10.0.1.21/"), "it is gone: {}", run.stderr);
            Ok(())
        })
    });
}

/// eniup leaves a port to whoever made the bridge, and cannot put an IPv6 address where the administrator has turned IPv6 off.
#[test]
fn what_metadata_gives_to_an_eni_that_cannot_have_it_stays_where_it_is() {
    const THREE: &str = "three-enis-of-which-two-share";
    inside(|| {
        let list = |n: u8, key: &str| format!("network/interfaces/macs/02:00:00:00:00:0{n}/{key}");
        let with_ipv6 = |holder: u8| -> Result<Leaves> {
            let mut told = read_leaves(&scenario(THREE)?.folder.join("metadata.json"))?;
            for n in [2, 3] {
                let more = if n == holder { "\n2600:1f16::77" } else { "" };
                told.insert(list(n, "ipv6s"), format!("2600:1f16::2{n}{more}"));
                told.insert(list(n, "subnet-ipv6-cidr-blocks"), "2600:1f16::/64".into());
                let more = if n == holder { "\n10.0.1.77" } else { "" };
                told.insert(list(n, "local-ipv4s"), format!("10.0.1.2{n}{more}"));
            }
            Ok(told)
        };
        for (is_port, address) in [(true, "10.0.1.77/"), (false, "2600:1f16::77/")] {
            with_scenario(THREE, |machine| {
                machine.publish(with_ipv6(2)?);
                machine.reconcile(0)?;
                age_arrivals(machine, ARRIVAL_DOUBT)?;
                match is_port {
                    true => _ = (ip("link add br0 type bridge")?, ip("link set eth03 master br0")?),
                    false => fs::write("/proc/sys/net/ipv6/conf/eth03/disable_ipv6", "1")?,
                }
                machine.publish(with_ipv6(3)?);
                let run = machine.eniup("reconcile --automatic --timeout 300ms")?;
                ensure!(run.exit == 3 && run.stderr.contains("eni-03"), "{}: {}", run.exit, run.stderr);
                ensure!(ip("addr show eth02")?.contains(address), "{address} is gone: {}", run.stderr);
                let by_hand = machine.eniup("reconcile --timeout 300ms")?;
                let is_told = by_hand.stderr.contains("IPv6 is turned off on eth03");
                ensure!(is_told != is_port, "{}: {}", by_hand.exit, by_hand.stderr);
                Ok(())
            })?;
        }
        Ok(())
    });
}

/// Nor is anything kept there for want of proof: the kernel has taken away what the link had of IPv6, but for the rules.
#[test]
fn what_a_link_cannot_have_is_not_kept_for_want_of_proof() {
    const PREFIX: &str = "network/interfaces/macs/02:00:00:00:00:02/ipv6-prefix";
    inside(|| {
        with_scenario("delegated-prefixes", |machine| {
            machine.reconcile(0)?;
            fs::write("/proc/sys/net/ipv6/conf/eth02/disable_ipv6", "1")?;
            let mut told = read_leaves(&scenario("delegated-prefixes")?.folder.join("metadata.json"))?;
            told.remove(PREFIX).context("no prefix")?;
            machine.publish(told);
            let run = machine.eniup("reconcile --automatic --timeout 300ms")?;
            ensure!(run.exit == 0 && !run.stderr.contains("stays"), "{}: {}", run.exit, run.stderr);
            ensure!(!ip("-6 rule show")?.contains("lookup 20001"), "{}", ip("-6 rule show")?);
            machine.assert_settled()
        })
    });
}

/// A failover within the instance is done at once, by hand or not. One read that is older than it takes nothing back, while a
/// way back that metadata keeps to is believed after ten seconds, and at once when the failover is long ago.
#[test]
fn what_has_moved_to_another_eni_goes_back_on_proof_only() {
    inside(|| {
        for verb in ["reconcile --automatic", "reconcile"] {
            with_scenario("three-enis-of-which-two-share", |machine| {
                let list = |n: u8, family: &str| format!("network/interfaces/macs/02:00:00:00:00:0{n}/{family}");
                let mut told = read_leaves(&scenario("three-enis-of-which-two-share")?.folder.join("metadata.json"))?;
                for n in [2, 3] {
                    told.insert(list(n, "subnet-ipv6-cidr-blocks"), "2600:1f16:67f:f201::/64".into());
                    told.insert(list(n, "ipv6s"), format!("2600:1f16:67f:f201::{n}"));
                }
                let on = |n: u8| -> Leaves {
                    let mut leaves = told.clone();
                    for (family, address) in [("local-ipv4s", "10.0.1.77"), ("ipv6s", "2600:1f16:67f:f201::77")] {
                        leaves.entry(list(n, family)).and_modify(|list| *list += &format!("\n{address}"));
                    }
                    leaves
                };
                let holders = || -> Result<(bool, bool)> {
                    let has = |link: &str| -> Result<bool> {
                        let shown = ip(&format!("addr show {link}"))?;
                        ensure!(shown.contains("10.0.1.77/") == shown.contains("f201::77/"), "{shown}");
                        Ok(shown.contains("10.0.1.77/"))
                    };
                    Ok((has("eth02")?, has("eth03")?))
                };
                let run = |verb: &str, told: u8, holder: u8| -> Result<()> {
                    machine.publish(on(told));
                    let run = machine.eniup(&format!("{verb} --timeout 2s"))?;
                    let said =
                        format!("eni-0{told} is pending: 10.0.1.77 overlaps what was eni-0{holder}'s a moment ago");
                    ensure!(run.exit == if told == holder { 0 } else { 3 }, "{verb}: {} {}", run.exit, run.stderr);
                    ensure!(run.stderr.contains(&said) == (told != holder), "{verb}: {}", run.stderr);
                    ensure!(holders()? == (holder == 2, holder == 3), "{verb}: {:?}: {}", holders()?, run.stderr);
                    Ok(())
                };
                run(verb, 2, 2)?;
                age_arrivals(machine, ARRIVAL_DOUBT)?;
                run(verb, 3, 3)?;
                // Stale, once and again, and true in between.
                let rules = ip("rule show")?;
                run("reconcile --automatic", 2, 3)?;
                run("reconcile --automatic", 2, 3)?;
                ensure!(ip("rule show")? == rules, "other rules: {}", ip("rule show")?);
                run("reconcile --automatic", 3, 3)?;
                run("reconcile --automatic", 2, 3)?;
                age_notes(machine, PROOF_PAUSE)?;
                run("reconcile --automatic", 2, 2)?;
                run("reconcile --automatic", 3, 2)?;
                run("reconcile --automatic", 2, 2)?;
                age_arrivals(machine, ARRIVAL_DOUBT)?;
                run("reconcile --automatic", 3, 3)?;
                run("reconcile", 2, 2)?;
                // Where the notes are lost nobody can tell what has moved lately.
                let ledger = machine.directory.join("ledger.json");
                for lost in [Some("{"), Some("{\"version\": 0, \"boot\": \"\", \"links\": {}}"), None] {
                    match lost {
                        Some(text) => fs::write(&ledger, text)?,
                        None => fs::remove_file(&ledger)?,
                    }
                    run("reconcile --automatic", 3, 2)?;
                    age_notes(machine, PROOF_PAUSE)?;
                    run("reconcile --automatic", 3, 3)?;
                    run("reconcile", 2, 2)?;
                }
                // There, back and there again: the last time counts.
                run("reconcile", 3, 3)?;
                run("reconcile", 2, 2)?;
                age_arrivals(machine, ARRIVAL_DOUBT * 3 / 4)?;
                run("reconcile", 3, 3)?;
                age_arrivals(machine, ARRIVAL_DOUBT / 3)?;
                run("reconcile --automatic", 2, 3)?;
                // Who can note nothing would doubt for ever.
                fs::remove_file(&ledger)?;
                fs::create_dir_all(ledger.join("in the way"))?;
                run("reconcile --automatic", 2, 2)
            })?;
        }
        Ok(())
    });
}

/// As with an address, though no ENI had it before with a mark of ours: it was on one that is not attached any more, or the
/// container network's.
#[test]
fn a_prefix_and_an_address_that_have_just_come_from_elsewhere_do_not_go_back_at_once() {
    inside(|| {
        with_scenario("three-enis-of-which-two-share", |machine| {
            let told = read_leaves(&scenario("three-enis-of-which-two-share")?.folder.join("metadata.json"))?;
            let on = |n: u8| -> Leaves {
                let mut leaves = told.clone();
                for (key, line) in [("local-ipv4s", "10.0.1.77"), ("ipv4-prefix", "10.0.1.96/28")] {
                    let list = leaves.entry(format!("network/interfaces/macs/02:00:00:00:00:0{n}/{key}")).or_default();
                    *list = format!("{list}\n{line}").trim().into();
                }
                leaves
            };
            let ensure_on = |n: u8, run: &str| -> Result<()> {
                let has = ip(&format!("addr show eth0{n}"))?.contains("10.0.1.77/");
                let is_routed = ip("rule show")?.contains(&format!("from 10.0.1.96/28 lookup 2000{}", n - 1));
                ensure!(has && is_routed, "not on ENI {n}: {run}\n{}", ip("rule show")?);
                Ok(())
            };
            machine.publish(on(3));
            machine.reconcile(0)?;
            machine.publish(on(2));
            let run = machine.eniup("reconcile --automatic --timeout 2s")?;
            ensure_on(3, &run.stderr)?;
            age_arrivals(machine, ARRIVAL_DOUBT)?;
            let run = machine.eniup("reconcile --automatic --timeout 2s")?;
            ensure_on(2, &run.stderr)
        })
    });
}
