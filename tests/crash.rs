//! A run that is killed between any two of its operations. A kill from outside lands between batches only, so here the
//! plan's first k operations are carried out by eniup's own netlink code, for every k of every scenario: exactly what the
//! kernel has when a run dies after its k-th operation, with the ledger as it is at that moment.

mod support;

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use eniup::config::Config;
use eniup::ledger;
use eniup::net::Observed;
use eniup::netlink::Netlink;
use eniup::netlink::apply::Outcome;
use eniup::operation::Operation;
use eniup::plan::Step;
use eniup::release::release;
use support::machine::{self, Machine, difference, dump, inside, ip, on_a_machine};
use support::{Scenario, plan_for, scenarios};

/// Far away; its way is the default route.
const FAR: [&str; 2] = ["198.51.100.7", "2001:db8:100::7"];

/// The machine as the scenario finds it, in the real kernel.
fn arrange(machine: &mut Machine, scenario: &Scenario) -> Result<()> {
    if let Some(before) = &scenario.before {
        machine.become_attached(&scenario.folder.join("before.json"), before)?;
        machine.eniup("reconcile --timeout 200ms")?;
    }
    machine.become_attached(&scenario.folder.join("metadata.json"), &scenario.attached)?;
    for command in changes(machine, scenario) {
        ip(&command)?;
    }
    Ok(())
}

/// How the machine differs from one that EC2 alone has changed, as ip(8) commands.
fn changes(machine: &Machine, scenario: &Scenario) -> Vec<String> {
    let support::Machine {
        no_link_for,
        gone,
        rename,
        bounce,
        enslave,
        twice,
        macvlan,
        foreign_address,
        no_ipv6,
        group,
        mtu,
        main,
        bridge,
    } = &scenario.machine;
    let links = &machine.links;
    let present = |mac| links.get(mac).into_iter();
    let mut commands = Vec::new();
    for link in no_link_for.iter().chain(gone).flat_map(present) {
        commands.push(format!("link del {link}"));
    }
    for (mac, mtu) in mtu {
        commands.push(format!("link set {} mtu {mtu}", links[mac]));
    }
    for (mac, group) in group {
        commands.push(format!("link set {} group {group}", links[mac]));
    }
    for (mac, nets) in foreign_address {
        // Whoever gives a link addresses has brought it up.
        commands.push(format!("link set {} up", links[mac]));
        commands.extend(nets.iter().map(|net| format!("addr add {net} dev {}", links[mac])));
    }
    for (mac, nets) in main {
        commands.push(format!("link set {} up", links[mac]));
        commands.extend(nets.iter().map(|net| format!("route add {net} dev {} proto kernel metric 100", links[mac])));
    }
    if !bridge.is_empty() {
        commands.extend(["link add br7 type bridge".into(), "link set br7 up".into()]);
        commands.extend(bridge.iter().map(|net| format!("route add {net} dev br7 proto kernel metric 100")));
    }
    for link in bounce.iter().flat_map(present) {
        commands.extend([format!("link set {link} down"), format!("link set {link} up")]);
    }
    for link in no_ipv6.iter().flat_map(present) {
        commands.push(format!("link set {link} addrgenmode none"));
    }
    for link in enslave.iter().flat_map(present) {
        commands.extend(["link add br0 type bridge".into(), format!("link set {link} master br0")]);
    }
    for mac in twice {
        commands.push(format!("link add other0 address {mac} type veth peer name other1 address 02:98:00:00:00:01"));
    }
    for mac in macvlan {
        commands.push(format!("link add link {} name other0 address {mac} type macvlan", links[mac]));
    }
    for (mac, name) in rename {
        commands.extend([format!("link set {} down", links[mac]), format!("link set {} name {name}", links[mac])]);
    }
    commands
}

/// A conversation with the kernel of this thread's namespace, in the middle of a synchronous test.
fn with_netlink<T>(act: impl AsyncFnOnce(&mut Netlink) -> Result<T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { act(&mut Netlink::open()?).await })
}

fn observe() -> Result<Observed> {
    with_netlink(async |netlink| netlink.observe().await)
}

