//! Storms: ENIs, addresses and prefixes come and go as a script says, a reconcile after each, while conversations over
//! everything else go on. None of them may lose a message. A seed replays a storm.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::flows::{FlowId, FlowReport, FlowSpec, Flows, Kind};
use crate::kernel;
use crate::lab::{Distribution, Lab};
use crate::layouts::LAYOUTS;
use crate::probe::{self, Bound, Probe};
use crate::script::{CLIENT, IPV6_ONLY, Machine, Operation, SUBNETS, Script, ScriptedEni, ipv4, ipv6, is_address};
use crate::vpc::{CreateEni, EniId, SubnetId};

/// From one message to the next: of the pings near what happens, while eniup is at work; of all others, and of streams. The lab
/// carries some 30,000 messages a second on two processors, which is not enough for a thousand over every address.
const FAST: Duration = Duration::from_millis(1);
const SLOW: Duration = Duration::from_millis(20);
/// How long an address that has gone is given to answer after all.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long the end of a stream may take to be known at its other end.
const SETTLED: Duration = Duration::from_secs(5);
/// After so many operations a plan is asked whether anything is left to do, and what has gone whether it answers.
const LOOK: usize = 25;
/// What eniup marks as its own, and the table of an ENI at device 0 of card 0.
const MARK: u8 = 176;
const FIRST_TABLE: u32 = 20_000;

/// What a storm came to.
pub struct Report {
    /// What was done, in order.
    pub operations: Vec<String>,
    /// All conversations, those over what went included.
    pub flows: Vec<FlowReport>,
    /// Packets dropped by the VPC's source check.
    pub drops: u64,
    pub rate: Rate,
    /// What the lab itself has lost to full queues: it explains a lost message, and excuses none.
    pub overflows: Vec<String>,
    /// When each operation began.
    begun: Vec<Instant>,
}

impl Report {
    /// Nothing was lost, and nothing left by a wrong ENI.
    pub fn is_right(&self) -> bool {
        self.drops == 0 && self.flows.iter().all(FlowReport::is_whole)
    }

    /// The conversations that have lost anything, each with the operation during which that began, and the lab's full queues.
    pub fn broken(&self) -> Vec<String> {
        let told = |flow: &FlowReport| {
            let during = flow.since.map(|since| self.begun.partition_point(|begun| *begun <= since));
            match during.and_then(|n| n.checked_sub(1)) {
                Some(n) => format!("{flow}; since operation {n}: {}", self.operations[n]),
                None => flow.to_string(),
            }
        };
        let mut broken: Vec<String> = self.flows.iter().filter(|flow| !flow.is_whole()).map(told).collect();
        if !broken.is_empty() {
            broken.extend(self.overflows.iter().map(|full| format!("a queue of the lab was full: {full}")));
        }
        broken
    }
}

/// What the pings that should be fast have really sent while eniup was at work.
#[derive(Clone, Copy, Default, Debug)]
pub struct Rate {
    sent: u64,
    /// Seconds, of each of them.
    seconds: f64,
}

impl Rate {
    /// Messages a second over each address.
    pub fn per_second(&self) -> f64 {
        self.sent as f64 / self.seconds
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "{} messages of fast pings during reconciles, {:.0}/s over each address",
            self.sent,
            self.per_second()
        )
    }
}

struct Storm {
    lab: Lab,
    subnets: Vec<SubnetId>,
    /// What has happened so far, and the VPC's names of its ENIs.
    machine: Machine,
    enis: BTreeMap<usize, EniId>,
    flows: Flows,
    /// The conversations over each address or prefix: its ping, then the others.
    over: BTreeMap<IpNet, Vec<FlowId>>,
    /// Pings that use no address in particular.
    unbound: Vec<FlowId>,
    /// What went since the last look.
    gone: Vec<IpNet>,
    ended: Vec<FlowReport>,
    drops: u64,
    rate: Rate,
}

