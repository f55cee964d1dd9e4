//! Storms: ENIs, addresses and prefixes come and go at random, a reconcile after each, while conversations over everything
//! else go on. None of them may lose a message. A seed replays a storm.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fastrand::Rng;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::flows::{FlowReport, FlowSpec, Flows, Kind};
use crate::lab::{Distribution, Lab};
use crate::layouts::LAYOUTS;
use crate::probe::{self, Bound, Probe};
use crate::vpc::{CreateEni, Eni, EniId, SubnetId};

/// A machine's ENIs at most.
const ENIS: usize = 15;
/// Subnets in which they are put.
const SUBNETS: u8 = 5;
/// The messages of a ping at 1 kHz, and of the quieter conversations.
const FAST: Duration = Duration::from_millis(1);
const SLOW: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(5);
/// After so many operations a plan is asked whether anything is left to do.
const LOOK: usize = 25;

/// What a storm came to.
pub struct Report {
    /// What was done, in order.
    pub operations: Vec<String>,
    /// All conversations, those over ENIs that went included.
    pub flows: Vec<FlowReport>,
    /// Packets dropped by the VPC's source check.
    pub drops: u64,
}

impl Report {
    /// Nothing was lost, and nothing left by a wrong ENI.
    pub fn is_right(&self) -> bool {
        self.drops == 0 && self.flows.iter().all(FlowReport::is_whole)
    }
}

struct Storm {
    lab: Lab,
    rng: Rng,
    subnets: Vec<SubnetId>,
    /// ENIs that come and go, with the conversations over their first addresses.
    guests: BTreeMap<EniId, Flows>,
    /// ENIs that stay; their further addresses may come and go.
    residents: Vec<EniId>,
    /// Addresses and prefixes that were assigned later, with their ENI.
    extras: Vec<(EniId, IpNet)>,
    flows: Vec<FlowReport>,
    operations: Vec<String>,
}

/// One thing that happens to the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Operation {
    Attach,
    Detach,
    Assign,
    AssignPrefix,
    Unassign,
    Move,
}

/// Lets this many operations happen, a reconcile after each.
///
/// # Errors
/// A run fails, an address that should answer does not, or something is left to do after a run.
pub fn play(eniup: &Path, seed: u64, operations: usize, progress: impl Fn(usize)) -> Result<Report> {
    let mut storm = Storm::gather(eniup, seed)?;
    let resident_flows = Flows::start(&storm.lab, &storm.resident_flows()?)?;
    for n in 0..operations {
        storm.strike().with_context(|| format!("seed {seed}, operation {n}: {:?}", storm.operations.last()))?;
        if n % LOOK == 0 {
            progress(n);
            storm.look().with_context(|| format!("seed {seed}, after operation {n}"))?;
        }
    }
    storm.look()?;
    for (_, flows) in std::mem::take(&mut storm.guests) {
        storm.flows.extend(flows.finish());
    }
    storm.flows.extend(resident_flows.finish());
    let drops = storm.lab.fabric.source_drops();
    Ok(Report { operations: storm.operations, flows: storm.flows, drops })
}

fn address6(subnet: u8, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2600, 0x1f16, 0x67f, 0xf200 + u16::from(subnet), 0, 0, 0, host)
}

