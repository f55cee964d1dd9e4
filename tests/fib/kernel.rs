//! What the kernel says of a packet: `RTM_GETROUTE`, many at a time on one socket, and for what that cannot ask a real
//! socket. And a machine of a test's own to ask.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use eniup::fib::Packet;
use eniup::net::{HasFamily, Observed};
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::Socket;
use rtnetlink::sys::protocols::NETLINK_ROUTE;

/// Requests in one send. The kernel reserves a page and more for each answer, and a default buffer holds 48.
const BATCH: usize = 32;

/// Runs on a machine of its own: a thread in a new network namespace, with loopback up.
pub fn on_a_machine<T: Send>(test: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let run = || {
        // SAFETY: unshare moves this thread alone into a new network namespace.
        ensure!(unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0, "unshare: {}", std::io::Error::last_os_error());
        ip(&["link set lo up".into()])?;
        test()
    };
    std::thread::scope(|scope| scope.spawn(run).join().expect("the test's thread panicked"))
}

/// Arguments of ip(8), a command a line, each of which has to succeed. Those that begin with `-4` or `-6` come last.
pub fn ip(lines: &[String]) -> Result<()> {
    for option in ["", "-4 ", "-6 "] {
        // A batch cannot name the family line by line.
        let of_family = lines.iter().filter(|line| line.starts_with('-') != option.is_empty());
        let batch: Vec<&str> = of_family.filter_map(|line| line.strip_prefix(option)).collect();
        let mut command = Command::new("ip");
        command.args(option.split_whitespace()).args(["-batch", "-"]);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().context("running ip: install it with tests/prepare")?;
        child.stdin.take().context("no stdin")?.write_all(batch.join("\n").as_bytes())?;
        let output = child.wait_with_output()?;
        let numbered: Vec<String> = batch.iter().enumerate().map(|(n, line)| format!("{}: {line}", n + 1)).collect();
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ip {option}-batch: {stderr}\n{}", numbered.join("\n"));
    }
    Ok(())
}

/// What one command of ip(8) shows.
pub fn output_of_ip(arguments: &str) -> Result<String> {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().context("running ip")?;
    ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// What eniup sees, once the kernel is done: it makes IPv6's local routes a moment after the addresses.
pub fn observe() -> Result<Observed> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let observed = runtime.block_on(async { eniup::netlink::Netlink::open()?.observe().await })?;
        let local: BTreeSet<IpNet> = observed
            .routes
            .iter()
            .filter(|(_, route)| route.table == 255)
            .map(|(_, route)| route.destination)
            .collect();
        if observed.addresses.iter().all(|(_, address)| local.contains(&address.net.addr().into())) {
            return Ok(observed);
        }
        ensure!(Instant::now() < deadline, "addresses without their local routes: {:#?}", observed.addresses);
        std::thread::yield_now();
    }
}

/// The kernel's answer to one question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Said {
    Error(i32),
    Route(Found),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    pub kind: RouteType,
    pub table: u32,
    pub destination: Option<IpNet>,
    pub link: Option<u32>,
    pub gateway: Option<IpAddr>,
    pub metric: u32,
}

/// Where the packet would go, and by which entry of which table.
pub struct Heard {
    pub way: Said,
    pub entry: Said,
}

pub struct Asker {
    socket: Socket,
}

impl Asker {
    pub fn open() -> Result<Asker> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&rtnetlink::sys::SocketAddr::new(0, 0))?;
        Ok(Asker { socket })
    }

    pub fn ask(&self, packets: &[Packet]) -> Result<Vec<Heard>> {
        let ways = self.ask_all(packets, RouteFlags::LookupTable)?;
        let entries = self.ask_all(packets, RouteFlags::LookupTable | RouteFlags::FibMatch)?;
        Ok(ways.into_iter().zip(entries).map(|(way, entry)| Heard { way, entry }).collect())
    }

    fn ask_all(&self, packets: &[Packet], flags: RouteFlags) -> Result<Vec<Said>> {
        let mut said = Vec::new();
        for batch in packets.chunks(BATCH) {
            let mut buffer = Vec::new();
            for (number, packet) in batch.iter().enumerate() {
                let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetRoute(question(packet, flags)));
                message.header.flags = NLM_F_REQUEST;
                message.header.sequence_number = number as u32 + 1;
                message.finalize();
                let start = buffer.len();
                buffer.resize(start + message.buffer_len(), 0);
                message.serialize(&mut buffer[start..]);
            }
            self.socket.send(&buffer, 0)?;
            let mut answers = BTreeMap::new();
            while answers.len() < batch.len() {
                for (number, answer) in self.receive()? {
                    ensure!(answers.insert(number, answer).is_none(), "two answers to question {number}");
                }
            }
            said.extend(answers.into_values());
        }
        Ok(said)
    }

    fn receive(&self) -> Result<Vec<(u32, Said)>> {
        let (datagram, _) = self.socket.recv_from_full()?;
        let mut answers = Vec::new();
        let mut rest = datagram.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)?;
            rest = rest.get((message.header.length as usize).next_multiple_of(4)..).unwrap_or_default();
            let answer = match message.payload {
                NetlinkPayload::Error(error) => Said::Error(-error.raw_code()),
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => Said::Route(found(&route)),
                other => anyhow::bail!("{other:?} in answer to a question"),
            };
            answers.push((message.header.sequence_number, answer));
        }
        Ok(answers)
    }
}

