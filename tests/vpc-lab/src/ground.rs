//! An instance for trials: ENIs that stay and ENIs that come and go, with clients that talk to it, somebody else's objects
//! in its kernel, and EC2's verbs chosen by chance. The same seed does the same.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use ipnet::{IpNet, Ipv4Net};

use crate::flows::{self, FlowSpec};
use crate::imds::Faults;
use crate::kernel::{self, Rule};
use crate::lab::{Distribution, Lab};
use crate::metadata::Propagation;
use crate::probe::{Bound, Kind, Outcome, Probe};
use crate::trouble::Trouble;
use crate::vpc::{CreateEni, EniId, Port};

/// eniup's mark, which its documents promise.
const MARK: u8 = 176;

/// A mark that nobody has.
const NOBODY: u8 = 177;

/// An exchange that is not answered within this time never will be.
const PATIENCE: Duration = Duration::from_secs(2);

/// What may be assigned beside the addresses that the ENIs were made with, each to one of those that stay.
const EXTRAS: [(usize, &str); 6] = [
    (0, "10.0.0.15/32"),
    (1, "10.0.1.25/32"),
    (2, "10.0.1.35/32"),
    (2, "10.0.1.64/28"),
    (1, "2600:1f16:67f:f201::25/128"),
    (2, "2600:1f16:67f:f201::35/128"),
];

/// An address that moves between the two ENIs of one subnet.
const WANDERER: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 40);

pub struct Ground {
    pub lab: Lab,
    /// The instance under test.
    pub name: String,
    /// A client in a subnet of its own, and one in the subnet that two ENIs share.
    pub clients: [String; 2],
    /// The primary, and two in one subnet.
    lasting: Vec<EniId>,
    /// One in a third subnet, one more in the shared one.
    guests: Vec<EniId>,
    /// Somebody else's objects, from before the first run.
    foreign: BTreeSet<String>,
}

impl Ground {
    /// Several can be in one sandbox, each with a number of its own.
    ///
    /// # Errors
    /// The machine lacks what a lab needs.
    pub fn build(eniup: &Path, number: usize) -> Result<Ground> {
        let mut lab = Lab::new(eniup)?;
        let subnets = lab.fabric.world(|world| -> Result<Vec<String>> {
            let vpc = world.create_vpc(&["10.0.0.0/16".parse()?, "2600:1f16:67f:f200::/56".parse()?]);
            let subnet = |n: u8| {
                let ipv6 = format!("2600:1f16:67f:f20{n}::/64").parse()?;
                world.create_subnet(&vpc, Some(Ipv4Net::new(Ipv4Addr::new(10, 0, n, 0), 24)?), &[ipv6])
            };
            (0..4).map(subnet).collect()
        })?;
        let eni = |lab: &mut Lab, net: u8, hosts: &[u8]| -> Result<EniId> {
            let ipv6s = hosts.iter().map(|host| Ok(format!("2600:1f16:67f:f20{net}::{host}").parse()?));
            lab.create_network_interface(CreateEni {
                subnet: subnets[usize::from(net)].clone(),
                ipv4s: hosts.iter().map(|host| Ipv4Addr::new(10, 0, net, *host)).collect(),
                ipv6s: ipv6s.collect::<Result<_>>()?,
                ..CreateEni::default()
            })
        };
        let lasting = vec![eni(&mut lab, 0, &[10, 11])?, eni(&mut lab, 1, &[20, 21])?, eni(&mut lab, 1, &[30])?];
        let guests = vec![eni(&mut lab, 2, &[50, 51])?, eni(&mut lab, 1, &[60])?];
        let name = format!("web{number}");
        lab.run_instance(&name, &lasting, "m7i.24xlarge", Distribution::Primary)?;
        let clients = [format!("far{number}"), format!("near{number}")];
        for (client, net) in clients.iter().zip([3, 1]) {
            let eni = eni(&mut lab, net, &[200])?;
            lab.run_instance(client, &[eni], "t3.micro", Distribution::Primary)?;
        }
        let mut ground = Ground { lab, name, clients, lasting, guests, foreign: BTreeSet::new() };
        ground.add_foreign_objects()?;
        Ok(ground)
    }

    fn add_foreign_objects(&mut self) -> Result<()> {
        let (_, link) = self.lab.link_of(&self.lasting[1]).context("the second ENI has no link")?;
        let foreign = self.lab.node(&self.name)?.enter(|| {
            kernel::set_up(link)?;
            kernel::add_address(link, "10.0.1.99/32".parse()?, None)?;
            kernel::add_address("lo", "10.77.0.1/32".parse()?, None)?;
            kernel::add_rule(&Rule::new(false, 30_000, 100))?;
            kernel::add_rule(&Rule::new(true, 20_001, 100))?;
            let route = kernel::Route::new("192.0.2.0/24".parse()?, None, link);
            kernel::add_route(&route)?;
            kernel::add_route(&kernel::Route { table: 20_001, ..route })?;
            kernel::objects_but_of(MARK)
        })?;
        ensure!(foreign.len() > 12, "only {} foreign objects", foreign.len());
        self.foreign = foreign;
        Ok(())
    }