impl Storm {
    /// An instance with a primary and two more ENIs that stay, one of them in the primary's subnet; and clients.
    fn gather(eniup: &Path, seed: u64) -> Result<Storm> {
        let mut lab = Lab::new(eniup)?;
        let subnets = lab.fabric.world(|world| -> Result<Vec<SubnetId>> {
            let vpc = world.create_vpc(&["10.0.0.0/16".parse()?, "2600:1f16:67f:f200::/56".parse()?]);
            (0..SUBNETS)
                .map(|n| {
                    let ipv4 = Ipv4Net::new(Ipv4Addr::new(10, 0, n, 0), 24)?;
                    world.create_subnet(&vpc, Some(ipv4), &[Ipv6Net::new(address6(n, 0), 64)?])
                })
                .collect()
        })?;
        let create = |subnet: u8, hosts: &[u8]| CreateEni {
            subnet: subnets[usize::from(subnet)].clone(),
            ipv4s: hosts.iter().map(|host| Ipv4Addr::new(10, 0, subnet, *host)).collect(),
            ipv6s: vec![address6(subnet, hosts[0].into())],
            ..CreateEni::default()
        };
        let residents: Vec<EniId> = [create(0, &[10, 11]), create(1, &[20, 21]), create(0, &[30])]
            .into_iter()
            .map(|create| lab.create_network_interface(create))
            .collect::<Result<_>>()?;
        lab.elastic_ip(&residents[1], None)?;
        lab.run_instance("web", &residents, "m7i.24xlarge", Distribution::Primary)?;
        for (name, subnet) in [("client0", 0), ("client1", 1), ("client4", 4)] {
            let eni = lab.create_network_interface(create(subnet, &[100]))?;
            lab.run_instance(name, &[eni], "t3.micro", Distribution::Primary)?;
        }
        lab.add_internet_host("internet", Some([198, 51, 100, 7].into()), None)?;
        let storm = Storm {
            lab,
            rng: Rng::with_seed(seed),
            subnets,
            guests: BTreeMap::new(),
            residents,
            extras: Vec::new(),
            flows: Vec::new(),
            operations: Vec::new(),
        };
        storm.reconcile()?;
        Ok(storm)
    }

    /// Long-lived streams and pings over every address that stays, and out of the instance. One ping of each ENI is fast, or
    /// the conversations would need more of the machine than it has.
    fn resident_flows(&self) -> Result<Vec<FlowSpec>> {
        let world = self.lab.world();
        let mut specs = Vec::new();
        for eni in &self.residents {
            for (n, address) in world.eni(eni)?.addresses().into_iter().enumerate() {
                specs.push(flow("client4", address, Kind::Udp, if n == 0 { FAST } else { SLOW }));
                specs.push(flow("client1", address, Kind::Tcp, SLOW));
            }
        }
        for (public, _) in world.associations_of(&self.residents[1]) {
            specs.push(flow("internet", public.into(), Kind::Tcp, SLOW));
        }
        specs.push(flow("web", IpAddr::from([10, 0, 4, 100]), Kind::Udp, FAST));
        let own = IpAddr::from([10, 0, 1, 21]);
        let to = IpAddr::from([10, 0, 0, 100]);
        specs.push(FlowSpec { bound: Bound::Address(own), ..flow("web", to, Kind::Tcp, SLOW) });
        Ok(specs)
    }

    fn strike(&mut self) -> Result<()> {
        let operation = self.choose();
        let address = self.carry_out(operation)?;
        self.reconcile()?;
        match (operation, address) {
            (_, None) => Ok(()),
            (Operation::Attach, Some((eni, address))) => {
                let specs = [Kind::Udp, Kind::Tcp].map(|kind| flow("client4", address, kind, SLOW));
                self.guests.insert(eni, Flows::start(&self.lab, &specs)?);
                Ok(())
            }
            (_, Some((_, address))) => self.assert_answers(address),
        }
    }

    /// One of those that are possible now.
    fn choose(&mut self) -> Operation {
        loop {
            let all = [
                Operation::Attach,
                Operation::Attach,
                Operation::Detach,
                Operation::Assign,
                Operation::Assign,
                Operation::AssignPrefix,
                Operation::Unassign,
                Operation::Move,
            ];
            let operation = all[self.rng.usize(..all.len())];
            let is_possible = match operation {
                Operation::Attach => self.residents.len() + self.guests.len() < ENIS,
                Operation::Detach => !self.guests.is_empty(),
                Operation::Assign | Operation::AssignPrefix => self.extras.len() < 60,
                Operation::Unassign => !self.extras.is_empty(),
                Operation::Move => self.movable().is_some(),
            };
            if is_possible {
                return operation;
            }
        }
    }

    /// Does it, and gives the ENI and address that should answer afterwards.
    fn carry_out(&mut self, operation: Operation) -> Result<Option<(EniId, IpAddr)>> {
        match operation {
            Operation::Attach => self.attach().map(Some),
            Operation::Detach => self.detach().map(|()| None),
            Operation::Assign => self.assign().map(Some),
            Operation::AssignPrefix => self.assign_prefix().map(|()| None),
            Operation::Unassign => {
                let (eni, source) = self.extras.swap_remove(self.rng.usize(..self.extras.len()));
                self.operations.push(format!("unassign {source} from {eni}"));
                self.lab.unassign(&eni, &[source]).map(|()| None)
            }
            Operation::Move => self.move_address().map(Some),
        }
    }

