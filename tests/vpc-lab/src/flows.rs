//! Flows: conversations that last. Each keeps sending numbered messages to an address, every one of which the other side
//! sends back, and counts what came of them; to see whether anything is lost while something happens to the machine.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

use crate::echo::{FLOW_PORT, PORT};
use crate::kernel;
use crate::lab::Lab;
use crate::node::Node;
use crate::probe::Bound;

/// Until all flows of a start are established, and after the last message for answers that are on their way.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes of a message: its number.
const MESSAGE: usize = 8;

/// So many messages of a flow may be under way within [`BUSY`]; the next ones wait. A lab that gets no turn on a busy machine
/// then slows its flows down, and none is lost in a queue that overflows. After an outage a flow goes on.
const WINDOW: usize = 100;
const BUSY: Duration = Duration::from_secs(1);

/// Bytes of answers that wait for their turn.
const QUEUE: usize = 4 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// One long-lived connection; what comes back has to be in order.
    Tcp,
    /// Pings on one connected socket.
    Udp,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FlowSpec {
    /// The node that talks.
    pub from: String,
    pub bound: Bound,
    pub to: IpAddr,
    pub kind: Kind,
    /// From one message to the next.
    pub every: Duration,
}

impl fmt::Display for FlowSpec {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let kind = match self.kind {
            Kind::Tcp => "tcp",
            Kind::Udp => "udp",
        };
        write!(f, "{kind} {} → {}", self.from, self.to)
    }
}

/// What became of a flow.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FlowReport {
    pub spec: FlowSpec,
    pub sent: u64,
    /// Messages that came back; no message counts twice.
    pub answered: u64,
    /// The longest time without an answer.
    pub longest_gap: Duration,
    /// Why it ended before its time, or what went wrong last.
    pub fault: Option<String>,
}

impl FlowReport {
    pub fn lost(&self) -> u64 {
        self.sent - self.answered
    }

    /// Nothing was lost and nothing went wrong.
    pub fn is_whole(&self) -> bool {
        self.lost() == 0 && self.fault.is_none()
    }
}

impl fmt::Display for FlowReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let FlowReport { spec, sent, answered: _, longest_gap, fault } = self;
        let gap = longest_gap.as_secs_f64() * 1000.0;
        write!(f, "{spec}: {sent} sent, {} lost, longest gap {gap:.1} ms", self.lost())?;
        fault.as_ref().map_or(Ok(()), |fault| write!(f, ", {fault}"))
    }
}

/// Flows under way, until they are finished.
pub struct Flows {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<Flow>>>,
}

impl Flows {
    /// Starts these flows; all are established, each with a first answer, when this returns.
    ///
    /// # Errors
    /// A flow names a node that there is not, or cannot be established.
    pub fn start(lab: &Lab, specs: &[FlowSpec]) -> Result<Flows> {
        let mut flows: Vec<Flow> =
            specs.iter().map(|spec| Flow::open(lab.node(&spec.from)?, spec)).collect::<Result<_>>()?;
        let deadline = Instant::now() + PATIENCE;
        while let Some(silent) = flows.iter().find(|flow| flow.answered == 0) {
            if let Some(fault) = flows.iter().find_map(|flow| flow.fault.as_ref().map(|why| (flow, why))) {
                bail!("{} cannot be established: {}", fault.0.spec, fault.1);
            }
            ensure!(Instant::now() < deadline, "{} cannot be established: no answer", silent.spec);
            turn(&mut flows, true);
        }
        let is_over = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let is_over = is_over.clone();
            move || {
                for flow in &mut flows {
                    flow.last_answer = Instant::now();
                    flow.longest_gap = Duration::ZERO;
                }
                while !is_over.load(Ordering::Relaxed) {
                    turn(&mut flows, true);
                }
                flows
            }
        });
        Ok(Flows { is_over, thread: Some(thread) })
    }

    /// Sends no more, waits for the answers that are on their way, and tells what became of each flow, in the order in
    /// which they were started.
    pub fn finish(mut self) -> Vec<FlowReport> {
        let mut flows = self.stop();
        let deadline = Instant::now() + PATIENCE;
        while flows.iter().any(|flow| flow.is_waiting()) && Instant::now() < deadline {
            turn(&mut flows, false);
        }
        flows.into_iter().map(Flow::report).collect()
    }

    fn stop(&mut self) -> Vec<Flow> {
        self.is_over.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(flows)) => flows,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Vec::new(),
        }
    }
}

