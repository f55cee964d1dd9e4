//! A machine in the real kernel as a scenario finds it, and what the kernel does there at a moment.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::Result;
use eniup::eni::Attached;
use eniup::net::{Address, Observed};
use eniup::netlink::Netlink;
use eniup::operation::Operation;
use eniup::{ledger, policy};

use super::Scenario;
use super::machine::{self, Kernel, Machine, dump, ip};

/// Far away; its way is the default route.
const FAR: [&str; 2] = ["198.51.100.7", "2001:db8:100::7"];

/// A run that waits for pending ENIs no longer than a busy machine needs to ask for what there is.
pub fn reconcile(attached: &Attached) -> &'static str {
    if attached.is_complete() { "reconcile" } else { "reconcile --timeout 1s" }
}

/// The machine as the scenario finds it, in the real kernel.
pub fn arrange(machine: &mut Machine, scenario: &Scenario) -> Result<()> {
    if let Some(before) = &scenario.before {
        machine.become_attached(&scenario.folder.join("before.json"), before)?;
        machine.eniup(reconcile(before))?;
    }
    machine.become_attached(&scenario.folder.join("metadata.json"), &scenario.attached)?;
    for command in changes(machine, scenario) {
        ip(&command)?;
    }
    match &scenario.configuration() {
        Some(text) => machine.configure(text),
        None => Ok(()),
    }
}

/// How the machine differs from one that EC2 alone has changed, as ip(8) commands.
fn changes(machine: &Machine, scenario: &Scenario) -> Vec<String> {
    let super::Machine {
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
        rules,
        // Of the machine that the test runs on, and not to be written to; the goldens have what becomes of them.
        files: _,
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
        // Before those of the same metric, as the manager's that came first.
        commands
            .extend(nets.iter().map(|net| format!("route prepend {net} dev {} proto kernel metric 100", links[mac])));
    }
    if !bridge.is_empty() {
        // A pair for the bridge, whose timers would differ from run to run.
        let pair = "link add br7 address 02:97:00:00:00:01 type veth peer name br8 address 02:97:00:00:00:02";
        commands.extend([pair.into(), "link set br8 up".into(), "link set br7 up".into()]);
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
    for rule in rules {
        let command = Operation::AddRule { rule: rule.clone() }.to_string();
        commands.push(command.trim_start_matches("ip ").to_string());
    }
    for (mac, name) in rename {
        commands.extend([format!("link set {} down", links[mac]), format!("link set {} name {name}", links[mac])]);
    }
    commands
}

/// A conversation with the kernel of this thread's namespace, in the middle of a synchronous test.
pub fn with_netlink<T>(act: impl AsyncFnOnce(&mut Netlink) -> Result<T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { act(&mut Netlink::open()?).await })
}

pub fn observe() -> Result<Observed> {
    with_netlink(async |netlink| netlink.observe().await)
}

impl Machine {
    /// What a run takes the kernel to have.
    pub fn believed(&self) -> Result<Observed> {
        let mut observed = observe()?;
        if self.kernel == Kernel::Old {
            let forget = |(index, address)| (index, Address { protocol: 0, ..address });
            observed.addresses = observed.addresses.into_iter().map(forget).collect();
        }
        Ok(ledger::load(&self.directory).recall(observed, policy::MARK))
    }
}

/// Which link a packet leaves by that goes from an address of a link (by index) to another address, as the kernel itself
/// tells; none when it goes nowhere.
pub type Ways = BTreeMap<(u32, IpAddr, IpAddr), Option<String>>;

pub fn ways(observed: &Observed) -> Result<Ways> {
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

/// What the kernel has, but for its own routes to IPv6 addresses, which come when it notices the carrier, and for the
/// order in which a link got its names.
pub fn settled_dump() -> Result<Vec<String>> {
    let sorted = |line: String| {
        let mut parts: Vec<&str> = line.split('\\').collect();
        parts[1..].sort_unstable();
        parts.join("\\")
    };
    Ok(dump()?.into_iter().filter(|line| !line.contains("table local proto kernel")).map(sorted).collect())
}
