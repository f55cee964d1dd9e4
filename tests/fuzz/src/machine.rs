//! Machines on which others were at work, too: links, addresses, routes and rules of any sort that the kernel could have.

use std::collections::BTreeSet;
use std::net::IpAddr;

use arbitrary::Arbitrary;
use eniup::config::Config;
use eniup::desired::desired;
use eniup::eni::Attached;
use eniup::metadata::{Tree, attached};
use eniup::net::{Address, Family, HasFamily, Link, Mark, Observed, Route, RouteKind, Rule};
use eniup::plan::{fresh_machine, plan};
use eniup::policy;
use ipnet::IpNet;

use crate::model::apply;

/// What happened to a machine since it was made, or since eniup ran on it.
#[derive(Arbitrary, Clone, Debug)]
pub struct Machine {
    pub has_run_before: bool,
    no_ipv6: bool,
    changes: Vec<Change>,
}

#[derive(Arbitrary, Clone, Debug)]
enum Change {
    Gone {
        link: u8,
    },
    Link {
        link: u8,
        setting: Setting,
    },
    Twice {
        link: u8,
    },
    Address {
        link: u8,
        place: Place,
        length: u8,
        is_deprecated: bool,
        has_prefix_route: bool,
        owner: u8,
    },
    Route {
        link: Option<u8>,
        to: Place,
        length: u8,
        via: Option<Place>,
        table: u8,
        metric: u8,
        owner: u8,
    },
    Rule {
        priority: u8,
        from: Option<(Place, u8)>,
        to: Option<(Place, u8)>,
        names: [Option<u8>; 2],
        table: u8,
        owner: u8,
        rest: u8,
    },
    /// An object of any sort is taken away, by its number.
    Lost {
        sort: u8,
        number: u8,
    },
}

#[derive(Arbitrary, Clone, Debug)]
enum Setting {
    Name(u8),
    Altname(u8),
    Group(u8),
    Mtu(u8),
    Kind(u8),
    Controller(u8),
    Up(bool),
    Ipv6(Option<bool>),
    AcceptRa(u8),
}

/// An address in one of the subnets that ENIs may have, or somewhere else.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Place {
    is_ipv6: bool,
    subnet: u8,
    host: u8,
}

impl Place {
    fn address(self) -> IpAddr {
        let Place { is_ipv6, subnet, host } = self;
        match (is_ipv6, subnet % 6) {
            (false, 5) => [172, 17, 0, host].into(),
            (false, subnet) => [10, 0, subnet, host].into(),
            (true, 5) => [0xfd00, 0x17, 0, 0, 0, 0, 0, host.into()].into(),
            (true, subnet) => [0x2001, 0xdb8, 0, subnet.into(), 0, 0, 0, host.into()].into(),
        }
    }

    fn net(self, length: u8) -> IpNet {
        let address = self.address();
        let lengths: [u8; 8] =
            if address.is_ipv4() { [32, 24, 28, 16, 8, 1, 0, 25] } else { [128, 64, 80, 56, 7, 3, 0, 127] };
        IpNet::new(address, pick(lengths, length)).expect("each length is legal")
    }
}

fn pick<T: Copy, const N: usize>(of: [T; N], number: u8) -> T {
    of[usize::from(number) % N]
}

fn owner(number: u8) -> u8 {
    pick([policy::MARK, 0, 2, 4, 175, policy::MARK], number)
}

fn table(number: u8) -> u32 {
    pick([254, 20_000, 20_001, 20_002, 20_103, 24_001, 24_002, 20_077, 10_001, 52], number)
}

fn name(number: u8) -> String {
    pick(["eth0", "eth1", "eth2", "eth3", "ens6", "eni-1", "device-number-2", "docker0"], number).into()
}