/// The plan that a run would carry out first, noted in the ledger as that run notes it before its first operation.
fn begin(machine: &Machine, scenario: &Scenario) -> Result<Vec<Step>> {
    let observed = observe()?;
    let steps = plan_for(&scenario.attached, &observed).steps;
    std::fs::create_dir_all(&machine.directory)?;
    ledger::save(&ledger::load(&machine.directory).noting(&steps, &observed), &machine.directory)?;
    Ok(steps)
}

/// Each of these operations has to work: the machine is as it was when they were planned. (The kernel takes away a link's
/// routes itself when its last IPv4 address goes.)
fn carry_out(steps: &[Step]) -> Result<()> {
    let outcomes = with_netlink(async |netlink| netlink.apply(steps).await)?;
    for (step, outcome) in steps.iter().zip(outcomes) {
        let is_right = match outcome {
            Outcome::Done => true,
            Outcome::AlreadySo => matches!(step.operation, Operation::DeleteRoute { .. }),
            Outcome::Skipped | Outcome::Failed(_) => false,
        };
        ensure!(is_right, "{step}: {outcome:?}");
    }
    Ok(())
}

/// Which link a packet leaves by that goes from an address of a link (by index) to another address, as the kernel itself
/// tells; none when it goes nowhere.
type Ways = BTreeMap<(u32, IpAddr, IpAddr), Option<String>>;

fn ways(observed: &Observed) -> Result<Ways> {
    let mut ways = Ways::new();
    let sources: Vec<(u32, IpAddr)> =
        observed.addresses.iter().map(|(link, address)| (*link, address.net.addr())).filter(is_routable).collect();
    for (link, from) in &sources {
        let neighbours = sources.iter().filter_map(|(_, other)| neighbour(*other));
        let far = FAR.iter().filter_map(|far| far.parse().ok());
        for to in far.chain(neighbours).filter(|to: &IpAddr| to.is_ipv4() == from.is_ipv4()) {
            ways.insert((*link, *from, to), way(*from, to)?);
        }
    }
    Ok(ways)
}

/// An address in the same /24 that nobody in a scenario has: a client in that subnet.
fn neighbour(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, _] = address.octets();
            Some([a, b, c, 201].into())
        }
        IpAddr::V6(_) => None,
    }
}

fn is_routable((_, address): &(u32, IpAddr)) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_loopback(),
        IpAddr::V6(address) => !address.is_loopback() && !address.is_unicast_link_local(),
    }
}

fn way(from: IpAddr, to: IpAddr) -> Result<Option<String>> {
    let route =
        machine::run(machine::command("ip").args(["route", "get", &to.to_string(), "from", &from.to_string()]))?;
    let mut words = route.stdout.split_whitespace().skip_while(|word| *word != "dev");
    Ok(words.nth(1).map(String::from))
}

/// Addresses that were there and are wanted further lose nothing on the way: at each moment the kernel sends what they
/// say where it went before or where it goes in the end.
#[test]
fn at_no_moment_of_a_run_does_an_address_that_stays_lose_its_way() {
    inside(|| {
        for scenario in scenarios()? {
            on_a_machine(|machine| {
                arrange(machine, &scenario)?;
                let steps = begin(machine, &scenario)?;
                let mut moments = vec![ways(&observe()?)?];
                for step in &steps {
                    carry_out(std::slice::from_ref(step))?;
                    moments.push(ways(&observe()?)?);
                }
                let (first, last) = (&moments[0], &moments[steps.len()]);
                for (pair, before) in first {
                    let Some(after) = last.get(pair) else { continue };
                    for (moment, done) in moments.iter().zip(0..) {
                        let way =
                            moment.get(pair).with_context(|| format!("{pair:?} is gone after {done} operations"))?;
                        ensure!(
                            way == before || way == after,
                            "{}: {pair:?} goes by {way:?} after {done} operations, by {before:?} before and {after:?} in \
                             the end",
                            scenario.name
                        );
                    }
                }
                Ok(())
            })
            .with_context(|| scenario.name.clone())?;
        }
        Ok(())
    });
}

/// What the kernel has, but for its own routes to IPv6 addresses, which come when it notices the carrier, and for the
/// order in which a link got its names.
fn settled_dump() -> Result<Vec<String>> {
    let sorted = |line: String| {
        let mut parts: Vec<&str> = line.split('\\').collect();
        parts[1..].sort_unstable();
        parts.join("\\")
    };
    Ok(dump()?.into_iter().filter(|line| !line.contains("table local proto kernel")).map(sorted).collect())
}