/// Lets this many operations happen, a reconcile after each.
///
/// # Errors
/// A run fails, an address that should answer does not, something is left of what went, a conversation falls silent, or
/// something is left to do after a run.
pub fn play(eniup: &Path, seed: u64, operations: usize, progress: impl Fn(usize)) -> Result<Report> {
    let script = Script::write(seed, operations);
    let mut storm = Storm::launch(eniup, &script.launch).with_context(|| format!("seed {seed}, launch"))?;
    let mut begun = Vec::new();
    for (n, operation) in script.operations.iter().enumerate() {
        begun.push(Instant::now());
        storm.strike(operation).with_context(|| format!("seed {seed}, operation {n}: {operation}"))?;
        if (n + 1) % LOOK == 0 {
            progress(n + 1);
            storm.look().with_context(|| format!("seed {seed}, after operation {n}"))?;
        }
    }
    storm.look()?;
    storm.count_drops()?;
    let Storm { lab, flows, mut ended, drops, rate, .. } = storm;
    ended.extend(flows.finish());
    let operations = script.operations.iter().map(Operation::to_string).collect();
    Ok(Report { operations, flows: ended, drops, rate, overflows: lab.overflows()?, begun })
}

impl Storm {
    /// The instance with the ENIs of its launch, a client in each subnet and one in the internet; all conversations begin.
    fn launch(eniup: &Path, launch: &[ScriptedEni]) -> Result<Storm> {
        let mut lab = Lab::new(eniup)?;
        let subnets = lab.fabric.world(|world| -> Result<Vec<SubnetId>> {
            let vpc = world.create_vpc(&["10.0.0.0/16".parse()?, "2600:1f16:67f:f200::/56".parse()?]);
            let create = |n| {
                let ipv4 = (n != IPV6_ONLY).then(|| Ipv4Net::new(ipv4(n, 0), 24)).transpose()?;
                world.create_subnet(&vpc, ipv4, &[Ipv6Net::new(ipv6(n, 0), 64)?])
            };
            (0..SUBNETS).map(create).collect()
        })?;
        for (n, subnet) in (0..).zip(subnets.iter().cloned()) {
            let is_ipv6_only = n == IPV6_ONLY;
            let ipv4s = if is_ipv6_only { Vec::new() } else { vec![ipv4(n, CLIENT)] };
            let ipv6s = vec![ipv6(n, CLIENT.into())];
            let create = CreateEni { subnet, ipv4s, ipv6s, is_ipv6_only, ..CreateEni::default() };
            let eni = lab.create_network_interface(create)?;
            lab.run_instance(&client(n), &[eni], "t3.micro", Distribution::Primary)?;
        }
        lab.add_internet_host("internet", Some([198, 51, 100, 7].into()), None)?;
        let (machine, enis) = (Machine::default(), BTreeMap::new());
        let (flows, over, unbound) = (Flows::start(&lab, &[])?, BTreeMap::new(), Vec::new());
        let (gone, ended, drops, rate) = (Vec::new(), Vec::new(), 0, Rate::default());
        let mut storm = Storm { lab, subnets, machine, enis, flows, over, unbound, gone, ended, drops, rate };
        for eni in launch {
            storm.create(eni)?;
            storm.machine.apply(&Operation::Attach(eni.clone()));
        }
        let ids: Vec<EniId> = storm.enis.values().cloned().collect();
        storm.lab.run_instance("web", &ids, "m7i.48xlarge", Distribution::Primary)?;
        storm.eniup(&["reconcile"])?;
        storm.converse_unbound(&ids[0])?;
        let sources: Vec<IpNet> = storm.machine.sources().collect();
        sources.into_iter().try_for_each(|source| storm.converse(source))?;
        Ok(storm)
    }

    fn create(&mut self, eni: &ScriptedEni) -> Result<()> {
        let of =
            |is_ipv4: bool| eni.sources.iter().map(IpNet::addr).filter(move |address| address.is_ipv4() == is_ipv4);
        let ipv4s: Vec<_> =
            of(true).filter_map(|address| if let IpAddr::V4(v4) = address { Some(v4) } else { None }).collect();
        let ipv6s =
            of(false).filter_map(|address| if let IpAddr::V6(v6) = address { Some(v6) } else { None }).collect();
        let subnet = self.subnets[usize::from(eni.subnet)].clone();
        let is_ipv6_only = ipv4s.is_empty();
        let create = CreateEni { subnet, ipv4s, ipv6s, is_ipv6_only, ..CreateEni::default() };
        let id = self.lab.create_network_interface(create)?;
        self.enis.insert(eni.number, id);
        Ok(())
    }