impl Machine {
    /// The machine on which this was attached at first.
    pub fn observed(&self, before: &Attached, config: &Config) -> Observed {
        let mut observed = fresh_machine(before);
        if self.has_run_before {
            let plan = plan(&desired(before, config), &observed, before.primary, config);
            apply(&mut observed, &plan);
        }
        for change in &self.changes {
            change.make(&mut observed);
        }
        if self.no_ipv6 {
            observed.has_ipv6 = false;
            observed.addresses.retain(|(_, address)| address.net.addr().is_ipv4());
            observed.routes.retain(|(_, route)| route.destination.addr().is_ipv4());
            observed.rules.retain(|rule| rule.family == Family::V4);
            observed.links.values_mut().for_each(|link| link.ipv6 = None);
        }
        // Where IPv6 is turned off on a link, the kernel takes away what the link had of it.
        let is_off = |link: &&Link| !observed.can_have(link, Family::V6);
        let off: BTreeSet<u32> = observed.links.values().filter(is_off).map(|link| link.index).collect();
        observed.addresses.retain(|(index, address)| address.net.addr().is_ipv4() || !off.contains(index));
        let is_by_off = |index: &Option<u32>| index.is_some_and(|index| off.contains(&index));
        observed.routes.retain(|(index, route)| route.destination.addr().is_ipv4() || !is_by_off(index));
        observed
    }
}

/// The machine of a scenario with two ENIs, after a run.
pub fn configured() -> Observed {
    let snapshot = include_str!("../../scenarios/two-subnets-dual-stack/metadata.json");
    let attached = Tree::from_json(snapshot).map(|tree| attached(&tree).expect("it is whole")).expect("it is JSON");
    let mut observed =
        Machine { has_run_before: true, no_ipv6: false, changes: Vec::new() }.observed(&attached, &Config::default());
    // By DHCP.
    let net = "10.0.0.10/24".parse().expect("it is an address");
    observed.addresses.insert((2, Address { net, is_deprecated: false, has_prefix_route: true, is_leased: false, protocol: 0 }));
    observed
}

/// The index of the link of this number.
fn nth(observed: &Observed, number: u8) -> Option<u32> {
    observed.links.keys().copied().cycle().nth(usize::from(number) % observed.links.len().max(1))
}

