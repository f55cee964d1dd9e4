//! Flows: conversations that last. Each keeps sending numbered messages to an address, every one of which the other side
//! sends back, and counts what came of them; to see whether anything is lost while something happens to the machine.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
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
/// Bytes in front of it in an answer to a ping.
const ICMP_HEADER: usize = 8;

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
    /// Datagrams on one connected socket.
    Udp,
    /// Pings, which also a node without a server answers.
    Icmp,
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
            Kind::Icmp => "icmp",
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
    /// When the first message was sent that has no answer, or the fault was noticed.
    pub since: Option<Instant>,
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
        let FlowReport { spec, sent, answered: _, longest_gap, since: _, fault } = self;
        let gap = longest_gap.as_secs_f64() * 1000.0;
        write!(f, "{spec}: {sent} sent, {} lost, longest gap {gap:.1} ms", self.lost())?;
        fault.as_ref().map_or(Ok(()), |fault| write!(f, ", {fault}"))
    }
}

/// One of the flows of a [`Flows`].
pub type FlowId = u64;

/// How far a flow has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    pub kind: Kind,
    pub sent: u64,
    pub answered: u64,
}

/// Flows under way, until they are ended.
pub struct Flows {
    /// The thread ends when this is closed.
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<Vec<Flow>>>,
    next_id: FlowId,
}

/// What the thread is told between two turns.
enum Order {
    Add(Vec<Flow>),
    /// Hands back these flows as they are.
    End(Vec<FlowId>, Sender<Vec<Flow>>),
    Pace(Vec<FlowId>, Duration),
    /// Says of these flows, in words, how they are.
    Describe(Vec<FlowId>, Sender<Vec<String>>),
    Tell(Sender<BTreeMap<FlowId, Progress>>),
}

impl Flows {
    /// Starts these flows; all are established, each with a first answer, when this returns.
    ///
    /// # Errors
    /// A flow names a node that there is not, or cannot be established.
    pub fn start(lab: &Lab, specs: &[FlowSpec]) -> Result<Flows> {
        let (orders, ordered) = channel();
        let thread = std::thread::spawn(move || carry_on(&ordered));
        let mut flows = Flows { orders: Some(orders), thread: Some(thread), next_id: 0 };
        flows.add(lab, specs)?;
        Ok(flows)
    }

    /// Starts more of them beside the others, as [`Flows::start`] does.
    ///
    /// # Errors
    /// A flow names a node that there is not, or cannot be established.
    pub fn add(&mut self, lab: &Lab, specs: &[FlowSpec]) -> Result<Vec<FlowId>> {
        let mut flows = self.open(lab, specs)?;
        establish(&mut flows)?;
        Ok(self.hand_over(flows))
    }

    /// Starts pings of addresses that need not answer yet, to be [forgotten](Flows::forget) once they do.
    ///
    /// # Errors
    /// One names a node that there is not, or its socket cannot be made.
    pub fn knock(&mut self, lab: &Lab, specs: &[FlowSpec]) -> Result<Vec<FlowId>> {
        let flows = self.open(lab, specs)?;
        Ok(self.hand_over(flows))
    }

    fn open(&mut self, lab: &Lab, specs: &[FlowSpec]) -> Result<Vec<Flow>> {
        let first = self.next_id;
        self.next_id += specs.len() as FlowId;
        (first..).zip(specs).map(|(id, spec)| Flow::open(lab.node(&spec.from)?, id, spec)).collect()
    }

    fn hand_over(&self, flows: Vec<Flow>) -> Vec<FlowId> {
        let ids = flows.iter().map(|flow| flow.id).collect();
        self.order(Order::Add(flows));
        ids
    }

    /// Ends these, whatever became of them.
    pub fn forget(&self, ids: Vec<FlowId>) {
        self.take(ids);
    }

