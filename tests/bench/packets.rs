//! What a packet's way costs: the kernel's look-up alone (`RTM_GETROUTE`), and a datagram from an unconnected socket, which
//! looks its way up each time.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use eniup::net::Route;
use eniup::netlink::Netlink;
use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use vpc_lab::cost::{Cost, Spread};

use super::instance::{Instance, batch};
use super::lab::{block_on, ip};
use super::machine::Size;
use super::netlink::{socket, thread_time};
use super::tables::Section;
use super::{eniup, in_turn, times};

/// Packets that are timed at once.
const PACKETS: u32 = 5000;

/// Times in a row, of which the least counts: what the work itself costs.
const REPEATED: usize = 5;

const FAR_AWAY: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

type Configure = fn(&Instance) -> Result<()>;

pub fn measure(rounds: usize) -> Result<Section> {
    let size = Size::ipv4(15, 50);
    let header = [
        "source",
        "rules",
        "number of rules",
        "look-up us",
        "median",
        "look-up, times one an ENI",
        "datagram us",
        "datagram, median",
        "datagram, times one an ENI",
    ];
    let mut section = Section::new("packets", &header);
    let instance = Instance::new(size)?;
    let last = size.enis - 1;
    let sources = [
        ("the primary's", Ipv4Addr::new(10, 0, 0, 10)),
        ("the first ENI's", Ipv4Addr::new(10, 0, 1, 10)),
        ("the last ENI's last", Ipv4Addr::new(10, 0, last, 9 + size.addresses)),
    ];
    let kinds: [(&str, Configure); 3] =
        [("one an ENI", one_for_each_eni), ("eniup", few), ("one an address", one_for_each_address)];
    let mut costs = vec![vec![Vec::new(); kinds.len()]; sources.len()];
    let mut counts = [0; 3];
    for round in 0..rounds {
        eprintln!("packets, {size}, round {round}");
        for kind in in_turn(kinds.len(), round) {
            instance.forget()?;
            kinds[kind].1(&instance)?;
            know_gateways(size)?;
            counts[kind] = rules()?;
            for (costs, (_, address)) in costs.iter_mut().zip(sources) {
                costs[kind].push(Costs::measure(address)?);
            }
        }
    }
    for (costs, (source, _)) in costs.iter().zip(sources) {
        let [look_up, datagram]: [fn(&Costs) -> Duration; 2] = [|costs| costs.look_up, |costs| costs.datagram];
        let spread = |kind: usize, of| Spread::of(costs[kind].iter().map(of));
        let each = |cost: Duration| format!("{:.2}", cost.as_secs_f64() * 1e6 / f64::from(PACKETS));
        for (kind, (rules, _)) in kinds.iter().enumerate() {
            section.push([
                source.to_string(),
                rules.to_string(),
                counts[kind].to_string(),
                each(spread(kind, look_up).least),
                each(spread(kind, look_up).median),
                times(spread(kind, look_up).least, spread(0, look_up).least),
                each(spread(kind, datagram).least),
                each(spread(kind, datagram).median),
                times(spread(kind, datagram).least, spread(0, datagram).least),
            ]);
        }
    }
    Ok(section)
}

/// The far ends answer no ARP, and a link that goes down forgets; without this a datagram waits for its gateway's MAC.
fn know_gateways(size: Size) -> Result<()> {
    let neighbour = |n| format!("neigh replace 10.0.{n}.1 lladdr 02:00:00:00:00:01 dev eth{n} nud permanent");
    batch((1..size.enis).map(neighbour), &[])
}

fn few(instance: &Instance) -> Result<()> {
    instance.reconcile().map(drop)
}

fn one_for_each_address(_: &Instance) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("config.toml");
    std::fs::write(&file, "rules = \"per-address\"\n")?;
    Cost::of(Command::new(eniup()).args(["reconcile", "--quiet", "--config"]).arg(file)).map(drop)
}

/// eniup's addresses and routes, and by hand a rule for each ENI's subnet: what is written in every guide.
fn one_for_each_eni(instance: &Instance) -> Result<()> {
    few(instance)?;
    let routes = block_on(async { Netlink::open()?.observe().await })?.routes;
    let is_default = |route: &Route| route.destination.prefix_len() == 0 && route.gateway.is_some();
    let tables = routes.iter().filter(|(_, route)| is_default(route) && route.table != 254);
    let rules: Vec<String> = tables
        .filter_map(|(_, route)| {
            let IpAddr::V4(gateway) = route.gateway? else { return None };
            let [a, b, c, _] = gateway.octets();
            (c != 0).then(|| format!("rule add from {a}.{b}.{c}.0/24 lookup {} priority 20000", route.table))
        })
        .collect();
    ensure!(rules.len() == usize::from(instance.size.enis) - 1, "not one table for each secondary ENI");
    ip("-4 rule flush")?;
    let standard = [32766, 32767].into_iter().zip(["main", "default"]);
    let standard = standard.map(|(priority, table)| format!("rule add priority {priority} lookup {table}"));
    batch(rules.into_iter().chain(standard), &["-4"])
}

fn rules() -> Result<usize> {
    let observed = block_on(async { Netlink::open()?.observe().await })?;
    Ok(observed.rules.iter().filter(|rule| rule.family == eniup::net::Family::V4).count())
}

/// CPU time of [`PACKETS`] packets.
#[derive(Clone, Copy)]
struct Costs {
    look_up: Duration,
    datagram: Duration,
}

impl Costs {
    fn measure(source: Ipv4Addr) -> Result<Costs> {
        let least = |of: fn(Ipv4Addr) -> Result<Duration>| {
            let times = (0..REPEATED).map(|_| of(source)).collect::<Result<Vec<_>>>()?;
            anyhow::Ok(Spread::of(times).least)
        };
        Ok(Costs { look_up: least(look_ups)?, datagram: least(datagrams)? })
    }
}

fn look_ups(source: Ipv4Addr) -> Result<Duration> {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.destination_prefix_length = 32;
    message.header.source_prefix_length = 32;
    message.attributes = vec![RouteAttribute::Destination(FAR_AWAY.into()), RouteAttribute::Source(source.into())];
    let mut question = NetlinkMessage::from(RouteNetlinkMessage::GetRoute(message));
    question.header.flags = NLM_F_REQUEST;
    question.finalize();
    let mut bytes = vec![0; question.buffer_len()];
    question.serialize(&mut bytes);
    let socket = socket()?;
    let mut answer = Vec::with_capacity(4096);
    let before = thread_time()?;
    for _ in 0..PACKETS {
        socket.send(&bytes, 0)?;
        answer.clear();
        socket.recv(&mut answer, 0)?;
    }
    let passed = thread_time()? - before;
    ensure!(answer[4..6] == libc::RTM_NEWROUTE.to_ne_bytes(), "the kernel knows no way from {source}");
    Ok(passed)
}

fn datagrams(source: Ipv4Addr) -> Result<Duration> {
    let socket = UdpSocket::bind((source, 0))?;
    let before = thread_time()?;
    for _ in 0..PACKETS {
        socket.send_to(b"x", (FAR_AWAY, 9))?;
    }
    Ok(thread_time()? - before)
}
