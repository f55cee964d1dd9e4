//! A VPC with everything that can talk to the instances under test, and every exchange that should work in it, derived from
//! EC2's truth: who can reach whom, and as whom the other side should see them.

use std::net::{IpAddr, Ipv4Addr};

use crate::check::{Check, Expected};
use crate::lab::Lab;
use crate::probe::{Bound, Kind, Probe};
use crate::vpc::{Eni, VpcId, World};

pub struct Scene {
    pub lab: Lab,
    /// The instances under test.
    pub instances: Vec<String>,
    pub clients: Vec<Client>,
}

/// A node that asks, and that the instances ask.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Client {
    pub node: String,
    /// What it stands for: the column of a table.
    pub class: String,
    pub addresses: Vec<IpAddr>,
    pub place: Place,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// An instance of its own.
    Vpc(VpcId),
    /// A net behind an instance of this VPC; it asks from its address there.
    Behind(VpcId),
    Internet,
    /// A container on a bridge of an instance, which masquerades it to the outside or not.
    Container {
        on: String,
        is_masqueraded: bool,
    },
    /// A container of an instance with addresses of a delegated prefix.
    Pod {
        on: String,
    },
}

impl Client {
    fn is_outside(&self) -> bool {
        match self.place {
            Place::Vpc(_) | Place::Behind(_) | Place::Internet => true,
            Place::Container { .. } | Place::Pod { .. } => false,
        }
    }
}

/// One kind of exchange for each way in which an instance can ask.
pub const UNBOUND: &str = "unbound";
pub const BY_ADDRESS: &str = "by address";
pub const BY_DEVICE: &str = "by device";
pub const FORWARDED: &str = "forwarded";
pub const MASQUERADED: &str = "masqueraded";
pub const ITSELF: &str = "itself";

/// What a program on an instance binds its socket to.
struct Source<'a> {
    row: String,
    class: &'a str,
    bound: Bound,
    /// The ENI by which the packets have to leave; none for what is not bound.
    eni: Option<&'a Eni>,
    addresses: Vec<IpAddr>,
}

impl Scene {
    pub fn new(lab: Lab) -> Scene {
        Scene { lab, instances: Vec::new(), clients: Vec::new() }
    }

    /// Every client asks every address of the instances under test, and of the containers with delegated addresses.
    pub fn ingress(&self) -> Vec<Check> {
        let world = self.lab.world();
        let mut checks = Vec::new();
        for (instance, eni) in self.enis(&world) {
            let link = self.lab.link_of(&eni.id).map_or("-", |(_, link)| link);
            let of_instance = self.enis(&world).into_iter().filter(|(other, _)| *other == instance);
            let own: Vec<IpAddr> = of_instance.flat_map(|(_, eni)| eni.addresses()).collect();
            for address in eni.addresses() {
                let row = format!("{instance} {link}  {address}");
                checks
                    .extend(self.clients.iter().flat_map(|client| asks(&world, client, instance, eni, address, &row)));
                checks.extend(Kind::ALL.map(|kind| Check {
                    row: row.clone(),
                    column: ITSELF.into(),
                    probe: Probe { from: instance.into(), bound: Bound::Nothing, to: address, kind },
                    // The address that is asked or, for secondary ones and behind masquerading, another of its own.
                    expected: Expected::Answer { seen: own.clone() },
                }));
            }
            for pod in self.pods_of(instance) {
                for address in pod.addresses.iter().copied().filter(|address| eni.owns(*address)) {
                    let row = format!("{instance} {link}  {address} (pod)");
                    let others = self.clients.iter().filter(|client| *client != pod);
                    checks.extend(others.flat_map(|client| asks(&world, client, instance, eni, address, &row)));
                }
            }
        }
        checks
    }