    fn take(&self, ids: Vec<FlowId>) -> Vec<Flow> {
        let (ended, flows) = channel();
        self.order(Order::End(ids, ended));
        flows.recv().unwrap_or_default()
    }

    /// Sends no more by these, waits for the answers that are on their way, and tells what became of them.
    pub fn end(&self, ids: Vec<FlowId>) -> Vec<FlowReport> {
        report(self.take(ids))
    }

    /// From now on there is this time from one message of these flows to the next.
    pub fn pace(&self, ids: Vec<FlowId>, every: Duration) {
        self.order(Order::Pace(ids, every));
    }

    /// How far each flow has come.
    pub fn progress(&self) -> BTreeMap<FlowId, Progress> {
        let (told, progress) = channel();
        self.order(Order::Tell(told));
        progress.recv().unwrap_or_default()
    }

    /// Until each flow has had this many more answers.
    ///
    /// # Errors
    /// One has not: it is silent, or broken.
    pub fn go_on(&self, answers: u64) -> Result<()> {
        let before = self.progress();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.progress();
            let is_silent = |id: &FlowId| now.get(id).is_none_or(|now| now.answered < before[id].answered + answers);
            let silent: Vec<FlowId> = before.keys().copied().filter(is_silent).collect();
            if silent.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                let (told, said) = channel();
                self.order(Order::Describe(silent, told));
                bail!("silent: {}", said.recv().unwrap_or_default().join("; "));
            }
        }
    }

    /// Ends all flows, in the order in which they were started.
    pub fn finish(mut self) -> Vec<FlowReport> {
        report(self.stop())
    }

    fn order(&self, order: Order) {
        // If the thread is gone it has panicked, which `stop` passes on.
        let _ = self.orders.as_ref().map(|orders| orders.send(order));
    }

    fn stop(&mut self) -> Vec<Flow> {
        self.orders = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(flows)) => flows,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Vec::new(),
        }
    }
}