    fn attach(&mut self) -> Result<(EniId, IpAddr)> {
        let subnet = self.rng.u8(..SUBNETS);
        let host = self.free_host(subnet)?;
        let ipv6s = if self.rng.bool() { vec![address6(subnet, host.into())] } else { Vec::new() };
        let ipv4s = vec![Ipv4Addr::new(10, 0, subnet, host)];
        let create =
            CreateEni { subnet: self.subnets[usize::from(subnet)].clone(), ipv4s, ipv6s, ..CreateEni::default() };
        let eni = self.lab.create_network_interface(create)?;
        let world = self.lab.world();
        let (_, instance) = self.lab.instances().find(|(name, _)| *name == "web").context("web is there")?;
        let taken: Vec<u32> = world
            .enis_of(instance)
            .iter()
            .filter_map(|eni| eni.attachment.as_ref().map(|at| at.device_number))
            .collect();
        let free: Vec<u32> = (1..ENIS as u32 + 5).filter(|device| !taken.contains(device)).collect();
        let device = free[self.rng.usize(..free.len())];
        self.operations.push(format!("attach {eni} (10.0.{subnet}.{host}) at {device}"));
        self.lab.attach_network_interface(&eni, "web", 0, device)?;
        Ok((eni, IpAddr::from([10, 0, subnet, host])))
    }

    fn detach(&mut self) -> Result<()> {
        let guests: Vec<EniId> = self.guests.keys().cloned().collect();
        let eni = guests[self.rng.usize(..guests.len())].clone();
        self.operations.push(format!("detach {eni}"));
        if let Some(flows) = self.guests.remove(&eni) {
            self.flows.extend(flows.finish());
        }
        self.extras.retain(|(owner, _)| *owner != eni);
        self.lab.detach_network_interface(&eni)?;
        self.lab.delete_network_interface(&eni)
    }

    fn assign(&mut self) -> Result<(EniId, IpAddr)> {
        let (eni, subnet) = self.any_eni()?;
        let host = self.free_host(subnet)?;
        let address = match self.rng.bool() {
            true => IpAddr::from([10, 0, subnet, host]),
            false => IpAddr::from(address6(subnet, 0x1000 + u16::from(host))),
        };
        self.operations.push(format!("assign {address} to {eni}"));
        self.lab.assign(&eni, &[address.into()], false)?;
        self.extras.push((eni.clone(), address.into()));
        Ok((eni, address))
    }

    fn assign_prefix(&mut self) -> Result<()> {
        let (eni, subnet) = self.any_eni()?;
        // Sixteen of the upper half of each subnet, where no single address is taken.
        let prefix: IpNet = Ipv4Net::new(Ipv4Addr::new(10, 0, subnet, 128 + 16 * self.rng.u8(..7)), 28)?.into();
        if self.extras.iter().any(|(_, taken)| *taken == prefix) {
            self.operations.push(format!("{prefix} is taken"));
            return Ok(());
        }
        self.operations.push(format!("assign {prefix} to {eni}"));
        self.lab.assign(&eni, &[prefix], false)?;
        self.extras.push((eni, prefix));
        Ok(())
    }

    /// An address that came later, and another ENI of its subnet.
    fn movable(&self) -> Option<(usize, EniId)> {
        let world = self.lab.world();
        self.extras.iter().enumerate().find_map(|(n, (owner, source))| {
            let is_address = source.prefix_len() == 32 && source.addr().is_ipv4();
            let subnet = &world.eni(owner).ok()?.subnet;
            let all = self.residents.iter().chain(self.guests.keys());
            let mut others = all.filter(|eni| *eni != owner && world.eni(eni).is_ok_and(|eni| eni.subnet == *subnet));
            is_address.then(|| others.next().cloned()).flatten().map(|to| (n, to))
        })
    }

    fn move_address(&mut self) -> Result<(EniId, IpAddr)> {
        let (n, to) = self.movable().context("something can move")?;
        let (from, source) = self.extras.swap_remove(n);
        self.operations.push(format!("move {source} from {from} to {to}"));
        self.lab.assign(&to, &[source], true)?;
        self.extras.push((to.clone(), source));
        Ok((to, source.addr()))
    }

