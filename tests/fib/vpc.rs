//! Generated machines in a VPC: ENIs in four subnets, shared or not, and what else is configured on a machine.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use eniup::eni::{Attached, Eni, Slot};
use eniup::fib::Packet;
use eniup::net::{Family, HasFamily, Link, MacAddr, Observed, Route, RouteKind, Rule};
use eniup::operation::{LinkRef, Operation};
use eniup::plan::fresh_machine;
use eniup::policy;
use ipnet::IpNet;
use proptest::prelude::*;

pub const LOOPBACK: u32 = 1;
pub const BRIDGE: u32 = 50;
pub const TUNNEL: u32 = 51;

/// Which ENIs there are, and what each has, at two times.
#[derive(Clone, Debug)]
pub struct Vpc {
    /// The first is the primary.
    pub enis: Vec<Shape>,
    pub times: [Ownership; 2],
}

#[derive(Clone, Debug)]
pub struct Shape {
    subnet: u8,
    has_ipv4: bool,
    has_ipv6: bool,
}

/// Beside its first address each ENI has what these lists give it; what is taken is not given twice.
#[derive(Clone, Debug)]
pub struct Ownership {
    /// Number of a host in the owner's subnet → the owner.
    hosts: Vec<(u8, usize)>,
    /// Number of a block of 16 hosts that is delegated → the owner.
    blocks: Vec<(u8, usize)>,
}

/// What other managers did to the machine. By default nothing.
#[derive(Clone, Debug, Default)]
pub struct Others {
    /// Of each ENI: its link's group is somebody's.
    is_in_a_group: Vec<bool>,
    /// Of each secondary ENI: `main` has its subnet by its link.
    is_connected: Vec<bool>,
    /// Of each secondary ENI: `main` has a default by it, before or after the primary's.
    has_default: Vec<Option<bool>>,
    /// The ENI by which `main` has the whole VPC.
    vpc_by: Option<usize>,
    /// The ENI by which `main` has a peered network.
    peer_by: Option<usize>,
    has_bridge: bool,
    /// A container network that lies inside the VPC's own range.
    has_bridge_in_vpc: bool,
    has_openvpn: bool,
    has_wireguard: bool,
    /// It was started after eniup, so that its rules come before.
    is_wireguard_before: bool,
    /// Its rule for what is specific in `main` is missing, as with other tunnels of its manner.
    is_wireguard_alone: bool,
    has_tailscale: bool,
    /// Tailscale has everything by the tunnel.
    has_exit_node: bool,
    /// Somebody has said for one destination and for one mark what is to become of it, early on.
    has_early_rules: bool,
    /// Early on, somebody leads all traffic past a rule for one destination.
    has_detour: bool,
    has_unreachable: bool,
    /// A tunnel has a network that the VPC's is a part of.
    has_split_tunnel: bool,
}

fn ownership() -> impl Strategy<Value = Ownership> {
    let hosts = prop::collection::vec((16..250u8, 0..8usize), 0..40);
    let blocks = prop::collection::vec((1..15u8, 0..8usize), 0..6);
    (hosts, blocks).prop_map(|(hosts, blocks)| Ownership { hosts, blocks })
}

pub fn vpc() -> impl Strategy<Value = Vpc> {
    let families = prop_oneof![3 => Just((true, true)), 2 => Just((true, false)), 1 => Just((false, true))];
    let shape = (0..4u8, families).prop_map(|(subnet, (has_ipv4, has_ipv6))| Shape { subnet, has_ipv4, has_ipv6 });
    (prop::collection::vec(shape, 2..6), [ownership(), ownership()]).prop_map(|(enis, times)| Vpc { enis, times })
}

impl Others {
    pub fn without_groups(self) -> Others {
        Others { is_in_a_group: Vec::new(), ..self }
    }
}