impl Drop for Flows {
    fn drop(&mut self) {
        self.orders = None;
        // A panic of the thread has been printed already.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The thread: obeys, and lets the flows have their turn.
fn carry_on(orders: &Receiver<Order>) -> Vec<Flow> {
    let mut flows = Vec::new();
    loop {
        match orders.try_recv() {
            Ok(order) => obey(&mut flows, order),
            Err(TryRecvError::Empty) => turn(&mut flows, true),
            Err(TryRecvError::Disconnected) => return flows,
        }
    }
}

fn obey(flows: &mut Vec<Flow>, order: Order) {
    // Whoever asked and went away does not need the answer.
    match order {
        Order::Add(added) => flows.extend(added),
        Order::End(ids, ended) => {
            let (ending, others) = std::mem::take(flows).into_iter().partition(|flow| ids.contains(&flow.id));
            *flows = others;
            let _ = ended.send(ending);
        }
        Order::Pace(ids, every) => {
            let now = Instant::now();
            for flow in flows.iter_mut().filter(|flow| ids.contains(&flow.id)) {
                flow.spec.every = every;
                flow.next = flow.next.min(now + every);
            }
        }
        Order::Tell(told) => {
            let progress = |flow: &Flow| Progress { kind: flow.spec.kind, sent: flow.sent, answered: flow.answered };
            let _ = told.send(flows.iter().map(|flow| (flow.id, progress(flow))).collect());
        }
        Order::Describe(ids, told) => {
            let words = |flow: &Flow| {
                format!("{}: {} sent, {} answered, {:?}", flow.spec, flow.sent, flow.answered, flow.fault)
            };
            let _ = told.send(flows.iter().filter(|flow| ids.contains(&flow.id)).map(words).collect());
        }
    }
}

/// Until each has its first answer.
fn establish(flows: &mut [Flow]) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while let Some(silent) = flows.iter().find(|flow| flow.answered == 0) {
        if let Some(fault) = flows.iter().find_map(|flow| flow.fault.as_ref().map(|why| (flow, why))) {
            bail!("{} cannot be established: {}", fault.0.spec, fault.1);
        }
        ensure!(Instant::now() < deadline, "{} cannot be established: no answer", silent.spec);
        turn(flows, true);
    }
    for flow in flows {
        flow.last_answer = Instant::now();
        flow.longest_gap = Duration::ZERO;
    }
    Ok(())
}

/// What became of flows that send no more, once the answers that are on their way have come.
fn report(mut flows: Vec<Flow>) -> Vec<FlowReport> {
    let deadline = Instant::now() + PATIENCE;
    while flows.iter().any(|flow| flow.is_waiting()) && Instant::now() < deadline {
        turn(&mut flows, false);
    }
    flows.into_iter().map(Flow::report).collect()
}

struct Flow {
    id: FlowId,
    spec: FlowSpec,
    socket: Socket,
    /// Messages sent; the number of the next.
    sent: u64,
    answered: u64,
    /// UDP and ICMP: messages that are not answered, by number, and when they were sent.
    open: BTreeMap<u64, Instant>,
    /// TCP: bytes that the socket has not taken yet, and those of a message that is not all there.
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    next: Instant,
    last_answer: Instant,
    longest_gap: Duration,
    fault: Option<String>,
    faulty_since: Option<Instant>,
    /// Its connection is broken.
    is_dead: bool,
}

impl Flow {
    fn open(node: &Node, id: FlowId, spec: &FlowSpec) -> Result<Flow> {
        let domain = if spec.to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let (kind, protocol, port) = match spec.kind {
            Kind::Tcp => (Type::STREAM, Protocol::TCP, FLOW_PORT),
            Kind::Udp => (Type::DGRAM, Protocol::UDP, PORT),
            Kind::Icmp if spec.to.is_ipv4() => (Type::DGRAM, Protocol::ICMPV4, 0),
            Kind::Icmp => (Type::DGRAM, Protocol::ICMPV6, 0),
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
                // It ends without a farewell, of which a part might be under way when its address has gone.
                socket.set_linger(Some(Duration::ZERO))?;
            }
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        let socket = node.enter(connect).with_context(|| format!("starting {spec}"))?;
        let now = Instant::now();
        Ok(Flow {
            id,
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
            faulty_since: None,
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
            Kind::Udp | Kind::Icmp => {
                self.open.insert(self.sent, now);
                self.sent += 1;
                let request = if self.spec.to.is_ipv4() { 8 } else { 128 };
                let datagram = match self.spec.kind {
                    // Checksum and identifier are the kernel's.
                    Kind::Icmp => [&[request, 0, 0, 0, 0, 0, 0, 1][..], &message].concat(),
                    Kind::Tcp | Kind::Udp => message.into(),
                };
                // A message that cannot be sent is lost like any other, and its fault says why.
                if let Err(error) = self.socket.send(&datagram) {
                    self.blame(format!("sending: {error}"));
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
        self.blame(fault);
        self.is_dead = true;
    }

    fn blame(&mut self, fault: String) {
        self.fault = Some(fault);
        self.faulty_since.get_or_insert_with(Instant::now);
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
                Kind::Icmp => self.take_datagram(bytes.skip(ICMP_HEADER).take(MESSAGE).collect()),
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
            Kind::Udp | Kind::Icmp => self.blame(format!("receiving: {error}")),
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
        // A silence in the middle was noted when it ended.
        let is_silent = match self.spec.kind {
            Kind::Tcp => self.answered < self.sent,
            Kind::Udp | Kind::Icmp => self.open.last_key_value().is_some_and(|(number, _)| number + 1 == self.sent),
        };
        if is_silent {
            self.note_gap();
        }
        let Flow { spec, sent, answered, open, longest_gap, fault, faulty_since, .. } = self;
        let since = open.into_values().chain(faulty_since).min();
        FlowReport { spec, sent, answered, longest_gap, since, fault }
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