impl Drop for Flows {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stop();
        }
    }
}

struct Flow {
    spec: FlowSpec,
    socket: Socket,
    /// Messages sent; the number of the next.
    sent: u64,
    answered: u64,
    /// UDP: messages that are not answered, by number, and when they were sent.
    open: BTreeMap<u64, Instant>,
    /// TCP: bytes that the socket has not taken yet, and those of a message that is not all there.
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    next: Instant,
    last_answer: Instant,
    longest_gap: Duration,
    fault: Option<String>,
    /// Its connection is broken.
    is_dead: bool,
}

impl Flow {
    fn open(node: &Node, spec: &FlowSpec) -> Result<Flow> {
        let domain = if spec.to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let (kind, protocol, port) = match spec.kind {
            Kind::Tcp => (Type::STREAM, Protocol::TCP, FLOW_PORT),
            Kind::Udp => (Type::DGRAM, Protocol::UDP, PORT),
        };
        let connect = || -> Result<Socket> {
            let socket = Socket::new(domain, kind, Some(protocol))?;
            kernel::set_receive_queue(&socket, QUEUE)?;
            match &spec.bound {
                Bound::Nothing => {}
                Bound::Address(address) => socket.bind(&SocketAddr::new(*address, 0).into())?,
                Bound::Device(name) => socket.bind_device(Some(name.as_bytes()))?,
            }
            socket.connect_timeout(&SocketAddr::new(spec.to, port).into(), PATIENCE)?;
            if spec.kind == Kind::Tcp {
                socket.set_tcp_nodelay(true)?;
            }
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        let socket = node.enter(connect).with_context(|| format!("starting {spec}"))?;
        let now = Instant::now();
        Ok(Flow {
            spec: spec.clone(),
            socket,
            sent: 0,
            answered: 0,
            open: BTreeMap::new(),
            outgoing: Vec::new(),
            incoming: Vec::new(),
            next: now,
            last_answer: now,
            longest_gap: Duration::ZERO,
            fault: None,
            is_dead: false,
        })
    }

    fn is_waiting(&self) -> bool {
        !self.is_dead && self.answered < self.sent
    }

    fn send_if_due(&mut self, now: Instant) {
        if self.is_dead || now < self.next {
            return;
        }
        if self.open.values().rev().nth(WINDOW - 1).is_some_and(|sent| now - *sent < BUSY) {
            self.next = now + self.spec.every;
            return;
        }
        // What was missed is not made up for: a burst would only fill queues.
        self.next = (self.next + self.spec.every).max(now);
        let message = self.sent.to_be_bytes();
        match self.spec.kind {
            Kind::Udp => {
                self.open.insert(self.sent, now);
                self.sent += 1;
                // A message that cannot be sent is lost like any other, and its fault says why.
                if let Err(error) = self.socket.send(&message) {
                    self.fault = Some(format!("sending: {error}"));
                }
            }
            Kind::Tcp => {
                if self.outgoing.is_empty() {
                    self.sent += 1;
                    self.outgoing.extend(message);
                }
                self.flush();
            }
        }
    }

    fn flush(&mut self) {
        match self.socket.send(&self.outgoing) {
            Ok(taken) => _ = self.outgoing.drain(..taken),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => self.die(format!("sending: {error}")),
        }
    }

    fn die(&mut self, fault: String) {
        self.fault = Some(fault);
        self.is_dead = true;
    }

    fn receive(&mut self) {
        while !self.is_dead {
            let mut buffer = [MaybeUninit::<u8>::uninit(); 2048];
            let length = match self.socket.recv(&mut buffer) {
                Ok(0) if self.spec.kind == Kind::Tcp => return self.die("closed by the other side".into()),
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => return self.note(error),
            };
            // SAFETY: the kernel has written this many bytes.
            let bytes = buffer[..length].iter().map(|byte| unsafe { byte.assume_init() });
            match self.spec.kind {
                Kind::Udp => self.take_datagram(bytes.take(MESSAGE).collect()),
                Kind::Tcp => {
                    self.incoming.extend(bytes);
                    self.take_stream();
                }
            }
        }
    }

    /// An error that the network has told: the end of a connection; for datagrams the next one may do better.
    fn note(&mut self, error: io::Error) {
        match self.spec.kind {
            Kind::Tcp => self.die(format!("receiving: {error}")),
            Kind::Udp => self.fault = Some(format!("receiving: {error}")),
        }
    }

    fn take_datagram(&mut self, bytes: Vec<u8>) {
        let number = <[u8; MESSAGE]>::try_from(bytes).map(u64::from_be_bytes);
        if number.is_ok_and(|number| self.open.remove(&number).is_some()) {
            self.count();
        }
    }

    fn take_stream(&mut self) {
        while let Some(message) = self.incoming.first_chunk::<MESSAGE>() {
            let number = u64::from_be_bytes(*message);
            if number != self.answered {
                return self.die(format!("message {number} came back in place of {}", self.answered));
            }
            self.incoming.drain(..MESSAGE);
            self.count();
        }
    }

    fn count(&mut self) {
        self.answered += 1;
        self.note_gap();
        self.last_answer = Instant::now();
    }

    fn note_gap(&mut self) {
        self.longest_gap = self.longest_gap.max(self.last_answer.elapsed());
    }

    fn report(mut self) -> FlowReport {
        if self.answered < self.sent {
            self.note_gap();
        }
        let Flow { spec, sent, answered, longest_gap, fault, .. } = self;
        FlowReport { spec, sent, answered, longest_gap, fault }
    }
}

/// Sends what is due, if at all, waits until something comes or is due, and reads what has come.
fn turn(flows: &mut [Flow], is_sending: bool) {
    let now = Instant::now();
    if is_sending {
        flows.iter_mut().for_each(|flow| flow.send_if_due(now));
    }
    // Without anything to send, the deadline of whoever waits is near enough.
    let due = flows.iter().filter(|flow| is_sending && !flow.is_dead).map(|flow| flow.next).min();
    let pause = due.map_or(Duration::from_millis(10), |due| due.saturating_duration_since(Instant::now()));
    let ready: Vec<bool> = {
        let interest = |flow: &Flow| match flow.outgoing.is_empty() {
            true => PollFlags::POLLIN,
            false => PollFlags::POLLIN | PollFlags::POLLOUT,
        };
        // A dead one would always be ready.
        let alive = flows.iter().filter(|flow| !flow.is_dead);
        let mut polled: Vec<PollFd> = alive.map(|flow| PollFd::new(flow.socket.as_fd(), interest(flow))).collect();
        // Up to the next millisecond, or it would not wait at all.
        let timeout = PollTimeout::try_from(pause + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
        // Interrupted or not, what is ready says so.
        let _ = poll(&mut polled, timeout);
        let is_ready = |fd: &PollFd| fd.revents().is_some_and(|flags| !flags.is_empty());
        polled.iter().map(is_ready).collect()
    };
    let alive = flows.iter_mut().filter(|flow| !flow.is_dead);
    for (flow, _) in alive.zip(ready).filter(|(_, is_ready)| *is_ready) {
        if !flow.outgoing.is_empty() {
            flow.flush();
        }
        flow.receive();
    }
}