pub fn others() -> impl Strategy<Value = Others> {
    let flags = |probability| prop::collection::vec(prop::bool::weighted(probability), 6);
    let defaults = prop::collection::vec(prop::option::weighted(0.3, any::<bool>()), 6);
    let routes = (prop::option::weighted(0.5, 0..6usize), prop::option::weighted(0.3, 0..6usize));
    (flags(0.3), flags(0.5), defaults, routes, any::<[bool; 12]>()).prop_map(
        |(is_in_a_group, is_connected, has_default, (vpc_by, peer_by), flags)| {
            let [
                has_bridge,
                has_bridge_in_vpc,
                has_openvpn,
                has_wireguard,
                is_wireguard_before,
                is_wireguard_alone,
                ..,
            ] = flags;
            let [.., has_tailscale, has_exit_node, has_early_rules, has_detour, has_unreachable, has_split_tunnel] =
                flags;
            Others {
                is_in_a_group,
                is_connected,
                has_default,
                vpc_by,
                peer_by,
                has_bridge,
                has_bridge_in_vpc,
                has_openvpn,
                has_wireguard,
                is_wireguard_before,
                is_wireguard_alone,
                has_tailscale,
                has_exit_node,
                has_early_rules,
                has_detour,
                has_unreachable,
                has_split_tunnel,
            }
        },
    )
}

pub fn mac(n: usize) -> MacAddr {
    format!("02:00:00:00:00:{n:02x}").parse().unwrap()
}

pub fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn host(subnet: u8, family: Family, number: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 0, subnet, number).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, subnet.into(), 0, 0, 0, number.into()).into(),
    }
}

impl Vpc {
    /// ENIs in these subnets with both families and nothing but their first addresses.
    pub fn in_subnets(subnets: &[u8]) -> Vpc {
        let shape = |subnet: &u8| Shape { subnet: *subnet, has_ipv4: true, has_ipv6: true };
        let nothing = Ownership { hosts: Vec::new(), blocks: Vec::new() };
        Vpc { enis: subnets.iter().map(shape).collect(), times: [nothing.clone(), nothing] }
    }

    pub fn attached(&self, time: usize) -> Attached {
        let Ownership { hosts, blocks } = &self.times[time];
        let mut enis: Vec<Eni> = self.enis.iter().enumerate().map(|(n, shape)| shape.eni(n)).collect();
        let mut taken = BTreeSet::new();
        for &(block, owner) in blocks {
            let owner = owner % enis.len();
            let Shape { subnet, has_ipv4, has_ipv6 } = self.enis[owner];
            if !taken.insert((subnet, block)) {
                continue;
            }
            if has_ipv4 {
                enis[owner].ipv4_prefixes.push(format!("10.0.{subnet}.{}/28", u16::from(block) * 16).parse().unwrap());
            }
            if has_ipv6 {
                enis[owner].ipv6_prefixes.push(format!("2001:db8:0:{subnet:x}:{block:x}::/80").parse().unwrap());
            }
        }
        let mut given = BTreeSet::new();
        for &(number, owner) in hosts {
            let owner = owner % enis.len();
            let Shape { subnet, has_ipv4, has_ipv6 } = self.enis[owner];
            if taken.contains(&(subnet, number / 16)) || !given.insert((subnet, number)) {
                continue;
            }
            if let (true, IpAddr::V4(address)) = (has_ipv4, host(subnet, Family::V4, number)) {
                enis[owner].ipv4s.push(address);
            }
            if let (true, IpAddr::V6(address)) = (has_ipv6, host(subnet, Family::V6, number)) {
                enis[owner].ipv6s.push(address);
            }
        }
        Attached {
            primary: mac(0),
            ready: enis.into_iter().enumerate().map(|(n, eni)| (mac(n), eni)).collect(),
            pending: BTreeMap::new(),
            disputes: BTreeMap::new(),
            malformed: Vec::new(),
            ignored: BTreeMap::new(),
            undecided: BTreeSet::new(),
            shared: BTreeMap::new(),
            held: BTreeSet::new(),
            earlier_subnets: BTreeSet::new(),
            is_main_anothers: false,
            still_left_alone: BTreeSet::new(),
            idle: Vec::new(),
            choices: BTreeMap::new(),
        }
    }
}