    /// Objects of somebody else that are gone or changed.
    pub fn missing_foreign_objects(&self) -> Result<Vec<String>> {
        let there = self.lab.node(&self.name)?.enter(|| kernel::objects_but_of(MARK))?;
        Ok(self.foreign.difference(&there).cloned().collect())
    }

    /// All addresses, routes and rules of the instance, whoever made them.
    pub fn objects(&self) -> Result<BTreeSet<String>> {
        self.lab.node(&self.name)?.enter(|| kernel::objects_but_of(NOBODY))
    }

    /// Runs the binary under test on the instance.
    pub fn eniup(&self, arguments: &str) -> Result<Output> {
        self.lab.eniup(&self.name, &arguments.split_whitespace().collect::<Vec<_>>())
    }

    /// Metadata lags behind what changes from here on. What it says of this moment is what it will lie about.
    pub fn lag(&self, trouble: &Trouble) -> Result<()> {
        self.lab.service(&self.name)?.remember();
        if let Some(propagation) = &trouble.propagation {
            self.lab.set_propagation(&self.name, propagation.clone())?;
        }
        let macs: Vec<String> = {
            let world = self.lab.world();
            let enis = self.lasting.iter().chain(&self.guests).filter_map(|eni| world.eni(eni).ok());
            enis.map(|eni| eni.mac.to_string()).collect()
        };
        let mut published = self.lab.published(&self.name)?;
        for key in &trouble.held {
            match key {
                Some(key) => published.hold(&format!("*/{key}")),
                None => macs.iter().for_each(|mac| published.hold(&format!("network/interfaces/macs/{mac}"))),
            }
        }
        Ok(())
    }

    /// From here on requests fail and packets are lost.
    pub fn spoil(&self, trouble: &Trouble) -> Result<()> {
        let service = self.lab.service(&self.name)?;
        service.reset_counters();
        service.set_faults(trouble.rules());
        if trouble.loss > 0.0 {
            self.lab.fabric.set_loss(self.metadata_port()?, trouble.loss, trouble.faults.seed);
        }
        Ok(())
    }

    /// Requests that a fault has touched and packets that were lost since [`Self::spoil`].
    pub fn faults(&self) -> Result<u64> {
        Ok(self.lab.service(&self.name)?.requests().faults + self.lab.fabric.lost(&self.metadata_port()?))
    }

    /// Requests are answered as they should be, with what metadata knows by now.
    pub fn cure(&self) -> Result<()> {
        self.lab.fabric.end_loss(&self.metadata_port()?);
        self.lab.service(&self.name)?.set_faults(Faults::default());
        Ok(())
    }

    /// Metadata tells the truth, at once.
    pub fn heal(&self) -> Result<()> {
        self.cure()?;
        self.lab.set_propagation(&self.name, Propagation::default())?;
        let mut published = self.lab.published(&self.name)?;
        published.hold("*");
        published.release("*");
        Ok(())
    }

    fn metadata_port(&self) -> Result<Port> {
        let instance = self.lab.instances().find(|(name, _)| *name == self.name).context("no instance")?.1;
        Ok(Port::Metadata(instance.to_string()))
    }

    /// What of EC2's addresses and prefixes the instance's kernel has: addresses, whoever added them, and prefixes of which
    /// there is a rule or route of eniup's.
    pub fn own(&self) -> Result<BTreeSet<String>> {
        self.lab.node(&self.name)?.enter(|| {
            let addresses = kernel::addresses()?.into_iter().map(|address| address.to_string());
            let mut own: BTreeSet<String> = addresses.collect();
            for (_, extra) in EXTRAS {
                let prefix: IpNet = extra.parse()?;
                if !kernel::traces(MARK, &[prefix], None)?.is_empty() {
                    own.insert(format!("a rule from {prefix}"));
                }
            }
            Ok(own)
        })
    }

    /// The addresses that ENIs of the instance were made with and that never go.
    pub fn lasting_addresses(&self) -> Result<Vec<IpAddr>> {
        let world = self.lab.world();
        let firsts = self.lasting.iter().map(|eni| {
            let own = world.eni(eni)?.addresses();
            let extras = EXTRAS.map(|(_, extra)| extra.split('/').next().and_then(|text| text.parse().ok()));
            let is_lasting = |address: &IpAddr| *address != WANDERER && !extras.contains(&Some(*address));
            Ok(own.into_iter().filter(is_lasting).collect::<Vec<_>>())
        });
        Ok(firsts.collect::<Result<Vec<_>>>()?.concat())
    }

    /// Every address of every attached ENI, in EC2's truth.
    pub fn addresses(&self) -> Vec<(EniId, IpAddr)> {
        let world = self.lab.world();
        let attached = self.lasting.iter().chain(self.guests.iter().filter(|eni| self.is_attached(eni)));
        let attached = attached.filter_map(|eni| world.eni(eni).ok());
        attached.flat_map(|eni| eni.addresses().into_iter().map(|address| (eni.id.clone(), address))).collect()
    }

