//! Probes: one exchange from a node to an address, and what came of it, with the address that the other side saw.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

use crate::echo::{NONCE, Nonce, PORT};
use crate::node::Node;

/// Exchanges under way at the same time: few enough that no queue on the way overflows.
const AT_ONCE: usize = 96;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    Icmp,
    Udp,
    Tcp,
}

impl Kind {
    pub const ALL: [Kind; 3] = [Kind::Icmp, Kind::Udp, Kind::Tcp];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Kind::Icmp => "icmp",
            Kind::Udp => "udp",
            Kind::Tcp => "tcp",
        })
    }
}

/// What the client's socket is bound to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Bound {
    Nothing,
    Address(IpAddr),
    Device(String),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Probe {
    /// The node that asks.
    pub from: String,
    pub bound: Bound,
    pub to: IpAddr,
    pub kind: Kind,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    Answer {
        /// Who answered: right only if it is the address that was asked.
        by: IpAddr,
        /// The client's address as the other side saw it; none for a ping that no node of the lab noticed.
        seen: Option<IpAddr>,
        took: Duration,
    },
    /// It could not even be sent, or was refused.
    Failed(String),
    Silence,
}

impl Outcome {
    /// Answered, and by the address that was asked.
    pub fn is_answer_of(&self, asked: IpAddr) -> bool {
        matches!(self, Outcome::Answer { by, .. } if *by == asked)
    }

    /// The client's address as the other side saw it.
    pub fn seen(&self) -> Option<IpAddr> {
        match self {
            Outcome::Answer { seen, .. } => *seen,
            Outcome::Failed(_) | Outcome::Silence => None,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Outcome::Answer { by, seen, took } => {
                write!(f, "{by} answered within {:.1} ms", took.as_secs_f64() * 1000.0)?;
                seen.map_or(Ok(()), |seen| write!(f, " and saw {seen}"))
            }
            Outcome::Failed(why) => write!(f, "failed: {why}"),
            Outcome::Silence => write!(f, "no answer"),
        }
    }
}

/// Makes all these exchanges, many at a time; each has `patience` to be answered. Outcomes are in the order of the probes.
///
/// # Errors
/// A probe names a node that there is not, or its socket cannot be made.
pub fn probe_all(
    nodes: &BTreeMap<String, Node>,
    probes: &[Probe],
    patience: Duration,
    pinged_by: impl Fn(&Nonce) -> Option<IpAddr>,
) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::with_capacity(probes.len());
    for batch in probes.chunks(AT_ONCE) {
        let mut exchanges: Vec<Exchange> = Vec::with_capacity(batch.len());
        // One visit per node and run of probes from it.
        for run in batch.chunk_by(|a, b| a.from == b.from) {
            let name = &run[0].from;
            let node = nodes.get(name).with_context(|| format!("there is no node {name}"))?;
            exchanges.extend(node.enter(|| run.iter().map(Exchange::begin).collect::<Result<Vec<_>>>())?);
        }
        wait(&mut exchanges, Instant::now() + patience);
        outcomes.extend(exchanges.into_iter().map(|exchange| exchange.outcome(&pinged_by)));
    }
    Ok(outcomes)
}

struct Exchange {
    socket: Socket,
    kind: Kind,
    to: SocketAddr,
    nonce: Nonce,
    begun: Instant,
    state: State,
}

enum State {
    /// TCP: until the connection stands.
    Connecting,
    Waiting,
    Answered {
        by: IpAddr,
        seen: Option<IpAddr>,
        took: Duration,
    },
    Failed(String),
}

impl Exchange {
    fn begin(probe: &Probe) -> Result<Exchange> {
        let is_ipv4 = probe.to.is_ipv4();
        let domain = if is_ipv4 { Domain::IPV4 } else { Domain::IPV6 };
        let (kind, protocol) = match probe.kind {
            Kind::Icmp if is_ipv4 => (Type::DGRAM, Protocol::ICMPV4),
            Kind::Icmp => (Type::DGRAM, Protocol::ICMPV6),
            Kind::Udp => (Type::DGRAM, Protocol::UDP),
            Kind::Tcp => (Type::STREAM, Protocol::TCP),
        };
        let socket = Socket::new(domain, kind, Some(protocol)).context("making a probe's socket")?;
        socket.set_nonblocking(true)?;
        let port = if probe.kind == Kind::Icmp { 0 } else { PORT };
        let mut exchange = Exchange {
            socket,
            kind: probe.kind,
            to: SocketAddr::new(probe.to, port),
            nonce: fastrand::u64(..).to_ne_bytes(),
            begun: Instant::now(),
            state: State::Waiting,
        };
        if let Err(error) = exchange.bind(&probe.bound).and_then(|()| exchange.send()) {
            exchange.state = State::Failed(error.to_string());
        }
        Ok(exchange)
    }