impl Shape {
    fn eni(&self, n: usize) -> Eni {
        let Shape { subnet, has_ipv4, has_ipv6 } = *self;
        let number = 4 + n as u8;
        let mut eni = Eni {
            id: format!("eni-{n:02}"),
            slot: Slot { network_card: 0, device_number: n as u32 },
            ipv4s: Vec::new(),
            ipv6s: Vec::new(),
            ipv4_subnet: has_ipv4.then(|| format!("10.0.{subnet}.0/24").parse().unwrap()),
            ipv6_subnets: Vec::new(),
            ipv4_prefixes: Vec::new(),
            ipv6_prefixes: Vec::new(),
            unproven: BTreeSet::new(),
            of_others: BTreeSet::new(),
            distributions: None,
            prefers: None,
            stands_in: Default::default(),
        };
        if let (true, IpAddr::V4(address)) = (has_ipv4, host(subnet, Family::V4, number)) {
            eni.ipv4s.push(address);
        }
        if let (true, IpAddr::V6(address)) = (has_ipv6, host(subnet, Family::V6, number)) {
            eni.ipv6s.push(address);
            eni.ipv6_subnets.push(format!("2001:db8:0:{subnet:x}::/64").parse().unwrap());
        }
        eni
    }
}

/// A class of destinations, with the way that other managers' own networks give it before anything of an ENI: by a link
/// that is no ENI's, or nowhere.
#[derive(Clone, Copy, Debug)]
pub struct Destination {
    pub address: IpAddr,
    pub elsewhere: Option<Elsewhere>,
    pub split: Split,
}

/// Whether it is a part of the wider network that a tunnel has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Split {
    Outside,
    /// `main` has a longer route to it, by an ENI.
    Hidden,
    /// It is elsewhere for all but an ENI in whose subnet it is.
    Taken,
}

impl Destination {
    /// Elsewhere for what this ENI sends.
    pub fn elsewhere_for(&self, eni: &Eni) -> Option<Elsewhere> {
        match self.split {
            Split::Taken => (!self.is_in_subnet_of(eni)).then_some(Elsewhere::Link(TUNNEL)),
            Split::Outside | Split::Hidden => self.elsewhere,
        }
    }

