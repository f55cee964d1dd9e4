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
use vpc_lab::cost::Cost;

use super::eniup;
use super::instance::{Instance, batch};
use super::lab::{block_on, ip};
use super::machine::Size;
use super::netlink::{socket, thread_time};
use super::tables::Section;

/// Packets of one round. The least of some rounds is what the work itself costs.
const PACKETS: u32 = 5000;
const ROUNDS: usize = 15;

const FAR_AWAY: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

type Configure = fn(&Instance) -> Result<()>;

pub fn measure(_: usize) -> Result<Section> {
    let size = Size::ipv4(15, 50);
    eprintln!("packets, {size}");
    let header =
        ["source", "rules", "number of rules", "look-up us", "times one an ENI", "datagram us", "times one an ENI"];
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
    let mut costs = vec![vec![Costs::none(); sources.len()]; kinds.len()];
    let mut counts = [0; 3];
    // In turn, so that what else the machine does falls on all of them.
    for _ in 0..3 {
        for (kind, (_, prepare)) in kinds.iter().enumerate() {
            instance.forget()?;
            prepare(&instance)?;
            know_gateways(size)?;
            counts[kind] = rules()?;
            for (source, (_, address)) in sources.iter().enumerate() {
                costs[kind][source] = costs[kind][source].least(Costs::measure(*address)?);
            }
        }
    }
    for (source, (name, _)) in sources.iter().enumerate() {
        for (kind, (rules, _)) in kinds.iter().enumerate() {
            let (cost, bare) = (costs[kind][source], costs[0][source]);
            let times = |cost: Duration, bare: Duration| format!("{:.2}", cost.as_secs_f64() / bare.as_secs_f64());
            let each = |cost: Duration| format!("{:.2}", cost.as_secs_f64() * 1e6 / f64::from(PACKETS));
            section.push([
                name.to_string(),
                rules.to_string(),
                counts[kind].to_string(),
                each(cost.look_up),
                times(cost.look_up, bare.look_up),
                each(cost.datagram),
                times(cost.datagram, bare.datagram),
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
    fn none() -> Costs {
        Costs { look_up: Duration::MAX, datagram: Duration::MAX }
    }

    fn least(self, other: Costs) -> Costs {
        Costs { look_up: self.look_up.min(other.look_up), datagram: self.datagram.min(other.datagram) }
    }

    fn measure(source: Ipv4Addr) -> Result<Costs> {
        let mut costs = Costs::none();
        for _ in 0..ROUNDS {
            costs = costs.least(Costs { look_up: look_ups(source)?, datagram: datagrams(source)? });
        }
        Ok(costs)
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
