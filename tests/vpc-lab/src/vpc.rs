//! The truth of EC2 as plain data: VPCs, subnets, ENIs, elastic IPs, instances; and EC2's verbs, which check as EC2 does.
//! How a packet is treated is for `forward`; what runs in namespaces is for `lab`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, bail, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub type EniId = String;
pub type InstanceId = String;
pub type SubnetId = String;
pub type VpcId = String;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let bytes: Vec<String> = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        f.write_str(&bytes.join(":"))
    }
}

/// Where a frame enters or leaves the fabric.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Port {
    Eni(EniId),
    /// A host of the internet, by name.
    Internet(String),
    /// The metadata service of an instance.
    Metadata(InstanceId),
}

#[derive(Clone, Debug)]
pub struct Subnet {
    pub vpc: VpcId,
    pub ipv4: Option<Ipv4Net>,
    pub ipv6s: Vec<Ipv6Net>,
    /// Routes beside the implicit ones (local, peering, internet): destination → the ENI that takes it.
    pub routes: BTreeMap<IpNet, EniId>,
}

#[derive(Clone, Debug)]
pub struct Eni {
    pub id: EniId,
    pub mac: Mac,
    pub subnet: SubnetId,
    /// The primary private address first.
    pub ipv4s: Vec<Ipv4Addr>,
    pub ipv6s: Vec<Ipv6Addr>,
    pub ipv4_prefixes: Vec<Ipv4Net>,
    pub ipv6_prefixes: Vec<Ipv6Net>,
    pub source_dest_check: bool,
    /// Name and id.
    pub security_groups: Vec<(String, String)>,
    /// It has no link in the guest.
    pub is_efa_only: bool,
    pub attachment: Option<Attachment>,
}