impl Change {
    fn make(&self, observed: &mut Observed) {
        match self {
            Change::Gone { link } => {
                let Some(index) = nth(observed, *link) else { return };
                observed.links.remove(&index);
                observed.addresses.retain(|(on, _)| *on != index);
                observed.routes.retain(|(on, _)| *on != Some(index));
            }
            Change::Link { link, setting } => {
                if let Some(index) = nth(observed, *link) {
                    setting.make(index, observed);
                }
            }
            Change::Twice { link } => {
                let Some(index) = nth(observed, *link) else { return };
                let other = observed.links.keys().max().map_or(2, |last| last + 1);
                let twin = Link {
                    index: other,
                    name: format!("twin{other}"),
                    altnames: Default::default(),
                    ..observed.links[&index].clone()
                };
                observed.links.insert(other, twin);
            }
            Change::Address { link, place, length, is_deprecated, has_prefix_route, owner: by } => {
                let Some(index) = nth(observed, *link) else { return };
                let (net, protocol) = (place.net(*length), owner(*by));
                let address =
                    Address { net, is_deprecated: *is_deprecated, has_prefix_route: *has_prefix_route, is_leased: false, protocol };
                // One of this address and length is all that the kernel takes.
                if observed.addresses.iter().all(|(on, there)| (*on, there.net) != (index, net)) {
                    observed.addresses.insert((index, address));
                }
            }
            Change::Route { link, to, length, via, table: number, metric, owner: by } => {
                let link = link.and_then(|link| nth(observed, link));
                let destination = to.net(*length).trunc();
                let kind = match link {
                    Some(_) => RouteKind::Unicast,
                    None => pick([RouteKind::Unreachable, RouteKind::Other(1)], *metric),
                };
                let gateway =
                    via.map(Place::address).filter(|via| via.family() == destination.family() && link.is_some());
                let metric = pick(
                    [policy::metric(destination.family()), 100, policy::LAST_METRIC, policy::MAIN_METRIC],
                    *metric,
                );
                let route = Route {
                    destination,
                    kind,
                    gateway,
                    is_onlink: false,
                    table: table(*number),
                    metric,
                    protocol: owner(*by),
                };
                let place = |route: &Route| (route.table, route.destination, route.metric);
                if observed.routes.iter().all(|(_, there)| place(there) != place(&route)) {
                    observed.routes.insert((link, route));
                }
            }
            Change::Rule { priority, from, to, names, table: number, owner: by, rest } => {
                let net = |place: &Option<(Place, u8)>| place.map(|(place, length)| place.net(length).trunc());
                let family = if from.or(*to).is_some_and(|(place, _)| place.is_ipv6) { Family::V6 } else { Family::V4 };
                let of_family = |net: Option<IpNet>| net.filter(|net| net.family() == family);
                let [iif, oif] = names;
                let table = table(*number);
                let rule = Rule {
                    from: of_family(net(from)),
                    to: of_family(net(to)),
                    iif: iif.map(|number| if number % 2 == 0 { "lo".into() } else { name(number) }),
                    oif: oif.map(name),
                    is_inverted: rest % 16 == 1,
                    mark: (rest % 16 == 3).then_some(Mark { value: u32::from(rest / 16 % 2), mask: 1 }),
                    goto: (rest % 16 == 4).then_some(32_765),
                    suppress_prefix_length: (rest % 16 == 5).then_some(u32::from(rest / 16)),
                    has_more: rest % 16 == 2,
                    protocol: owner(*by),
                    ..policy::rule(
                        &Config::default(),
                        family,
                        pick([table, table + 4_000, 19_900, 100, 19_803, 32_765], *priority),
                        table,
                    )
                };
                observed.rules.insert(rule);
            }
            Change::Lost { sort, number } => {
                let number = usize::from(*number);
                match sort % 3 {
                    0 => lose(&mut observed.addresses, number),
                    1 => lose(&mut observed.routes, number),
                    _ => lose(&mut observed.rules, number),
                }
            }
        }
    }
}

fn lose<T: Ord + Clone>(objects: &mut std::collections::BTreeSet<T>, number: usize) {
    if let Some(lost) = objects.iter().nth(number % objects.len().max(1)).cloned() {
        objects.remove(&lost);
    }
}

impl Setting {
    fn make(&self, index: u32, observed: &mut Observed) {
        let is_free =
            |name: &String| observed.links.values().all(|link| link.name != *name && !link.altnames.contains(name));
        let free = |number: u8| Some(name(number)).filter(is_free);
        let (new_name, altname) = match self {
            Setting::Name(number) => (free(*number), None),
            Setting::Altname(number) => (None, free(*number)),
            _ => (None, None),
        };
        let controller = match self {
            Setting::Controller(number) => nth(observed, *number).filter(|controller| *controller != index),
            _ => None,
        };
        let Some(link) = observed.links.get_mut(&index) else { return };
        match self {
            Setting::Name(_) => link.name = new_name.unwrap_or_else(|| link.name.clone()),
            Setting::Altname(_) => link.altnames.extend(altname),
            Setting::Group(number) => link.group = pick([0, 7, policy::LINK_GROUP], *number),
            Setting::Mtu(number) => link.mtu = pick([1_500, 9_001, 1_280, 576, 65_535], *number),
            Setting::Kind(number) => {
                link.kind = pick([None, Some("veth"), Some("macvlan"), Some("bridge")], *number).map(String::from)
            }
            Setting::Controller(_) => link.controller = controller,
            Setting::Up(is_up) => link.is_up = *is_up,
            Setting::Ipv6(is_disabled) => {
                let ipv6 = |is_disabled| eniup::net::LinkIpv6 { accept_ra: 1, is_disabled };
                link.ipv6 = is_disabled.map(ipv6);
            }
            Setting::AcceptRa(number) => {
                if let Some(ipv6) = &mut link.ipv6 {
                    ipv6.accept_ra = i32::from(number % 3);
                }
            }
        }
    }
}
