//! The model answers like the kernel, for machines with links, addresses, routes and rules of all kinds.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use eniup::fib::{Answer, Outcome, Packet, Refusal, Way, lookup};
use eniup::net::{HasFamily, Observed};
use netlink_packet_route::route::RouteType;
use proptest::prelude::*;
use proptest::sample::select;

use crate::kernel::{Asker, Found, Heard, Said, connects, ip, observe, on_a_machine};
use crate::support::check;

const LINKS: [&str; 4] = ["eth0", "eth1", "eth2", "dock0"];

const SOURCES: [[&str; 5]; 2] = [
    ["10.0.0.10", "10.0.1.20", "10.0.2.30", "172.17.0.1", "10.0.1.21"],
    ["2001:db8:0::10", "2001:db8:1::20", "2001:db8:2::30", "fd00:17::1", "2001:db8:1::21"],
];

/// Of no link of the machine: only forwarded packets have them.
const STRANGERS: [[&str; 3]; 2] =
    [["10.0.1.96", "172.17.0.5", "198.51.100.7"], ["2001:db8:1::6000", "fd00:17::5", "2600::7"]];

const DESTINATIONS: [[&str; 13]; 2] = [
    [
        "10.0.0.77",
        "10.0.1.77",
        "10.0.2.77",
        "10.0.9.9",
        "172.17.0.5",
        "192.0.2.1",
        "198.51.100.7",
        "203.0.113.9",
        "10.0.1.20",
        "10.0.1.255",
        "255.255.255.255",
        "224.0.0.1",
        "239.1.2.3",
    ],
    [
        "2001:db8:0::77",
        "2001:db8:1::77",
        "2001:db8:2::77",
        "2001:db8:9::9",
        "fd00:17::5",
        "2001:db8:c0::1",
        "2600::7",
        "2a00::9",
        "2001:db8:1::20",
        "2001:db8:2::78",
        "2001:db8:1::78",
        "ff02::1",
        "ff05::2",
    ],
];

const PREFIXES: [[&str; 10]; 2] = [
    [
        "0.0.0.0/0",
        "0.0.0.0/1",
        "128.0.0.0/1",
        "8.0.0.0/7",
        "10.0.0.0/8",
        "10.0.0.0/16",
        "10.0.1.0/24",
        "172.17.0.0/16",
        "192.0.2.0/24",
        "10.0.2.77/32",
    ],
    [
        "::/0",
        "2000::/3",
        "fc00::/7",
        "2600::/7",
        "2001:db8::/32",
        "2001:db8:1::/48",
        "2001:db8:1::/64",
        "fd00:17::/64",
        "2001:db8:c0::/48",
        "2001:db8:2::77/128",
    ],
];

const GATEWAYS: [&str; 2] = ["10.255.0.1", "fe80::fe"];

const KINDS: [&str; 8] = ["", "", "", "", "unreachable", "blackhole", "prohibit", "throw"];

const TABLES: [u32; 4] = [254, 20001, 20002, 100];

#[derive(Clone, Debug)]
struct Route {
    family: usize,
    prefix: &'static str,
    kind: &'static str,
    link: &'static str,
    has_gateway: bool,
    table: u32,
    metric: u32,
}

#[derive(Clone, Debug)]
struct Rule {
    family: usize,
    priority: u32,
    is_inverted: bool,
    from: Option<&'static str>,
    to: Option<&'static str>,
    iif: Option<&'static str>,
    oif: Option<&'static str>,
    mark: Option<&'static str>,
    table: u32,
    suppress_prefix_length: Option<u32>,
    suppress_group: Option<u32>,
    /// How far on it jumps instead of looking up.
    jump: Option<u32>,
}

#[derive(Clone, Debug)]
struct Probe {
    family: usize,
    source: Option<usize>,
    destination: &'static str,
    input: Option<usize>,
    output: Option<usize>,
    mark: u32,
}

#[derive(Clone, Debug)]
struct Machine {
    groups: Vec<u32>,
    routes: Vec<Route>,
    rules: Vec<Rule>,
    probes: Vec<Probe>,
}

fn route() -> impl Strategy<Value = Route> {
    let metrics = [5, 50, 1024];
    (0..2usize, 0..10usize, select(&KINDS[..]), select(&LINKS[..]), any::<bool>(), select(&TABLES[..]), 0..3usize)
        .prop_map(move |(family, prefix, kind, link, has_gateway, table, metric)| Route {
            family,
            prefix: PREFIXES[family][prefix],
            kind,
            link,
            has_gateway,
            table,
            metric: metrics[metric],
        })
}