    fn bind(&self, bound: &Bound) -> io::Result<()> {
        match bound {
            Bound::Nothing => Ok(()),
            Bound::Address(address) => self.socket.bind(&SocketAddr::new(*address, 0).into()),
            Bound::Device(name) => self.socket.bind_device(Some(name.as_bytes())),
        }
    }

    fn send(&mut self) -> io::Result<()> {
        match self.kind {
            Kind::Tcp => match self.socket.connect(&self.to.into()) {
                Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
                _ => {
                    self.state = State::Connecting;
                    Ok(())
                }
            },
            Kind::Udp => self.socket.send_to(&self.nonce, &self.to.into()).map(|_| ()),
            Kind::Icmp => {
                let request = if self.to.is_ipv4() { 8 } else { 128 };
                // Checksum and identifier are the kernel's.
                let echo = [&[request, 0, 0, 0, 0, 0, 0, 1][..], &self.nonce].concat();
                self.socket.send_to(&echo, &self.to.into()).map(|_| ())
            }
        }
    }

    fn interest(&self) -> Option<PollFlags> {
        match self.state {
            State::Connecting => Some(PollFlags::POLLOUT),
            State::Waiting => Some(PollFlags::POLLIN),
            State::Answered { .. } | State::Failed(_) => None,
        }
    }

    fn go_on(&mut self) {
        let result = match self.state {
            State::Connecting => self.greet(),
            State::Waiting => self.read(),
            State::Answered { .. } | State::Failed(_) => Ok(()),
        };
        match result {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => self.state = State::Failed(error.to_string()),
            Ok(()) => {}
        }
    }

    fn greet(&mut self) -> io::Result<()> {
        if let Some(error) = self.socket.take_error()? {
            return Err(error);
        }
        self.socket.send(&self.nonce)?;
        self.state = State::Waiting;
        Ok(())
    }

    fn read(&mut self) -> io::Result<()> {
        let mut buffer = [MaybeUninit::<u8>::uninit(); 512];
        let (length, from) = self.socket.recv_from(&mut buffer)?;
        // SAFETY: the kernel has written this many bytes.
        let bytes: Vec<u8> = buffer[..length].iter().map(|byte| unsafe { byte.assume_init() }).collect();
        let payload = if self.kind == Kind::Icmp { bytes.get(8..).unwrap_or_default() } else { &bytes };
        let Some(rest) = payload.strip_prefix(&self.nonce[..NONCE]) else {
            return Err(io::Error::other("the answer is to another question"));
        };
        let by = match self.kind {
            // A connection has no other end than the one that was asked.
            Kind::Tcp => Some(self.to),
            Kind::Icmp | Kind::Udp => from.as_socket(),
        };
        let by = by.map_or(self.to.ip(), |by| by.ip());
        let seen = std::str::from_utf8(rest).ok().and_then(|text| text.parse().ok());
        self.state = State::Answered { by, seen, took: self.begun.elapsed() };
        Ok(())
    }

    fn outcome(self, pinged_by: impl Fn(&Nonce) -> Option<IpAddr>) -> Outcome {
        match self.state {
            State::Answered { by, seen, took } => {
                let seen = if self.kind == Kind::Icmp { pinged_by(&self.nonce) } else { seen };
                Outcome::Answer { by, seen, took }
            }
            State::Failed(why) => Outcome::Failed(why),
            State::Connecting | State::Waiting => Outcome::Silence,
        }
    }
}

fn wait(exchanges: &mut [Exchange], deadline: Instant) {
    loop {
        let waiting: Vec<(usize, PollFlags)> =
            exchanges.iter().enumerate().filter_map(|(n, exchange)| Some((n, exchange.interest()?))).collect();
        let left = deadline.saturating_duration_since(Instant::now());
        if waiting.is_empty() || left.is_zero() {
            return;
        }
        let ready: Vec<usize> = {
            let mut polled: Vec<PollFd> =
                waiting.iter().map(|(n, flags)| PollFd::new(exchanges[*n].socket.as_fd(), *flags)).collect();
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            // Interrupted or not, what is ready says so.
            let _ = poll(&mut polled, timeout);
            let is_ready = |fd: &PollFd| fd.revents().is_some_and(|flags| !flags.is_empty());
            polled.iter().zip(&waiting).filter(|(fd, _)| is_ready(fd)).map(|(_, (n, _))| *n).collect()
        };
        for n in ready {
            exchanges[n].go_on();
        }
        if left < Duration::from_millis(1) {
            std::thread::yield_now();
        }
    }
}