    pub fn is_in_subnet_of(&self, eni: &Eni) -> bool {
        eni.all_subnets().iter().any(|subnet| subnet.contains(&self.address))
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Elsewhere {
    Link(u32),
    Unreachable,
}

/// The machine before eniup came, with what others did to it; and destinations of every class.
pub struct Host {
    pub observed: Observed,
    pub destinations: Vec<Destination>,
}

impl Host {
    pub fn new(vpc: &Vpc, others: &Others) -> Host {
        let attached = vpc.attached(0);
        let mut host = Host { observed: fresh_machine(&attached), destinations: Vec::new() };
        // Room for the links that some kernels put into every namespace.
        let links = std::mem::take(&mut host.observed.links).into_values().map(|link| (link.index + 20, link));
        host.observed.links = links.map(|(index, link)| (index, Link { index, ..link })).collect();
        host.software_links();
        host.kernel_rules();
        for family in Family::BOTH {
            host.vpc_destinations(family);
            host.eni_routes(&attached, others, family);
            host.other_routes(others, family);
            if others.has_split_tunnel {
                host.split_tunnel(family);
            }
        }
        for (n, eni_mac) in attached.ready.keys().enumerate() {
            if others.is_in_a_group.get(n) == Some(&true) {
                host.link_mut(*eni_mac).group = 7;
            }
        }
        host
    }

    fn link_mut(&mut self, mac: MacAddr) -> &mut Link {
        self.observed.links.values_mut().find(|link| link.mac == Some(mac)).unwrap()
    }

    fn software_links(&mut self) {
        for (index, name, kind) in
            [(LOOPBACK, "lo", None), (BRIDGE, "docker0", Some("bridge")), (TUNNEL, "tun0", Some("tun"))]
        {
            let link = Link {
                index,
                name: name.into(),
                mac: None,
                kind: kind.map(String::from),
                controller: None,
                is_up: true,
                has_carrier: None,
                mtu: 1500,
                group: 0,
                altnames: BTreeSet::new(),
                drops_secondaries: false,
                ipv6: None,
            };
            self.observed.links.insert(index, link);
        }
    }

    fn rule(&mut self, family: Family, priority: u32, table: u32, with: impl Fn(Rule) -> Rule) {
        let rule =
            Rule { protocol: policy::KERNEL_PROTOCOL, ..policy::rule(&Default::default(), family, priority, table) };
        self.observed.rules.insert(with(rule));
    }

    fn kernel_rules(&mut self) {
        for family in Family::BOTH {
            self.rule(family, 0, 255, |rule| rule);
            self.rule(family, 32_766, policy::MAIN_TABLE, |rule| rule);
        }
        self.rule(Family::V4, 32_767, 253, |rule| rule);
    }

    fn route(&mut self, link: u32, destination: &str, gateway: Option<IpAddr>, table: u32, metric: u32) {
        let route = Route {
            destination: net(destination),
            kind: RouteKind::Unicast,
            gateway,
            is_onlink: gateway.is_some_and(|gateway| gateway.is_ipv4()),
            table,
            metric,
            protocol: 4,
        };
        self.observed.routes.insert((Some(link), route));
    }

    fn destination(&mut self, address: &str, elsewhere: Option<Elsewhere>) {
        self.destinations.push(Destination { address: address.parse().unwrap(), elsewhere, split: Split::Outside });
    }

    fn vpc_destinations(&mut self, family: Family) {
        let (others, subnets): (&[&str], _) = match family {
            // The VPC elsewhere, a peered network, the internet (in each half and each eighth of it).
            Family::V4 => (&["10.0.77.9", "192.168.5.5", "203.0.113.9", "8.8.8.8"], 0..4u8),
            Family::V6 => (&["2001:db8:0:77::9", "2001:db8:aa::5", "2600::9", "fdaa::9"], 0..4u8),
        };
        for address in others {
            self.destination(address, None);
        }
        for subnet in subnets {
            // Never an ENI's address, nor in a delegated block.
            let address = host(subnet, family, 252);
            self.destinations.push(Destination { address, elsewhere: None, split: Split::Outside });
        }
    }

    fn eni_routes(&mut self, attached: &Attached, others: &Others, family: Family) {
        for (n, (mac, eni)) in attached.ready.iter().enumerate().filter(|(_, (_, eni))| eni.has_family(family)) {
            let link = self.link_mut(*mac).index;
            let metric = 100 + n as u32;
            let router = eni.router(family);
            if family == Family::V6 {
                self.route(link, "fe80::/64", None, policy::MAIN_TABLE, 256 + n as u32);
            }
            if n == 0 || others.is_connected.get(n) == Some(&true) {
                let subnet = eni.subnets(family)[0].to_string();
                self.route(link, &subnet, None, policy::MAIN_TABLE, metric);
            }
            let is_before = if n == 0 { Some(false) } else { others.has_default.get(n).copied().flatten() };
            if let Some(is_before) = is_before {
                let metric = if is_before { metric - 50 } else { metric };
                self.route(link, &family.everything().to_string(), router, policy::MAIN_TABLE, metric);
            }
            let (vpc, peer) = if family == Family::V4 {
                ("10.0.0.0/16", "192.168.0.0/16")
            } else {
                ("2001:db8::/48", "2001:db8:aa::/48")
            };
            let is_by = |chosen: Option<usize>| chosen.is_some_and(|chosen| chosen % attached.ready.len() == n);
            if is_by(others.vpc_by) {
                self.route(link, vpc, router, policy::MAIN_TABLE, metric);
            }
            if is_by(others.peer_by) {
                self.route(link, peer, router, policy::MAIN_TABLE, metric);
            }
        }
    }

    fn other_routes(&mut self, others: &Others, family: Family) {
        let is_v4 = family == Family::V4;
        let pick = |v4: &'static str, v6: &'static str| if is_v4 { v4 } else { v6 };
        let main = policy::MAIN_TABLE;
        let by = |flag: bool, link: u32| flag.then_some(Elsewhere::Link(link));
        if others.has_bridge {
            self.route(BRIDGE, pick("172.17.0.0/16", "fd00:17::/64"), None, main, 0);
        }
        self.destination(pick("172.17.0.5", "fd00:17::5"), by(others.has_bridge, BRIDGE));
        if others.has_bridge_in_vpc {
            self.route(BRIDGE, pick("10.0.200.0/24", "2001:db8:0:200::/64"), None, main, 0);
        }
        self.destination(pick("10.0.200.5", "2001:db8:0:200::5"), by(others.has_bridge_in_vpc, BRIDGE));
        if others.has_openvpn {
            let halves: [&str; 2] = if is_v4 { ["0.0.0.0/1", "128.0.0.0/1"] } else { ["2000::/3", "fc00::/7"] };
            for half in halves {
                self.route(TUNNEL, half, None, main, 0);
            }
            self.route(TUNNEL, pick("10.8.0.0/24", "fd00:8::/64"), None, main, 0);
        }
        self.destination(pick("10.8.0.9", "fd00:8::9"), by(others.has_openvpn, TUNNEL));
        if others.has_wireguard {
            // wg-quick: everything that is not the tunnel's own by the tunnel, but for specific routes of main.
            // The kernel gives rules without a priority the one before the first there is.
            let first = if others.is_wireguard_before { policy::GUARD_PRIORITY } else { 32_766 };
            // The guard, and what comes before it, is for all traffic: behind those it finds `main`'s specific routes taken.
            let is_behind = !others.is_wireguard_before || others.has_bridge_in_vpc;
            if !others.is_wireguard_alone || is_behind {
                self.rule(family, first - 2, main, |rule| Rule { suppress_prefix_length: Some(0), ..rule });
            }
            let mark = eniup::net::Mark { value: 51_820, mask: u32::MAX };
            self.rule(family, first - 1, 51_820, |rule| Rule { mark: Some(mark), is_inverted: true, ..rule });
            self.route(TUNNEL, &family.everything().to_string(), None, 51_820, 0);
            self.route(TUNNEL, pick("10.9.0.0/24", "fd00:9::/64"), None, 51_820, 0);
        }
        self.destination(pick("10.9.0.9", "fd00:9::9"), by(others.has_wireguard && others.is_wireguard_before, TUNNEL));
        if others.has_early_rules {
            let to = Some(net(pick("198.51.100.0/24", "2001:db8:c0::/48")));
            self.rule(family, 6000, 100, |rule| Rule { to, ..rule });
            let mark = Some(eniup::net::Mark { value: 51_820, mask: u32::MAX });
            self.rule(family, 6001, 100, |rule| Rule { mark, ..rule });
            self.route(TUNNEL, &family.everything().to_string(), None, 100, 0);
        }
        self.destination(pick("198.51.100.9", "2001:db8:c0::9"), by(others.has_early_rules, TUNNEL));
        if others.has_detour {
            // Table 777 has a route, 778 has none.
            self.route(TUNNEL, pick("198.51.101.0/24", "2001:db8:c1::/48"), None, 777, 0);
            self.rule(family, 50, 778, |rule| rule);
            self.rule(family, 100, 0, |rule| Rule { goto: Some(500), ..rule });
            self.rule(family, 200, 777, |rule| rule);
            let to = Some(net(pick("198.51.102.0/24", "2001:db8:c2::/48")));
            self.rule(family, 500, 777, |rule| Rule { to, ..rule });
        }
        self.destination(pick("198.51.101.9", "2001:db8:c1::9"), None);
        if others.has_tailscale {
            let mark = Some(eniup::net::Mark { value: 0x80000, mask: 0xff0000 });
            self.rule(family, 5210, main, |rule| Rule { mark, ..rule });
            self.rule(family, 5270, 52, |rule| rule);
            self.route(TUNNEL, pick("100.64.0.0/10", "fd7a:115c::/48"), None, 52, 0);
            if others.has_exit_node {
                self.route(TUNNEL, &family.everything().to_string(), None, 52, 0);
            }
        }
        self.destination(pick("100.64.0.9", "fd7a:115c::9"), by(others.has_tailscale, TUNNEL));
        if others.has_unreachable {
            let route = Route {
                destination: net(pick("198.18.0.0/15", "2001:db8:dead::/48")),
                kind: RouteKind::Unreachable,
                gateway: None,
                is_onlink: false,
                table: main,
                metric: 10,
                protocol: 4,
            };
            self.observed.routes.insert((None, route));
        }
        let unreachable = others.has_unreachable.then_some(Elsewhere::Unreachable);
        self.destination(pick("198.18.0.9", "2001:db8:dead::9"), unreachable);
    }
}

impl Host {
    /// After all else that `main` has.
    fn split_tunnel(&mut self, family: Family) {
        let wider = net(if family == Family::V4 { "10.0.0.0/15" } else { "2001:db8::/47" });
        let mains = self.observed.routes.iter().map(|(_, route)| route);
        let mains: Vec<Route> = mains.filter(|route| route.table == policy::MAIN_TABLE).copied().collect();
        for to in self.destinations.iter_mut().filter(|to| to.elsewhere.is_none() && wider.contains(&to.address)) {
            let is_longer = |route: &Route| route.destination.prefix_len() > wider.prefix_len();
            let mut longer = mains.iter().filter(|route| is_longer(route));
            let is_hidden = longer.any(|route| route.destination.contains(&to.address));
            to.split = if is_hidden { Split::Hidden } else { Split::Taken };
        }
        self.route(TUNNEL, &wider.to_string(), None, policy::MAIN_TABLE, 0);
    }

    /// Arguments of ip(8) that make this machine of an empty one. Every link but loopback is a veth.
    pub fn lines(&self, attached: &Attached) -> Vec<String> {
        let mut lines = Vec::new();
        for link in self.observed.links.values().filter(|link| link.index != LOOPBACK) {
            let Link { index, name, mac, group, .. } = link;
            let address = mac.map(|mac| format!("address {mac}")).unwrap_or_default();
            let peer = format!("peer{index}");
            lines.push(format!(
                "link add {name} index {index} {address} type veth peer name {peer} index {}",
                index + 100
            ));
            lines.push(format!("link set {peer} addrgenmode none up"));
            lines.push(format!("link set {name} addrgenmode none group {group} up"));
        }
        let primary = &self.observed.links[&link_of(&self.observed, attached.primary)].name;
        // By DHCP.
        for family in Family::BOTH {
            let first = attached.primary_eni().and_then(|eni| eni.addresses(family).first().copied());
            lines.extend(first.map(|first| match family {
                Family::V4 => format!("addr add {first}/24 dev {primary} noprefixroute"),
                Family::V6 => format!("addr add {first}/128 dev {primary} nodad noprefixroute"),
            }));
        }
        let reference = |index: u32| LinkRef { index, name: self.observed.links[&index].name.clone() };
        let routes = self
            .observed
            .routes
            .iter()
            .map(|(link, route)| Operation::AddRoute { link: link.map(reference), route: *route }.to_string());
        // The kernel has its own rules already.
        let is_there = |rule: &&Rule| ![0, 32_766, 32_767].contains(&rule.priority);
        let rules = self.observed.rules.iter().filter(is_there);
        let rules = rules.map(|rule| Operation::AddRule { rule: rule.clone() }.to_string());
        lines.extend(routes.chain(rules).map(|line| line.trim_start_matches("ip ").to_string()));
        lines
    }
}

/// A packet made on the machine, unmarked and not bound to a link.
pub fn local(source: Option<IpAddr>, destination: IpAddr) -> Packet {
    Packet { source, destination, input: None, output: None, mark: 0 }
}

/// The index of an ENI's link.
pub fn link_of(observed: &Observed, mac: MacAddr) -> u32 {
    observed.links.values().find(|link| link.mac == Some(mac)).unwrap().index
}

/// An ENI's addresses, and some of each delegated prefix.
pub fn sources(eni: &Eni, family: Family) -> Vec<(IpAddr, bool)> {
    let addresses = eni.addresses(family).into_iter().map(|address| (address, false));
    let delegated = eni.prefixes(family).into_iter().flat_map(|prefix| {
        let last = if prefix.family() == Family::V4 { prefix.broadcast() } else { prefix.network() };
        [(prefix.network(), true), (last, true)]
    });
    addresses.chain(delegated).collect()
}