/// The same end as without a kill, and so no orphan, whichever operation was the last.
fn converges_from_every_crash_point(is_meant: impl Fn(usize) -> bool + Sync) {
    inside(|| {
        let scenarios = scenarios()?;
        let mut points = 0;
        for (_, scenario) in scenarios.iter().enumerate().filter(|(n, _)| is_meant(*n)) {
            let whole = on_a_machine(|machine| {
                arrange(machine, scenario)?;
                machine.eniup("reconcile --timeout 200ms")?;
                settled_dump()
            })?;
            let mut k = 0;
            while on_a_machine(|machine| {
                arrange(machine, scenario)?;
                let steps = begin(machine, scenario)?;
                carry_out(&steps[..k])?;
                let run = machine.eniup("reconcile --timeout 200ms")?;
                ensure!([0, 3].contains(&run.exit), "exit {}: {}", run.exit, run.stderr);
                let plan = machine.eniup("plan --timeout 200ms")?;
                ensure!(plan.stdout.is_empty(), "left to do:\n{}", plan.stdout);
                let difference = difference(&whole, &settled_dump()?);
                ensure!(difference.is_empty(), "another end than without a kill:\n{difference}");
                Ok(k < steps.len())
            })
            .with_context(|| format!("{}, killed after operation {k}", scenario.name))?
            {
                k += 1;
            }
            points += k + 1;
        }
        eprintln!("killed after {points} operations");
        ensure!(points > 250, "only {points} crash points");
        Ok(())
    });
}

// Two halves, so that they run side by side.
#[test]
fn killed_after_any_operation_of_the_first_half_the_next_run_converges() {
    converges_from_every_crash_point(|n| n % 2 == 0);
}

#[test]
fn killed_after_any_operation_of_the_second_half_the_next_run_converges() {
    converges_from_every_crash_point(|n| n % 2 == 1);
}

/// Scenarios in which a fresh machine is configured whole.
const WHOLE: [&str; 2] = ["two-subnets-dual-stack", "three-enis-of-which-two-share"];

/// The ledger is written before the first operation, so it knows whatever was done.
#[test]
fn release_after_a_kill_leaves_the_machine_as_it_was_found() {
    inside(|| {
        for name in WHOLE {
            let scenario = machine::scenario(name)?;
            let mut k = 0;
            while on_a_machine(|machine| {
                arrange(machine, &scenario)?;
                let found = settled_dump()?;
                let steps = begin(machine, &scenario)?;
                carry_out(&steps[..k])?;
                let release = machine.eniup("release")?;
                ensure!(release.exit == 0, "release: {}", release.stderr);
                let difference = difference(&found, &settled_dump()?);
                ensure!(difference.is_empty(), "{name}, killed after operation {k}:\n{difference}");
                Ok(k < steps.len())
            })? {
                k += 1;
            }
            ensure!(k > 15, "{name} has only {k} operations");
        }
        Ok(())
    });
}

#[test]
fn a_killed_release_is_finished_by_the_next_and_undone_by_a_reconcile() {
    inside(|| {
        for name in WHOLE {
            let scenario = machine::scenario(name)?;
            on_a_machine(|machine| {
                arrange(machine, &scenario)?;
                let found = settled_dump()?;
                machine.reconcile(0)?;
                let whole = settled_dump()?;
                let mut k = 0;
                loop {
                    let steps = release(&observe()?, &ledger::load(&machine.directory), &Config::default()).steps;
                    carry_out(&steps[..k])?;
                    // In turn, so that each leaves the next a machine as it should be.
                    let (arguments, wanted) = if k % 2 == 0 { ("reconcile", &whole) } else { ("release", &found) };
                    let run = machine.eniup(arguments)?;
                    ensure!(run.exit == 0, "{arguments}: {}", run.stderr);
                    let difference = difference(wanted, &settled_dump()?);
                    ensure!(
                        difference.is_empty(),
                        "{name}, {arguments} after {k} operations of release:\n{difference}"
                    );
                    machine.reconcile(0)?;
                    if k == steps.len() {
                        return Ok(());
                    }
                    k += 1;
                }
            })?;
        }
        Ok(())
    });
}