fn rule() -> impl Strategy<Value = Rule> {
    let links = || prop::option::weighted(0.2, select(&LINKS[..]));
    let selectors = (
        // Not 0.0.0.0/0, which is no selector to the kernel.
        prop::option::weighted(0.4, 1..10usize),
        prop::option::weighted(0.3, 1..10usize),
        prop_oneof![2 => Just(None), 1 => Just(Some("lo")), 1 => select(&LINKS[..]).prop_map(Some)],
        links(),
        prop::option::weighted(0.2, select(&["0x10", "0x10/0xff", "0/0xff", "0x1/0"][..])),
        prop::bool::weighted(0.15),
    );
    let action = (
        // Table 9999 is empty.
        prop_oneof![6 => select(&TABLES[..]), 1 => Just(9999)],
        prop::option::weighted(0.25, select(&[0u32, 7, 16, 24, 64][..])),
        prop::option::weighted(0.25, select(&[7u32, 20000][..])),
        // Mostly there is no rule so far on; 19900 and 24001 are far on from everywhere.
        prop::option::weighted(0.15, prop_oneof![1 => 1..2000u32, 2 => Just(19900), 2 => Just(24001)]),
    );
    // 19900 and 24001 come more than once.
    let priority = prop_oneof![1 => Just(19900u32), 1 => Just(24001), 8 => 10..32000u32];
    (0..2usize, priority, selectors, action).prop_map(
        |(family, priority, (from, to, iif, oif, mark, is_inverted), (table, length, group, jump))| Rule {
            family,
            priority,
            is_inverted,
            from: from.map(|prefix| PREFIXES[family][prefix]),
            to: to.map(|prefix| PREFIXES[family][prefix]),
            iif,
            oif,
            mark,
            table,
            suppress_prefix_length: length,
            suppress_group: group,
            jump: jump
                .map(|jump| if jump < 19900 { priority + jump } else { jump })
                .filter(|target| *target > priority),
        },
    )
}

fn probe() -> impl Strategy<Value = Probe> {
    let links = || prop::option::weighted(0.3, 0..LINKS.len());
    (
        0..2usize,
        prop::option::weighted(0.8, 0..8usize),
        0..13usize,
        links(),
        links(),
        select(&[0u32, 0, 0x10, 0x110][..]),
    )
        .prop_map(|(family, source, destination, input, output, mark)| Probe {
            family,
            source,
            destination: DESTINATIONS[family][destination],
            input,
            output,
            mark,
        })
}

fn machine() -> impl Strategy<Value = Machine> {
    (
        prop::collection::vec(select(&[0u32, 7, 20000][..]), LINKS.len()),
        prop::collection::vec(route(), 10..60),
        prop::collection::vec(rule(), 0..24),
        prop::collection::vec(probe(), 600),
    )
        .prop_map(|(groups, routes, rules, probes)| Machine { groups, routes, rules, probes })
}

impl Machine {
    /// As `ip -batch` takes it. The kernel refuses a second object with the same key, so the first one counts.
    fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (n, (link, group)) in LINKS.iter().zip(&self.groups).enumerate() {
            lines.push(format!("link add {link} type veth peer name peer{n}"));
            lines.push(format!("link set {link} addrgenmode none group {group} up"));
            lines.push(format!("link set peer{n} addrgenmode none up"));
            lines.push(format!("addr add {}/24 dev {link}", SOURCES[0][n]));
            lines.push(format!("addr add {}/64 dev {link} nodad", SOURCES[1][n]));
        }
        lines.push(format!("addr add {}/32 dev eth1", SOURCES[0][4]));
        lines.push(format!("addr add {}/128 dev eth1 nodad noprefixroute preferred_lft 0", SOURCES[1][4]));
        let mut seen = BTreeSet::new();
        lines.extend(self.routes.iter().filter(|route| seen.insert(route.key())).map(Route::line));
        lines.extend(self.rules.iter().filter(|rule| seen.insert(rule.key())).map(Rule::line));
        lines
    }

    fn packets(&self, observed: &Observed) -> Vec<Packet> {
        let index = |n: usize| observed.links.values().find(|link| link.name == LINKS[n]).map(|link| link.index);
        let packet = |probe: &Probe| {
            let input = probe.input.and_then(index);
            let text = probe.source.and_then(|n| match n < 5 {
                true => Some(SOURCES[probe.family][n]),
                // The kernel makes no IPv4 packet with a source that is not its own.
                false => input.map(|_| STRANGERS[probe.family][n - 5]),
            });
            Packet {
                source: text.map(|text| text.parse().unwrap()),
                destination: probe.destination.parse().unwrap(),
                input,
                output: probe.output.filter(|_| input.is_none()).and_then(index),
                mark: probe.mark,
            }
        };
        // Every packet that comes by a link has a source.
        self.probes.iter().map(packet).filter(|packet| packet.input.is_none() || packet.source.is_some()).collect()
    }
}