fn question(packet: &Packet, flags: RouteFlags) -> RouteMessage {
    let mut message = RouteMessage::default();
    let bits = packet.destination.family().bits();
    message.header.address_family = if bits == 32 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.flags = flags;
    message.header.destination_prefix_length = bits;
    message.attributes.push(RouteAttribute::Destination(packet.destination.into()));
    if let Some(source) = packet.source {
        message.header.source_prefix_length = bits;
        message.attributes.push(RouteAttribute::Source(source.into()));
    }
    message.attributes.extend(packet.input.map(RouteAttribute::Iif));
    message.attributes.extend(packet.output.map(RouteAttribute::Oif));
    if packet.mark != 0 {
        message.attributes.push(RouteAttribute::Mark(packet.mark));
    }
    message
}

fn found(message: &RouteMessage) -> Found {
    let address = |address: &RouteAddress| match address {
        RouteAddress::Inet(address) => Some(IpAddr::from(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::from(*address)),
        _ => None,
    };
    let header = &message.header;
    let mut found = Found {
        kind: header.kind,
        table: u32::from(header.table),
        destination: None,
        link: None,
        gateway: None,
        metric: 0,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => {
                found.destination = address(to).and_then(|to| IpNet::new(to, header.destination_prefix_length).ok());
            }
            RouteAttribute::Gateway(gateway) => found.gateway = address(gateway),
            RouteAttribute::Oif(link) => found.link = Some(*link),
            RouteAttribute::Table(table) => found.table = *table,
            RouteAttribute::Priority(metric) => found.metric = *metric,
            _ => {}
        }
    }
    found
}

/// Whether a socket that is bound to a link and an address finds a way. `RTM_GETROUTE` cannot ask this of IPv6: only a
/// socket makes the link a condition when there is a source address too (`ip6_route_output_flags`).
pub fn connects(packet: &Packet, link_name: &str) -> Result<bool> {
    let domain = if packet.destination.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: the descriptor is ours alone from here on.
    let socket = unsafe {
        let descriptor = libc::socket(domain, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        ensure!(descriptor >= 0, "socket: {}", std::io::Error::last_os_error());
        <std::net::UdpSocket as std::os::fd::FromRawFd>::from_raw_fd(descriptor)
    };
    let on = 1i32.to_ne_bytes();
    // The address may be another link's.
    set_option(&socket, libc::SOL_IPV6, libc::IPV6_FREEBIND, &on)?;
    set_option(&socket, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, link_name.as_bytes())?;
    set_option(&socket, libc::SOL_SOCKET, libc::SO_MARK, &packet.mark.to_ne_bytes())?;
    let source = packet.source.context("only with a source")?;
    let IpAddr::V6(address) = source else { anyhow::bail!("only for IPv6") };
    let address = libc::sockaddr_in6 {
        sin6_family: libc::AF_INET6 as u16,
        sin6_port: 0,
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr { s6_addr: address.octets() },
        sin6_scope_id: 0,
    };
    let length = size_of_val(&address) as u32;
    // SAFETY: the address is of the length that is told.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    ensure!(bound == 0, "bind to {source}: {}", std::io::Error::last_os_error());
    Ok(socket.connect(SocketAddr::new(packet.destination, 9)).is_ok())
}

fn set_option(socket: &impl AsRawFd, level: i32, name: i32, value: &[u8]) -> Result<()> {
    // SAFETY: the value is read up to its length.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), value.len() as u32) };
    ensure!(result == 0, "setsockopt {name}: {}", std::io::Error::last_os_error());
    Ok(())
}