    /// The instances under test ask others: unbound, bound to each of their addresses, bound to each of their links; and
    /// their containers do, forwarded and masqueraded.
    pub fn egress(&self) -> Vec<Check> {
        let world = self.lab.world();
        let mut checks = Vec::new();
        for instance in &self.instances {
            let is_outside = |client: &&Client| client.is_outside() && client.node != *instance;
            for client in self.clients.iter().filter(is_outside) {
                for to in &client.addresses {
                    for source in self.sources(&world, instance) {
                        checks.extend(self.asked_by(&world, instance, &source, client, *to));
                    }
                    checks.extend(
                        self.contained(instance)
                            .flat_map(|container| self.asked_by_container(&world, instance, container, client, *to)),
                    );
                }
            }
        }
        checks
    }

    fn enis<'a>(&'a self, world: &'a World) -> Vec<(&'a str, &'a Eni)> {
        let of = |(name, id): (&'a str, &str)| world.enis_of(id).into_iter().map(move |eni| (name, eni)).collect();
        let under_test = self.lab.instances().filter(|(name, _)| self.instances.iter().any(|other| other == name));
        under_test.flat_map(|instance| -> Vec<_> { of(instance) }).collect()
    }

    fn contained<'a>(&'a self, instance: &'a str) -> impl Iterator<Item = &'a Client> {
        self.clients.iter().filter(move |client| match &client.place {
            Place::Container { on, .. } | Place::Pod { on } => on == instance,
            Place::Vpc(_) | Place::Behind(_) | Place::Internet => false,
        })
    }

    fn pods_of<'a>(&'a self, instance: &'a str) -> impl Iterator<Item = &'a Client> {
        self.contained(instance).filter(|client| matches!(client.place, Place::Pod { .. }))
    }

    fn sources<'a>(&self, world: &'a World, instance: &str) -> Vec<Source<'a>> {
        let mut sources = vec![Source {
            row: UNBOUND.into(),
            class: UNBOUND,
            bound: Bound::Nothing,
            eni: None,
            addresses: Vec::new(),
        }];
        let id = self.lab.instances().find(|(name, _)| *name == instance).map(|(_, id)| id.to_string());
        for eni in world.enis_of(&id.unwrap_or_default()) {
            let own = eni.addresses();
            let first = |is_ipv4: bool| own.iter().copied().find(|address| address.is_ipv4() == is_ipv4);
            if let Some((_, link)) = self.lab.link_of(&eni.id) {
                sources.push(Source {
                    row: format!("bound to {link}"),
                    class: BY_DEVICE,
                    bound: Bound::Device(link.into()),
                    eni: Some(eni),
                    addresses: first(true).into_iter().chain(first(false)).collect(),
                });
            }
            for address in own {
                sources.push(Source {
                    row: format!("bound to {address}"),
                    class: BY_ADDRESS,
                    bound: Bound::Address(address),
                    eni: Some(eni),
                    addresses: vec![address],
                });
            }
        }
        sources
    }

    fn asked_by(&self, world: &World, instance: &str, source: &Source, client: &Client, to: IpAddr) -> Vec<Check> {
        let own = match source.eni {
            None => self.lab.unbound_source(instance, to),
            Some(eni) if can_talk(world, eni, client) => {
                source.addresses.iter().copied().find(|own| own.is_ipv4() == to.is_ipv4())
            }
            Some(_) => None,
        };
        // The internet sees the elastic IP, and an address without one cannot ask it.
        let Some(seen) = own.and_then(|own| as_seen(world, own, client)) else { return Vec::new() };
        let check = |kind| Check {
            row: source.row.clone(),
            column: source.class.into(),
            probe: Probe { from: instance.into(), bound: source.bound.clone(), to, kind },
            expected: Expected::seen_as(seen),
        };
        Kind::ALL.map(check).into()
    }

    fn asked_by_container(
        &self,
        world: &World,
        instance: &str,
        container: &Client,
        client: &Client,
        to: IpAddr,
    ) -> Vec<Check> {
        let own = container.addresses.iter().copied().find(|own| own.is_ipv4() == to.is_ipv4());
        let (class, source) = match &container.place {
            Place::Pod { .. } => (FORWARDED, own),
            Place::Container { is_masqueraded: true, .. } if own.is_some() => {
                (MASQUERADED, self.lab.unbound_source(instance, to))
            }
            Place::Container { .. } | Place::Vpc(_) | Place::Behind(_) | Place::Internet => return Vec::new(),
        };
        let Some(seen) = source.and_then(|own| as_seen(world, own, client)) else { return Vec::new() };
        let check = |kind| Check {
            row: format!("{} on {instance}", container.node),
            column: class.into(),
            probe: Probe { from: container.node.clone(), bound: Bound::Nothing, to, kind },
            expected: Expected::seen_as(seen),
        };
        Kind::ALL.map(check).into()
    }
}