impl Route {
    /// All routes that refuse are one to IPv6.
    fn key(&self) -> String {
        let Route { family, prefix, kind, table, metric, .. } = self;
        if kind.is_empty() { self.line() } else { format!("{family} {prefix} {table} {metric}") }
    }

    /// `append` takes several with one destination and metric.
    fn line(&self) -> String {
        let Route { family, prefix, kind, link, has_gateway, table, metric } = self;
        let mut line = format!("-{} route append {kind} {prefix} table {table} metric {metric}", [4, 6][*family]);
        if kind.is_empty() {
            line += &format!(" dev {link}");
            if *has_gateway {
                line += &format!(" via {}{}", GATEWAYS[*family], [" onlink", ""][*family]);
            }
        }
        line
    }
}

impl Rule {
    /// The kernel takes a rule without `from`, `to` or `not` for the same as one that has them and is as this one else.
    fn key(&self) -> String {
        Rule { from: None, to: None, is_inverted: false, jump: self.jump.map(|_| 0), ..self.clone() }.line()
    }

    fn line(&self) -> String {
        let mut line = format!("-{} rule add", [4, 6][self.family]);
        if self.is_inverted {
            line += " not";
        }
        line += &format!(" from {} priority {} table {}", self.from.unwrap_or("all"), self.priority, self.table);
        for (word, value) in [("to", self.to), ("iif", self.iif), ("oif", self.oif), ("fwmark", self.mark)] {
            line.extend(value.map(|value| format!(" {word} {value}")));
        }
        if let Some(target) = self.jump {
            return format!("{line} goto {target}");
        }
        line.extend(self.suppress_prefix_length.map(|length| format!(" suppress_prefixlength {length}")));
        line.extend(self.suppress_group.map(|group| format!(" suppress_ifgroup {group}")));
        line
    }
}

/// The kernel answers for what is forwarded as if it were a router that checks nothing itself.
pub fn be_a_router() -> Result<()> {
    let settings = [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv4/conf/all/accept_local", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
    ];
    for (path, value) in settings {
        fs::write(format!("/proc/sys/net/{path}"), value).with_context(|| path.to_string())?;
    }
    Ok(())
}

/// How many answers were compared, and of how many the model said that it does not know.
#[derive(Default, Debug)]
pub struct Count {
    pub compared: usize,
    pub unknown: usize,
}

/// Asks the model and the kernel, which have to agree.
pub fn compare(observed: &Observed, packets: &[Packet], count: &mut Count) -> Result<()> {
    // IPv6 takes an output link as a condition only from a socket, or without a source.
    let (by_socket, by_message): (Vec<Packet>, Vec<Packet>) = packets
        .iter()
        .partition(|packet| packet.output.is_some() && packet.source.is_some() && packet.destination.is_ipv6());
    let heard = Asker::open()?.ask(&by_message)?;
    for (packet, heard) in by_message.iter().zip(heard) {
        let answer = lookup(observed, packet);
        if let Way::Unknown(_) = answer.way {
            count.unknown += 1;
            continue;
        }
        count.compared += 1;
        agrees(packet, &answer, &heard).with_context(|| {
            format!(
                "{packet:?}\nmodel: {:?} by {:?}, {:?}\nkernel: {:?}",
                answer.way, answer.rule, answer.route, heard.way
            )
        })?;
    }
    for packet in &by_socket {
        let answer = lookup(observed, packet);
        let name = &observed.links[&packet.output.context("bound")?].name;
        let is_way = match answer.way {
            Way::Out { link, .. } => {
                ensure!(Some(link) == packet.output, "{packet:?} leaves by another link: {answer:?}");
                true
            }
            Way::Here => true,
            Way::Nowhere(_) => false,
            Way::Unknown(_) => {
                count.unknown += 1;
                continue;
            }
        };
        count.compared += 1;
        ensure!(connects(packet, name)? == is_way, "{packet:?}\nmodel: {answer:#?}");
    }
    Ok(())
}