impl Eni {
    /// Its private addresses, IPv4 first, the primary one first of all.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let ipv4s = self.ipv4s.iter().map(|address| IpAddr::from(*address));
        ipv4s.chain(self.ipv6s.iter().map(|address| IpAddr::from(*address))).collect()
    }

    /// Whether the VPC gives this address to this ENI, itself or as part of a delegated prefix.
    pub fn owns(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => {
                self.ipv4s.contains(&address) || self.ipv4_prefixes.iter().any(|prefix| prefix.contains(&address))
            }
            IpAddr::V6(address) => {
                self.ipv6s.contains(&address) || self.ipv6_prefixes.iter().any(|prefix| prefix.contains(&address))
            }
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attachment {
    pub instance: InstanceId,
    pub network_card: u32,
    pub device_number: u32,
}

#[derive(Clone, Debug)]
pub struct Instance {
    pub primary: EniId,
    pub instance_type: String,
    /// Machine types with one card have no `network-card` in metadata.
    pub network_cards: u32,
    pub is_running: bool,
}

#[derive(Clone, Debug)]
pub struct InternetHost {
    pub ipv4: Option<Ipv4Addr>,
    pub ipv6: Option<Ipv6Addr>,
    pub mac: Mac,
}

/// What a new ENI is to have. An IPv4 address is found for it when none is given and the subnet has IPv4.
#[derive(Clone, Debug, Default)]
pub struct CreateEni {
    pub subnet: SubnetId,
    pub ipv4s: Vec<Ipv4Addr>,
    pub ipv6s: Vec<Ipv6Addr>,
    pub ipv4_prefixes: Vec<Ipv4Net>,
    pub ipv6_prefixes: Vec<Ipv6Net>,
    pub security_groups: Vec<(String, String)>,
    pub is_efa_only: bool,
    /// Leave it without IPv4 although the subnet has it.
    pub is_ipv6_only: bool,
}

#[derive(Clone, Debug, Default)]
pub struct World {
    pub vpcs: BTreeMap<VpcId, Vec<IpNet>>,
    pub subnets: BTreeMap<SubnetId, Subnet>,
    pub enis: BTreeMap<EniId, Eni>,
    /// Public address → the ENI and private address behind it.
    pub elastic_ips: BTreeMap<Ipv4Addr, Option<(EniId, Ipv4Addr)>>,
    pub peerings: BTreeSet<(VpcId, VpcId)>,
    pub instances: BTreeMap<InstanceId, Instance>,
    pub internet_hosts: BTreeMap<String, InternetHost>,
    counter: u32,
}

impl World {
    fn number(&mut self) -> u32 {
        self.counter += 1;
        self.counter
    }

    pub fn create_vpc(&mut self, cidrs: &[IpNet]) -> VpcId {
        let id = format!("vpc-{:08x}", self.number());
        self.vpcs.insert(id.clone(), cidrs.to_vec());
        id
    }

    pub fn create_subnet(&mut self, vpc: &str, ipv4: Option<Ipv4Net>, ipv6s: &[Ipv6Net]) -> Result<SubnetId> {
        let cidrs = self.vpcs.get(vpc).with_context(|| format!("InvalidVpcID.NotFound: {vpc}"))?;
        let own = ipv4.map(IpNet::from).into_iter().chain(ipv6s.iter().map(|net| IpNet::from(*net)));
        for net in own {
            ensure!(cidrs.iter().any(|cidr| cidr.contains(&net)), "InvalidSubnet.Range: {net} is not in {vpc}");
        }
        let id = format!("subnet-{:08x}", self.number());
        let subnet = Subnet { vpc: vpc.into(), ipv4, ipv6s: ipv6s.to_vec(), routes: BTreeMap::new() };
        self.subnets.insert(id.clone(), subnet);
        Ok(id)
    }

    pub fn peer(&mut self, a: &str, b: &str) {
        self.peerings.insert((a.into(), b.into()));
        self.peerings.insert((b.into(), a.into()));
    }

    pub fn create_network_interface(&mut self, create: CreateEni) -> Result<EniId> {
        let subnet = self.subnet(&create.subnet)?.clone();
        let mut ipv4s = create.ipv4s;
        if ipv4s.is_empty() && !create.is_ipv6_only && !create.is_efa_only {
            ipv4s.extend(subnet.ipv4.map(|net| self.free_address(&subnet.vpc, net)).transpose()?);
        }
        let number = self.number();
        let [_, b, c, d] = number.to_be_bytes();
        let id = format!("eni-{number:017x}");
        let mac = Mac([0x02, 0xec, 0x2e, b, c, d]);
        let eni = Eni {
            id: id.clone(),
            mac,
            subnet: create.subnet,
            ipv4s: Vec::new(),
            ipv6s: Vec::new(),
            ipv4_prefixes: Vec::new(),
            ipv6_prefixes: Vec::new(),
            source_dest_check: true,
            security_groups: create.security_groups,
            is_efa_only: create.is_efa_only,
            attachment: None,
        };
        self.enis.insert(id.clone(), eni);
        let sources = ipv4s.iter().map(|a| IpNet::from(IpAddr::from(*a)));
        let sources = sources.chain(create.ipv6s.iter().map(|a| IpNet::from(IpAddr::from(*a))));
        let sources = sources.chain(create.ipv4_prefixes.iter().map(|net| IpNet::from(*net)));
        let sources: Vec<IpNet> = sources.chain(create.ipv6_prefixes.iter().map(|net| IpNet::from(*net))).collect();
        if let Err(error) = self.assign(&id, &sources, false) {
            self.enis.remove(&id);
            return Err(error);
        }
        Ok(id)
    }

    fn free_address(&self, vpc: &str, net: Ipv4Net) -> Result<Ipv4Addr> {
        // EC2 keeps the first four addresses and the last for itself.
        let candidates = net.hosts().skip(3);
        let free = candidates.into_iter().find(|address| self.owner_of(vpc, (*address).into()).is_none());
        free.with_context(|| format!("InsufficientFreeAddressesInSubnet: {net}"))
    }

    pub fn delete_network_interface(&mut self, eni: &str) -> Result<()> {
        ensure!(self.eni(eni)?.attachment.is_none(), "InvalidNetworkInterface.InUse: {eni} is attached");
        self.enis.remove(eni);
        for behind in self.elastic_ips.values_mut().filter(|behind| behind.as_ref().is_some_and(|(id, _)| id == eni)) {
            *behind = None;
        }
        Ok(())
    }

    pub fn run_instance(&mut self, primary: &str, instance_type: &str, network_cards: u32) -> Result<InstanceId> {
        ensure!(self.eni(primary)?.attachment.is_none(), "InvalidNetworkInterface.InUse: {primary} is attached");
        let id = format!("i-{:017x}", self.number());
        let instance =
            Instance { primary: primary.into(), instance_type: instance_type.into(), network_cards, is_running: true };
        self.instances.insert(id.clone(), instance);
        let attachment = Attachment { instance: id.clone(), network_card: 0, device_number: 0 };
        self.eni_mut(primary)?.attachment = Some(attachment);
        Ok(id)
    }

    pub fn stop_instance(&mut self, instance: &str) -> Result<()> {
        self.instance_mut(instance)?.is_running = false;
        Ok(())
    }

    pub fn start_instance(&mut self, instance: &str) -> Result<()> {
        self.instance_mut(instance)?.is_running = true;
        Ok(())
    }

    pub fn attach_network_interface(&mut self, eni: &str, instance: &str, card: u32, device: u32) -> Result<()> {
        ensure!(self.eni(eni)?.attachment.is_none(), "InvalidNetworkInterface.InUse: {eni} is attached");
        self.ensure_slot_is_free(instance, card, device)?;
        let attachment = Attachment { instance: instance.into(), network_card: card, device_number: device };
        self.eni_mut(eni)?.attachment = Some(attachment);
        Ok(())
    }

    /// # Errors
    /// The instance has no such card, or another ENI there.
    pub fn ensure_slot_is_free(&self, instance: &str, card: u32, device: u32) -> Result<()> {
        let cards = self.instance(instance)?.network_cards;
        ensure!(card < cards, "InvalidParameterValue: network card {card} does not exist on {instance}");
        let slot = Attachment { instance: instance.into(), network_card: card, device_number: device };
        let is_taken = self.enis.values().any(|other| other.attachment.as_ref() == Some(&slot));
        ensure!(!is_taken, "InvalidParameterValue: {instance} already has an interface at device index {device}");
        Ok(())
    }

    pub fn detach_network_interface(&mut self, eni: &str) -> Result<()> {
        let attachment = self.eni(eni)?.attachment.clone();
        let attachment = attachment.with_context(|| format!("InvalidAttachmentID.NotFound: {eni} is not attached"))?;
        let is_primary = self.instance(&attachment.instance)?.primary == eni;
        ensure!(!is_primary, "OperationNotPermitted: the primary network interface cannot be detached");
        self.eni_mut(eni)?.attachment = None;
        Ok(())
    }

    /// Assigns addresses (whole-length prefixes) and delegated prefixes; all or none.
    pub fn assign(&mut self, eni: &str, sources: &[IpNet], allow_reassignment: bool) -> Result<()> {
        let subnet = self.subnet(&self.eni(eni)?.subnet)?.clone();
        let nets: Vec<IpNet> =
            subnet.ipv4.map(IpNet::from).into_iter().chain(subnet.ipv6s.iter().map(|net| IpNet::from(*net))).collect();
        for source in sources {
            ensure!(
                nets.iter().any(|net| net.contains(source)),
                "InvalidParameterValue: {source} does not fall within the subnet's address range"
            );
            ensure_may_be_assigned(source, &nets)?;
            let Some(owner) = self.holder_of(&subnet.vpc, source).map(|owner| owner.id.clone()) else { continue };
            let is_prefix = source.prefix_len() < source.max_prefix_len();
            let may_move = allow_reassignment && source.addr().is_ipv4() && !is_prefix;
            ensure!(owner != eni && may_move, "InvalidIPAddress.InUse: {} is in use by {owner}", source.addr());
            let first = self.eni(&owner)?.ipv4s.first().copied().map(IpAddr::from);
            ensure!(first != Some(source.addr()), "InvalidParameterValue: the primary address of {owner} cannot move");
            self.unassign(&owner, &[*source])?;
        }
        let eni = self.eni_mut(eni)?;
        for source in sources {
            match source {
                IpNet::V4(net) if net.prefix_len() == 32 => eni.ipv4s.push(net.addr()),
                IpNet::V6(net) if net.prefix_len() == 128 => eni.ipv6s.push(net.addr()),
                IpNet::V4(net) => eni.ipv4_prefixes.push(*net),
                IpNet::V6(net) => eni.ipv6_prefixes.push(*net),
            }
        }
        Ok(())
    }

    pub fn unassign(&mut self, eni: &str, sources: &[IpNet]) -> Result<()> {
        for source in sources {
            let id = eni.to_string();
            let eni = self.eni_mut(eni)?;
            let first = eni.ipv4s.first().copied().map(IpAddr::from);
            ensure!(
                first != Some(source.addr()),
                "InvalidParameterValue: the primary address of {id} cannot be removed"
            );
            let before = eni.ipv4s.len() + eni.ipv6s.len() + eni.ipv4_prefixes.len() + eni.ipv6_prefixes.len();
            eni.ipv4s.retain(|address| IpNet::from(IpAddr::from(*address)) != *source);
            eni.ipv6s.retain(|address| IpNet::from(IpAddr::from(*address)) != *source);
            eni.ipv4_prefixes.retain(|prefix| IpNet::from(*prefix) != *source);
            eni.ipv6_prefixes.retain(|prefix| IpNet::from(*prefix) != *source);
            let after = eni.ipv4s.len() + eni.ipv6s.len() + eni.ipv4_prefixes.len() + eni.ipv6_prefixes.len();
            ensure!(after < before, "InvalidParameterValue: {source} is not assigned to {id}");
            for behind in self.elastic_ips.values_mut() {
                if behind
                    .as_ref()
                    .is_some_and(|(owner, private)| *owner == id && IpAddr::from(*private) == source.addr())
                {
                    *behind = None;
                }
            }
        }
        Ok(())
    }

    /// A new elastic IP, of no ENI yet.
    pub fn allocate_address(&mut self) -> Ipv4Addr {
        let address = Ipv4Addr::new(203, 0, 113, 10 + self.elastic_ips.len() as u8);
        self.elastic_ips.insert(address, None);
        address
    }

    /// Puts an elastic IP in front of a private address, the ENI's primary one when none is given.
    pub fn associate_address(&mut self, public: Ipv4Addr, eni: &str, private: Option<Ipv4Addr>) -> Result<()> {
        ensure!(self.elastic_ips.contains_key(&public), "InvalidAddress.NotFound: {public}");
        let owner = self.eni(eni)?;
        let private = private.or(owner.ipv4s.first().copied());
        let private = private.with_context(|| format!("InvalidParameterValue: {eni} has no IPv4 address"))?;
        ensure!(owner.ipv4s.contains(&private), "InvalidParameterValue: {private} is not assigned to {eni}");
        let behind = Some((eni.to_string(), private));
        if let Some((other, _)) = self.elastic_ips.iter().find(|(_, taken)| **taken == behind) {
            bail!("Resource.AlreadyAssociated: {private} has {other} already");
        }
        self.elastic_ips.insert(public, behind);
        Ok(())
    }

    pub fn disassociate_address(&mut self, public: Ipv4Addr) -> Result<()> {
        let behind = self.elastic_ips.get_mut(&public);
        *behind.with_context(|| format!("InvalidAddress.NotFound: {public}"))? = None;
        Ok(())
    }

    pub fn modify_source_dest_check(&mut self, eni: &str, is_on: bool) -> Result<()> {
        self.eni_mut(eni)?.source_dest_check = is_on;
        Ok(())
    }

    /// A route in a subnet's route table with an ENI as target (a NAT box, a firewall).
    pub fn create_route(&mut self, subnet: &str, destination: IpNet, eni: &str) -> Result<()> {
        self.eni(eni)?;
        let subnet = self.subnets.get_mut(subnet).with_context(|| format!("InvalidSubnetID.NotFound: {subnet}"))?;
        subnet.routes.insert(destination, eni.into());
        Ok(())
    }

    pub fn add_internet_host(&mut self, name: &str, ipv4: Option<Ipv4Addr>, ipv6: Option<Ipv6Addr>) -> Mac {
        let [_, b, c, d] = self.number().to_be_bytes();
        let mac = Mac([0x02, 0x1e, 0x7e, b, c, d]);
        self.internet_hosts.insert(name.into(), InternetHost { ipv4, ipv6, mac });
        mac
    }

    /// # Errors
    /// There is no such ENI.
    pub fn eni(&self, eni: &str) -> Result<&Eni> {
        self.enis.get(eni).with_context(|| format!("InvalidNetworkInterfaceID.NotFound: {eni}"))
    }

    fn eni_mut(&mut self, eni: &str) -> Result<&mut Eni> {
        self.enis.get_mut(eni).with_context(|| format!("InvalidNetworkInterfaceID.NotFound: {eni}"))
    }

    /// # Errors
    /// There is no such subnet.
    pub fn subnet(&self, subnet: &str) -> Result<&Subnet> {
        self.subnets.get(subnet).with_context(|| format!("InvalidSubnetID.NotFound: {subnet}"))
    }

    /// # Errors
    /// There is no such instance.
    pub fn instance(&self, instance: &str) -> Result<&Instance> {
        self.instances.get(instance).with_context(|| format!("InvalidInstanceID.NotFound: {instance}"))
    }

    fn instance_mut(&mut self, instance: &str) -> Result<&mut Instance> {
        self.instances.get_mut(instance).with_context(|| format!("InvalidInstanceID.NotFound: {instance}"))
    }

    /// The ENIs of an instance, by card and device number.
    pub fn enis_of(&self, instance: &str) -> Vec<&Eni> {
        let at = |eni: &&Eni| eni.attachment.as_ref().map(|at| (at.network_card, at.device_number));
        let is_here = |eni: &&Eni| eni.attachment.as_ref().is_some_and(|at| at.instance == instance);
        let mut enis: Vec<&Eni> = self.enis.values().filter(is_here).collect();
        enis.sort_by_key(at);
        enis
    }

    /// The ENI of this VPC that has the address, itself or in a delegated prefix.
    pub fn owner_of(&self, vpc: &str, address: IpAddr) -> Option<&Eni> {
        let in_vpc = |eni: &&Eni| self.subnets.get(&eni.subnet).is_some_and(|subnet| subnet.vpc == vpc);
        self.enis.values().filter(in_vpc).find(|eni| eni.owns(address))
    }

    /// The ENI of this VPC that has this address or prefix, or a part of it.
    fn holder_of(&self, vpc: &str, source: &IpNet) -> Option<&Eni> {
        let in_vpc = |eni: &&Eni| self.subnets.get(&eni.subnet).is_some_and(|subnet| subnet.vpc == vpc);
        let prefixes = |eni: &Eni| -> Vec<IpNet> {
            let ipv4s = eni.ipv4_prefixes.iter().map(|net| IpNet::from(*net));
            ipv4s.chain(eni.ipv6_prefixes.iter().map(|net| IpNet::from(*net))).collect()
        };
        self.enis.values().filter(in_vpc).find(|eni| {
            eni.addresses().iter().any(|address| source.contains(address))
                || prefixes(eni).iter().any(|prefix| prefix.contains(source) || source.contains(prefix))
        })
    }

    /// Public and private addresses of an ENI's elastic IPs.
    pub fn associations_of(&self, eni: &str) -> Vec<(Ipv4Addr, Ipv4Addr)> {
        let behind = |(public, behind): (&Ipv4Addr, &Option<(EniId, Ipv4Addr)>)| match behind {
            Some((id, private)) if id == eni => Some((*public, *private)),
            _ => None,
        };
        self.elastic_ips.iter().filter_map(behind).collect()
    }
}

/// How many network cards a machine type has; those with more than one are the largest.
pub fn network_cards(instance_type: &str) -> u32 {
    match instance_type {
        "p5.48xlarge" => 32,
        "trn1n.32xlarge" => 16,
        "p4d.24xlarge" => 4,
        _ => 1,
    }
}

/// A whole-length address outside what EC2 keeps for itself, or a prefix of the length that it delegates.
fn ensure_may_be_assigned(source: &IpNet, subnets: &[IpNet]) -> Result<()> {
    let delegated = if source.addr().is_ipv4() { 28 } else { 80 };
    let is_address = source.prefix_len() == source.max_prefix_len();
    ensure!(
        is_address || source.prefix_len() == delegated && source.trunc() == *source,
        "InvalidParameterValue: {source} is neither an address nor a whole /{delegated} prefix"
    );
    let mut reserved = subnets.iter().filter(|net| net.contains(source)).flat_map(|net| reserved(*net));
    let taken = reserved.find(|address| source.contains(address));
    ensure!(taken.is_none(), "InvalidParameterValue: {source} is in subnet's reserved address range");
    Ok(())
}

/// The first four addresses of a subnet and the last one, which EC2 keeps for itself; of IPv6 too.
fn reserved(subnet: IpNet) -> Vec<IpAddr> {
    match subnet {
        IpNet::V4(net) => {
            let base = u32::from(net.network());
            (0..4).map(|n| Ipv4Addr::from(base + n).into()).chain([net.broadcast().into()]).collect()
        }
        IpNet::V6(net) => {
            let base = u128::from(net.network());
            (0..4).map(|n| Ipv6Addr::from(base + n).into()).chain([net.broadcast().into()]).collect()
        }
    }
}

/// The VPC router's address in a subnet: its base + 1.
pub fn router(subnet: IpNet) -> IpAddr {
    match subnet {
        IpNet::V4(net) => Ipv4Addr::from(u32::from(net.network()) + 1).into(),
        IpNet::V6(net) => Ipv6Addr::from(u128::from(net.network()) + 1).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A subnet with two ENIs, 10.0.0.10 with an address and a prefix beside it, and 10.0.0.50.
    fn world() -> Result<(World, EniId, EniId)> {
        let mut world = World::default();
        let vpc = world.create_vpc(&["10.0.0.0/16".parse()?, "2600:1f16:67f:f200::/56".parse()?]);
        let subnet = world.create_subnet(&vpc, Some("10.0.0.0/24".parse()?), &["2600:1f16:67f:f200::/64".parse()?])?;
        let create = |address: &str| -> Result<CreateEni> {
            Ok(CreateEni { subnet: subnet.clone(), ipv4s: vec![address.parse()?], ..CreateEni::default() })
        };
        let one = world.create_network_interface(create("10.0.0.10")?)?;
        let two = world.create_network_interface(create("10.0.0.50")?)?;
        world.assign(&one, &["10.0.0.11/32".parse()?, "10.0.0.64/28".parse()?], false)?;
        Ok((world, one, two))
    }

    #[test]
    fn what_ec2_refuses_to_assign_is_refused_and_changes_nothing() {
        let (mut world, one, two) = world().unwrap();
        let before = format!("{world:?}");
        for (source, words) in [
            ("10.0.0.2/32", "reserved"),
            ("10.0.0.255/32", "reserved"),
            ("10.0.0.240/28", "reserved"),
            ("2600:1f16:67f:f200::1/128", "reserved"),
            ("10.0.0.192/30", "neither an address nor a whole /28"),
            ("10.0.0.193/28", "neither an address nor a whole /28"),
            ("2600:1f16:67f:f200:1::/96", "neither an address nor a whole /80"),
            ("10.0.0.48/28", "in use"),
            ("10.0.0.64/28", "in use"),
            ("10.0.0.65/32", "in use"),
            ("10.0.0.50/32", "in use"),
            ("10.0.9.9/32", "does not fall within"),
        ] {
            let error = world.assign(&one, &[source.parse().unwrap()], false).unwrap_err().to_string();
            assert!(error.contains(words), "{source}: {error}");
            assert_eq!(format!("{world:?}"), before, "{source}");
        }
        // A secondary address may be taken from another ENI, if that is said; its first one and a prefix may not.
        assert!(world.assign(&two, &["10.0.0.10/32".parse().unwrap()], true).is_err());
        assert!(world.assign(&two, &["10.0.0.64/28".parse().unwrap()], true).is_err());
        assert_eq!(format!("{world:?}"), before);
        world.assign(&two, &["10.0.0.11/32".parse().unwrap()], true).unwrap();
        assert!(
            world.eni(&two).unwrap().owns([10, 0, 0, 11].into())
                && !world.eni(&one).unwrap().owns([10, 0, 0, 11].into())
        );
    }
}