/// A client's exchanges with one address of an ENI.
fn asks(world: &World, client: &Client, instance: &str, eni: &Eni, address: IpAddr, row: &str) -> Vec<Check> {
    let is_possible = match &client.place {
        // A container reaches its own host as it is, and everything else by what its host makes of it.
        Place::Container { on, .. } | Place::Pod { on } => on == instance,
        Place::Vpc(_) | Place::Behind(_) | Place::Internet => can_talk(world, eni, client),
    };
    let own = client.addresses.iter().copied().find(|own| own.is_ipv4() == address.is_ipv4());
    // From the internet an IPv4 address is reached by the elastic IP in front of it, or not at all.
    let to = match (&client.place, address) {
        (Place::Internet, IpAddr::V4(address)) => public_of(world, address).map(IpAddr::from),
        _ => Some(address),
    };
    // An instance under test can be another's client, but not its own.
    let is_other = client.node != instance;
    let (true, true, Some(own), Some(to)) = (is_possible, is_other, own, to) else { return Vec::new() };
    let bound = match client.place {
        Place::Behind(_) => Bound::Address(own),
        Place::Vpc(_) | Place::Internet | Place::Container { .. } | Place::Pod { .. } => Bound::Nothing,
    };
    // A container's way to an address that is not its host's own leads through its host's masquerading.
    let is_hosts = eni.addresses().contains(&address);
    let is_masqueraded = matches!(client.place, Place::Container { is_masqueraded: true, .. }) && !is_hosts;
    let check = |kind| Check {
        row: row.into(),
        column: client.class.clone(),
        probe: Probe { from: client.node.clone(), bound: bound.clone(), to, kind },
        expected: Expected::Answer { seen: if is_masqueraded { Vec::new() } else { vec![own] } },
    };
    Kind::ALL.map(check).into()
}

/// Whether the VPC carries packets between an ENI and a client at all.
fn can_talk(world: &World, eni: &Eni, client: &Client) -> bool {
    let vpc = world.subnets.get(&eni.subnet).map(|subnet| &subnet.vpc);
    match (&client.place, vpc) {
        (Place::Vpc(other) | Place::Behind(other), Some(vpc)) => {
            other == vpc || world.peerings.contains(&(vpc.clone(), other.clone()))
        }
        (Place::Internet, _) => true,
        _ => false,
    }
}

/// A source address as a client sees it.
fn as_seen(world: &World, own: IpAddr, client: &Client) -> Option<IpAddr> {
    match (&client.place, own) {
        (Place::Internet, IpAddr::V4(own)) => public_of(world, own).map(IpAddr::from),
        _ => Some(own),
    }
}

fn public_of(world: &World, private: Ipv4Addr) -> Option<Ipv4Addr> {
    let is_behind = |(_, behind): &(&Ipv4Addr, &Option<(String, Ipv4Addr)>)| {
        behind.as_ref().is_some_and(|(_, own)| *own == private)
    };
    world.elastic_ips.iter().find(is_behind).map(|(public, _)| *public)
}

impl Scene {
    /// Both tables for people: what is asked of the instances, and what they ask, by whom they ask.
    pub fn tables(&self) -> [(&'static str, Vec<Check>); 2] {
        let by_client = |check: Check| {
            let client = self.clients.iter().find(|client| client.addresses.contains(&check.probe.to));
            Check { column: client.map_or(check.column.clone(), |client| client.class.clone()), ..check }
        };
        [("who reaches", self.ingress()), ("who asks", self.egress().into_iter().map(by_client).collect())]
    }
}