    /// What uses no address in particular, in both directions and families, and the way from and to the internet.
    fn converse_unbound(&mut self, primary: &EniId) -> Result<()> {
        let public = self.lab.elastic_ip(primary, None)?;
        let specs = [
            flow("web", ipv4(1, CLIENT), Kind::Udp, SLOW),
            flow("web", ipv6(IPV6_ONLY, CLIENT.into()), Kind::Udp, SLOW),
            flow("web", [198, 51, 100, 7], Kind::Udp, SLOW),
            flow("web", ipv4(2, CLIENT), Kind::Tcp, SLOW),
            flow("internet", public, Kind::Tcp, SLOW),
        ];
        let ids = self.flows.add(&self.lab, &specs)?;
        self.unbound = ids[..3].to_vec();
        Ok(())
    }

    /// Begins the conversations over an address, or over one of a prefix by a container that has it; that they begin says
    /// that it answers.
    fn converse(&mut self, source: IpNet) -> Result<()> {
        let (address, node) = match is_address(&source) {
            true => (source.addr(), "web".to_string()),
            false => (first_of(source), pod(source)),
        };
        if !is_address(&source) {
            self.lab.add_pod(&node, "web", &[address])?;
        }
        // The ping from one subnet; the stream from another one, or out of the machine to there.
        let number = host_number(address);
        let clients = if address.is_ipv4() { IPV6_ONLY } else { SUBNETS };
        let (near, far) = (number % clients, (number + 2) % clients);
        let to = if address.is_ipv4() { IpAddr::from(ipv4(far, CLIENT)) } else { ipv6(far, CLIENT.into()).into() };
        let stream = match number % 2 {
            0 => flow(&client(far), address, Kind::Tcp, SLOW),
            _ => FlowSpec { bound: Bound::Address(address), ..flow(&node, to, Kind::Tcp, SLOW) },
        };
        let specs = [flow(&client(near), address, Kind::Udp, SLOW), stream];
        let ids = self.flows.add(&self.lab, &specs).with_context(|| format!("conversing over {source}"))?;
        self.over.insert(source, ids);
        Ok(())
    }

    /// Ends the conversations over what is about to go.
    fn fall_silent(&mut self, source: IpNet) -> Result<()> {
        let ids = self.over.remove(&source).with_context(|| format!("there are conversations over {source}"))?;
        self.ended.extend(self.flows.end(ids));
        if is_address(&source) { Ok(()) } else { self.lab.remove_pod(&pod(source)) }
    }