    fn is_attached(&self, eni: &str) -> bool {
        self.lab.fabric.world(|world| world.eni(eni).is_ok_and(|eni| eni.attachment.is_some()))
    }

    /// Which of these addresses do not answer each client by UDP and TCP.
    pub fn silent(&self, addresses: &[IpAddr]) -> Result<Vec<String>> {
        let probes: Vec<Probe> = addresses
            .iter()
            .flat_map(|to| {
                let of_client = |from: &String| {
                    [Kind::Udp, Kind::Tcp].map(|kind| Probe {
                        from: from.clone(),
                        bound: Bound::Nothing,
                        to: *to,
                        kind,
                    })
                };
                self.clients.iter().flat_map(of_client)
            })
            .collect();
        let is_silent = |(probe, outcome): &(Probe, Outcome)| !outcome.is_answer_of(probe.to);
        let ask = |probes: Vec<Probe>| -> Result<Vec<(Probe, Outcome)>> {
            let outcomes = self.lab.probe(&probes, PATIENCE)?;
            Ok(probes.into_iter().zip(outcomes).filter(is_silent).collect())
        };
        // Once more, as TCP does by itself: the kernel takes up to a second to see the carrier of a link that has just gone
        // up, and has no way to its IPv6 addresses before.
        let again: Vec<Probe> = ask(probes)?.into_iter().map(|(probe, _)| probe).collect();
        let shown =
            |(probe, outcome): (Probe, Outcome)| format!("{} {} → {}: {outcome}", probe.kind, probe.from, probe.to);
        Ok(ask(again)?.into_iter().map(shown).collect())
    }

    /// One TCP conversation a client and lasting address, UDP from one client to each of them, and 1 kHz of it to the first
    /// address of each ENI: what the fabric of a debug build carries without falling behind.
    pub fn flow_specs(&self) -> Result<Vec<FlowSpec>> {
        let spec = |from: &String, to: IpAddr, kind, milliseconds| FlowSpec {
            from: from.clone(),
            bound: Bound::Nothing,
            to,
            kind,
            every: Duration::from_millis(milliseconds),
        };
        let mut specs = Vec::new();
        let world = self.lab.world();
        let is_first = |to: IpAddr| {
            self.lasting.iter().any(|eni| world.eni(eni).is_ok_and(|eni| eni.addresses().first() == Some(&to)))
        };
        for to in self.lasting_addresses()? {
            specs.extend(self.clients.iter().map(|client| spec(client, to, flows::Kind::Tcp, 10)));
            specs.push(spec(&self.clients[0], to, flows::Kind::Udp, if is_first(to) { 1 } else { 10 }));
        }
        Ok(specs)
    }

    /// Those of the primary's first addresses, which the distribution has configured.
    pub fn flow_specs_of_primary(&self) -> Result<Vec<FlowSpec>> {
        let world = self.lab.world();
        let primary = world.eni(&self.lasting[0])?;
        let first = [primary.ipv4s.first().map(|a| IpAddr::from(*a)), primary.ipv6s.first().map(|a| IpAddr::from(*a))];
        Ok(self.flow_specs()?.into_iter().filter(|spec| first.contains(&Some(spec.to))).collect())
    }

    /// One of EC2's verbs; what was done.
    pub fn change(&mut self, random: &mut Rng) -> Result<String> {
        match random.u8(0..4) {
            0 => {
                let n = random.usize(0..self.guests.len());
                let eni = self.guests[n].clone();
                if self.is_attached(&eni) {
                    self.lab.detach_network_interface(&eni)?;
                    return Ok(format!("{eni} is detached"));
                }
                let device = 3 + n as u32;
                self.lab.attach_network_interface(&eni, &self.name.clone(), 0, device)?;
                Ok(format!("{eni} is attached"))
            }
            1 => self.move_wanderer(),
            _ => {
                let (n, extra) = EXTRAS[random.usize(0..EXTRAS.len())];
                let (eni, net) = (self.lasting[n].clone(), extra.parse::<IpNet>()?);
                if self.lab.world().eni(&eni)?.owns(net.addr()) {
                    self.lab.unassign(&eni, &[net])?;
                    return Ok(format!("{net} is unassigned from {eni}"));
                }
                self.lab.assign(&eni, &[net], false)?;
                Ok(format!("{net} is assigned to {eni}"))
            }
        }
    }

    fn move_wanderer(&mut self) -> Result<String> {
        let has_it = self.lab.world().eni(&self.lasting[1])?.owns(WANDERER.into());
        let eni = self.lasting[if has_it { 2 } else { 1 }].clone();
        self.lab.assign(&eni, &[IpAddr::from(WANDERER).into()], true)?;
        Ok(format!("{WANDERER} goes to {eni}"))
    }
}