fn agrees(packet: &Packet, answer: &Answer, heard: &Heard) -> Result<()> {
    match (answer.way, &heard.way) {
        // For many: the kernel tells no entry, or one that it has not gone by.
        (Way::Out { link, gateway }, Said::Route(found))
            if matches!(found.kind, RouteType::Broadcast | RouteType::Multicast) =>
        {
            ensure!((found.link, found.gateway) == (Some(link), gateway), "the kernel's way is another: {found:?}");
        }
        (Way::Here, Said::Route(Found { kind: RouteType::Broadcast, .. })) if packet.input.is_some() => {}
        (Way::Out { link, gateway }, Said::Route(found)) => {
            ensure!(found.kind == RouteType::Unicast, "the kernel's is {:?}", found.kind);
            ensure!((found.link, found.gateway) == (Some(link), gateway), "the kernel's way is another");
            let decided = answer.trace.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Decided(..)));
            match (answer.route, &heard.entry) {
                // Rules of one priority agree on the way by different routes.
                (Some(_), Said::Route(_)) if decided.count() > 1 => {}
                (Some(route), Said::Route(entry)) => {
                    let everything = packet.destination.family().everything();
                    let theirs = (entry.table, entry.destination.unwrap_or(everything), entry.metric);
                    ensure!(
                        (route.table, route.destination, route.metric) == theirs,
                        "the kernel's entry is {entry:?}"
                    );
                }
                // Taken for on-link, without any entry.
                (None, Said::Error(_)) => {}
                (_, entry) => anyhow::bail!("the kernel's entry is {entry:?}"),
            }
        }
        (Way::Here, Said::Route(found)) => {
            ensure!(matches!(found.kind, RouteType::Local | RouteType::Anycast), "the kernel's is {:?}", found.kind);
        }
        (Way::Nowhere(refusal), Said::Error(errno)) => {
            let expected = match refusal {
                Refusal::NoRoute | Refusal::LinkDown => libc::ENETUNREACH,
                Refusal::Unreachable => libc::EHOSTUNREACH,
                Refusal::Prohibited => libc::EACCES,
                Refusal::Blackhole => libc::EINVAL,
            };
            ensure!(*errno == expected, "the kernel's errno is {errno}");
        }
        (_, said) => anyhow::bail!("the kernel says {said:?}"),
    }
    Ok(())
}

#[test]
fn the_model_answers_like_the_kernel() {
    vpc_lab::inside(|| {
        let mut count = Count::default();
        check(48, machine(), |machine| {
            on_a_machine(|| {
                be_a_router()?;
                ip(&machine.lines())?;
                let observed = observe()?;
                compare(&observed, &machine.packets(&observed), &mut count)
            })
        })?;
        eprintln!("{count:?}");
        // A model that never knows would agree with everything.
        ensure!(count.compared > 10_000 && count.unknown < count.compared / 5, "{count:?}");
        Ok(())
    });
}

/// A dump tells one route of many next hops, by eth1 and eth2, and not the one by eth0 that was added between them.
#[test]
fn a_route_that_the_kernel_does_not_tell_is_not_denied() {
    let machine = Machine {
        groups: vec![0; LINKS.len()],
        routes: [("eth1", true), ("eth0", false), ("eth2", true)].map(equal_route).to_vec(),
        rules: Vec::new(),
        probes: Vec::new(),
    };
    vpc_lab::inside(|| {
        on_a_machine(|| {
            ip(&machine.lines())?;
            let observed = observe()?;
            let index = |name: &str| observed.links.values().find(|link| link.name == name).map(|link| link.index);
            let packet = |name: &str| Packet {
                source: None,
                destination: "2001:db8:2::77".parse().unwrap(),
                input: None,
                output: index(name),
                mark: 0,
            };
            let mut count = Count::default();
            compare(&observed, &LINKS.map(packet), &mut count)?;
            ensure!(count.unknown == LINKS.len(), "{count:?}");
            Ok(())
        })
    });
}

fn equal_route((link, has_gateway): (&'static str, bool)) -> Route {
    Route { family: 1, prefix: "2001:db8:2::77/128", kind: "", link, has_gateway, table: 254, metric: 5 }
}