    /// Until the other side of every stream that ended knows it: it would otherwise go on sending to what has gone by then.
    fn settle(&self) -> Result<()> {
        let deadline = Instant::now() + SETTLED;
        loop {
            let streams = self.flows.progress().values().filter(|flow| flow.kind == Kind::Tcp).count();
            let served = self.lab.streams();
            if streams == served {
                // Nor is anything of them still on its way out.
                self.lab.fabric.drain();
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{served} streams are served, though there are {streams}");
        }
    }

    fn strike(&mut self, operation: &Operation) -> Result<()> {
        for source in self.machine.leaving(operation) {
            self.fall_silent(source)?;
        }
        self.settle()?;
        // Since the last operation, the conversations that began and the looks included.
        self.count_drops()?;
        let knocks = self.knock(operation)?;
        self.carry_out(operation)?;
        let fast = self.near(operation);
        self.flows.pace(fast.clone(), FAST);
        self.reconcile(&fast)?;
        self.flows.pace(fast, SLOW);
        self.flows.forget(knocks);
        self.lab.fabric.drain();
        self.count_drops()?;
        self.assert_gone(operation)?;
        self.gone.extend(self.machine.leaving(operation));
        self.machine.apply(operation);
        Machine::coming(operation).into_iter().try_for_each(|source| self.converse(source))
    }

    /// The pings near the operation, and those that use no address in particular.
    fn near(&self, operation: &Operation) -> Vec<FlowId> {
        let pings =
            self.machine.near(operation).into_iter().filter_map(|source| self.over.get(&source)?.first().copied());
        pings.chain(self.unbound.iter().copied()).collect()
    }

    /// Somebody asks for an address that comes, from before it does: an answer that leaves by another ENI is seen as a drop.
    fn knock(&mut self, operation: &Operation) -> Result<Vec<FlowId>> {
        let sources = match operation {
            Operation::Attach(eni) => eni.sources.clone(),
            Operation::Assign { source, .. } if is_address(source) => vec![*source],
            // Until eniup has heard of a move, the other ENI answers by its own way.
            Operation::Assign { .. }
            | Operation::Unassign { .. }
            | Operation::Detach { .. }
            | Operation::Move { .. } => Vec::new(),
        };
        let spec = |source: &IpNet| {
            let clients = if source.addr().is_ipv4() { IPV6_ONLY } else { SUBNETS };
            flow(&client((host_number(source.addr()) + 1) % clients), source.addr(), Kind::Udp, FAST)
        };
        let specs: Vec<FlowSpec> = sources.iter().map(spec).collect();
        self.flows.knock(&self.lab, &specs)
    }

    /// Packets that the source check dropped since this was asked last. A machine that forwards for containers sends on what
    /// is for an address that it does not have yet, at once or when ARP has an answer: with its sender's address that is no
    /// fault.
    fn count_drops(&mut self) -> Result<()> {
        let fabric = &self.lab.fabric;
        self.drops += fabric.own_source_drops();
        ensure!(self.drops == 0, "a wrong source: {:#?}", fabric.last_drops());
        fabric.forget_drops();
        Ok(())
    }

    /// EC2's part.
    fn carry_out(&mut self, operation: &Operation) -> Result<()> {
        match operation {
            Operation::Attach(eni) => {
                self.create(eni)?;
                self.lab.attach_network_interface(&self.enis[&eni.number], "web", 0, eni.device)
            }
            Operation::Detach { eni } => {
                let id = self.enis.remove(eni).context("it is attached")?;
                self.lab.detach_network_interface(&id)?;
                self.lab.delete_network_interface(&id)
            }
            Operation::Assign { eni, source } => self.lab.assign(&self.enis[eni], &[*source], false),
            Operation::Unassign { eni, source } => self.lab.unassign(&self.enis[eni], &[*source]),
            Operation::Move { source, from: _, to } => self.lab.assign(&self.enis[to], &[*source], true),
        }
    }

    /// Counts what the fast ones send meanwhile. Every conversation goes on during it and after it.
    fn reconcile(&mut self, fast: &[FlowId]) -> Result<()> {
        let before = self.flows.progress();
        let begun = Instant::now();
        self.eniup(&["reconcile", "--timeout", "10s"])?;
        let seconds = begun.elapsed().as_secs_f64();
        let after = self.flows.progress();
        self.rate.sent += fast.iter().map(|id| after[id].sent - before[id].sent).sum::<u64>();
        self.rate.seconds += seconds * fast.len() as f64;
        self.flows.go_on(1)
    }

    /// No address that went is on the machine, nor a rule of eniup's for it; of an ENI neither a table.
    fn assert_gone(&self, operation: &Operation) -> Result<()> {
        let (gone, table) = match operation {
            Operation::Attach(_) | Operation::Assign { .. } | Operation::Move { .. } => return Ok(()),
            Operation::Unassign { source, .. } => (vec![*source], None),
            Operation::Detach { eni } => {
                let ScriptedEni { device, sources, .. } = &self.machine.enis[eni];
                (sources.clone(), Some(FIRST_TABLE + device))
            }
        };
        let left = self.lab.node("web")?.enter(|| kernel::traces(MARK, &gone, table))?;
        ensure!(left.is_empty(), "left of it: {left:#?}");
        Ok(())
    }

    /// Nothing is left to do, and what went does not answer: neither to others nor on the machine itself.
    fn look(&mut self) -> Result<()> {
        self.eniup(&["plan", "--detailed-exitcode"])?;
        let mut gone = std::mem::take(&mut self.gone);
        gone.retain(|source| self.machine.sources().all(|own| own != *source));
        let probe = |from: &str, source: &IpNet| {
            let to = if is_address(source) { source.addr() } else { first_of(*source) };
            Probe { from: from.into(), bound: Bound::Nothing, to, kind: probe::Kind::Udp }
        };
        let probes: Vec<Probe> =
            gone.iter().flat_map(|source| [probe("client0", source), probe("web", source)]).collect();
        let outcomes = self.lab.probe(&probes, PATIENCE)?;
        let answered = probes.iter().zip(&outcomes).find(|(_, outcome)| outcome.seen().is_some());
        ensure!(answered.is_none(), "it answers, though it has gone: {answered:?}");
        Ok(())
    }

    fn eniup(&self, arguments: &[&str]) -> Result<()> {
        let output = self.lab.eniup("web", arguments)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            bail!("eniup {arguments:?} ({}):\n{said}", output.status);
        }
        Ok(())
    }
}