    fn any_eni(&mut self) -> Result<(EniId, u8)> {
        let all: Vec<EniId> = self.residents.iter().chain(self.guests.keys()).cloned().collect();
        let id = all[self.rng.usize(..all.len())].clone();
        let world = self.lab.world();
        let Eni { ipv4s, .. } = world.eni(&id)?;
        let [_, _, subnet, _] = ipv4s.first().context("every ENI here has an IPv4 address")?.octets();
        Ok((id, subnet))
    }

    /// A host number of the lower half of a subnet that nobody has, of either family.
    fn free_host(&mut self, subnet: u8) -> Result<u8> {
        let world = self.lab.world();
        let is_free = |host: &u8| {
            let of_host = [
                IpAddr::from([10, 0, subnet, *host]),
                address6(subnet, (*host).into()).into(),
                address6(subnet, 0x1000 + u16::from(*host)).into(),
            ];
            !world.enis.values().any(|eni| of_host.iter().any(|address| eni.owns(*address)))
        };
        let free: Vec<u8> = (4..128).filter(is_free).collect();
        ensure!(!free.is_empty(), "subnet {subnet} is full");
        Ok(free[self.rng.usize(..free.len())])
    }

    fn assert_answers(&self, address: IpAddr) -> Result<()> {
        let from = "client4".to_string();
        let probe = Probe { from, bound: Bound::Nothing, to: address, kind: probe::Kind::Udp };
        let outcome = self.lab.probe(&[probe], PATIENCE)?.remove(0);
        ensure!(outcome.is_answer_of(address), "{address}: {outcome}; {:#?}", self.lab.fabric.last_drops());
        Ok(())
    }

    fn reconcile(&self) -> Result<()> {
        self.eniup(&["reconcile", "--timeout", "10s"])
    }

    /// Nothing is left to do.
    fn look(&self) -> Result<()> {
        self.eniup(&["plan", "--detailed-exitcode"])
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

fn flow(from: &str, to: IpAddr, kind: Kind, every: Duration) -> FlowSpec {
    FlowSpec { from: from.into(), bound: Bound::Nothing, to, kind, every }
}

/// A NAT box that forwards this many conversations of a private subnet while ENIs come and go.
///
/// # Errors
/// A run fails.
pub fn nat_box(eniup: &Path, conversations: usize, rounds: u32) -> Result<Report> {
    let layout = LAYOUTS.iter().find(|layout| layout.name == "nat-box").context("there is a NAT box's layout")?;
    let stage = (layout.build)(eniup)?;
    let mut lab = stage.scene.lab;
    let reconcile = |lab: &Lab| -> Result<()> {
        let output = lab.eniup("web", &["reconcile"])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    reconcile(&lab)?;
    lab.fabric.forget_drops();
    let spec = |n: usize| {
        // One in ten is a stream; each of the others is a ping of its own port.
        let kind = if n.is_multiple_of(10) { Kind::Tcp } else { Kind::Udp };
        flow("client3", IpAddr::from([198, 51, 100, 7]), kind, Duration::from_millis(500))
    };
    let specs: Vec<FlowSpec> = (0..conversations).map(spec).collect();
    let flows = Flows::start(&lab, &specs)?;
    let mut operations = Vec::new();
    for round in 0..rounds {
        for subnet in [0u8, 1, 3] {
            let world = lab.world();
            let net = Ipv4Net::new(Ipv4Addr::new(10, 0, subnet, 0), 24)?;
            let of_net = world.subnets.iter().find(|(_, subnet)| subnet.ipv4 == Some(net)).map(|(id, _)| id.clone());
            let ipv4s = vec![Ipv4Addr::new(10, 0, subnet, 90)];
            let create = CreateEni { subnet: of_net.context("the subnet is there")?, ipv4s, ..CreateEni::default() };
            let eni = lab.create_network_interface(create)?;
            lab.attach_network_interface(&eni, "web", 0, 5 + round % 3)?;
            reconcile(&lab)?;
            lab.detach_network_interface(&eni)?;
            reconcile(&lab)?;
            lab.delete_network_interface(&eni)?;
            operations.push(format!("an ENI came to subnet {subnet} and went"));
        }
    }
    Ok(Report { operations, flows: flows.finish(), drops: lab.fabric.source_drops() })
}