fn flow(from: &str, to: impl Into<IpAddr>, kind: Kind, every: Duration) -> FlowSpec {
    FlowSpec { from: from.into(), bound: Bound::Nothing, to: to.into(), kind, every }
}

fn client(subnet: u8) -> String {
    format!("client{subnet}")
}

fn pod(prefix: IpNet) -> String {
    format!("pod of {}", prefix.addr())
}

/// The address of a prefix that a container has.
fn first_of(prefix: IpNet) -> IpAddr {
    match prefix {
        IpNet::V4(net) => Ipv4Addr::from(u32::from(net.network()) + 1).into(),
        IpNet::V6(net) => Ipv6Addr::from(u128::from(net.network()) + 1).into(),
    }
}

/// What tells addresses of a subnet apart.
fn host_number(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(address) => address.octets()[3],
        IpAddr::V6(address) => address.octets()[15],
    }
}

/// Each conversation of a NAT box has this many answers before anything happens and after all has happened, and one more with
/// each ENI that comes and with each that goes.
const ANSWERS: u64 = 5;

/// A NAT box that forwards this many conversations of a private subnet while ENIs come and go.
///
/// # Errors
/// A run fails, or a conversation falls silent.
pub fn nat_box(eniup: &Path, conversations: usize, rounds: u32) -> Result<Report> {
    let layout = LAYOUTS.iter().find(|layout| layout.name == "nat-box").context("there is a NAT box's layout")?;
    let mut lab = (layout.build)(eniup)?.scene.lab;
    reconcile_nat_box(&lab)?;
    lab.fabric.forget_drops();
    // One in ten is a stream; each of the others is a ping of its own port.
    let kind = |n: usize| if n.is_multiple_of(10) { Kind::Tcp } else { Kind::Udp };
    let every = Duration::from_millis(200);
    let specs: Vec<FlowSpec> = (0..conversations).map(|n| flow("client3", [198, 51, 100, 7], kind(n), every)).collect();
    let flows = Flows::start(&lab, &specs)?;
    flows.go_on(ANSWERS)?;
    let (mut operations, mut begun) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        for subnet in [0u8, 1, 3] {
            begun.push(Instant::now());
            operations.push(format!("an ENI comes to subnet {subnet} and goes"));
            come_and_go(&mut lab, &flows, subnet, 5 + round % 3).with_context(|| operations.join(", "))?;
        }
    }
    flows.go_on(ANSWERS)?;
    let flows = flows.finish();
    let (drops, overflows) = (lab.fabric.source_drops(), lab.overflows()?);
    Ok(Report { operations, flows, drops, rate: Rate::default(), overflows, begun })
}

fn come_and_go(lab: &mut Lab, flows: &Flows, subnet: u8, device: u32) -> Result<()> {
    let net = Ipv4Net::new(ipv4(subnet, 0), 24)?;
    let world = lab.world();
    let of_net = world.subnets.iter().find(|(_, subnet)| subnet.ipv4 == Some(net)).map(|(id, _)| id.clone());
    let (subnet, ipv4s) = (of_net.context("the subnet is there")?, vec![ipv4(subnet, 90)]);
    let eni = lab.create_network_interface(CreateEni { subnet, ipv4s, ..CreateEni::default() })?;
    lab.attach_network_interface(&eni, "web", 0, device)?;
    reconcile_nat_box(lab)?;
    flows.go_on(1)?;
    lab.detach_network_interface(&eni)?;
    reconcile_nat_box(lab)?;
    flows.go_on(1)?;
    lab.delete_network_interface(&eni)
}

fn reconcile_nat_box(lab: &Lab) -> Result<()> {
    let output = lab.eniup("web", &["reconcile"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
