//! A running VPC: EC2's verbs with their consequences. `vpc` says what is true, `forward` what becomes of a packet; here
//! links come and go in the instances' namespaces, metadata is published, and programs and probes run.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::cable::Cable;
use crate::card::Card;
use crate::echo::Echo;
use crate::fabric::Fabric;
use crate::forward::{METADATA_IPV4, METADATA_IPV6, METADATA_MAC, ROUTER_IPV6, ROUTER_MAC};
use crate::imds::Service;
use crate::interposer;
use crate::kernel::{self, Route};
use crate::metadata::{EniView, InstanceView, Propagation, Published};
use crate::node::Node;
use crate::overflow;
use crate::probe::{Outcome, Probe, probe_all};
use crate::vpc::{CreateEni, Eni, EniId, InstanceId, Mac, Port, World, router};
use crate::wire;

/// Seconds of a lease, and bytes that the VPC carries: what DHCP tells.
const LEASE: u32 = 3600;
const JUMBO_MTU: u32 = 9001;

/// Which links the distribution configures by itself, as DHCP and router advertisements tell it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Distribution {
    Nothing,
    /// The primary ENI alone: what EC2 needs to be reached at all.
    Primary,
    /// Every ENI that is there at launch, each with a default route in `main`: what stock images do.
    AtLaunch,
    /// Also those attached later.
    EveryEni,
}

pub struct Lab {
    pub fabric: Fabric,
    pub eniup: PathBuf,
    /// The binary under test finds a kernel before Linux 5.18.
    pub is_kernel_old: bool,
    nodes: BTreeMap<String, Node>,
    echoes: BTreeMap<String, Echo>,
    /// By name, which is also their node's.
    machines: BTreeMap<String, Machine>,
}

/// What an instance has beside its truth in the world.
struct Machine {
    instance: InstanceId,
    distribution: Distribution,
    /// A virtual machine's cards have their sockets in this folder; namespaces have cables.
    cards: Option<PathBuf>,
    /// The names of its links, by ENI.
    links: BTreeMap<EniId, String>,
    /// Those whose links the distribution has configured.
    configured: BTreeSet<EniId>,
    metadata: Arc<Mutex<Published>>,
    service: Service,
    _metadata_node: Node,
}

impl Lab {
    /// A lab without anything in it. `eniup` is the binary under test.
    ///
    /// # Errors
    /// Outside the sandbox, or the machine lacks what a lab needs.
    pub fn new(eniup: impl Into<PathBuf>) -> Result<Lab> {
        let eniup = eniup.into();
        ensure!(eniup.is_file(), "the binary to judge is not there: {}", eniup.display());
        Ok(Lab {
            fabric: Fabric::start()?,
            eniup,
            is_kernel_old: false,
            nodes: BTreeMap::new(),
            echoes: BTreeMap::new(),
            machines: BTreeMap::new(),
        })
    }

    /// A copy of EC2's truth at this moment.
    pub fn world(&self) -> World {
        self.fabric.world(|world| world.clone())
    }

    /// Launches an instance with these ENIs: the primary, and on card 0 those of the devices that follow.
    pub fn run_instance(&mut self, name: &str, enis: &[EniId], kind: &str, distribution: Distribution) -> Result<()> {
        self.launch(name, enis, kind, distribution, None)
    }

    /// Launches an instance that is a virtual machine of the caller's: the fabric's ends of its cards are in this folder. What
    /// the machine makes of them is its own affair, so the verbs that need a namespace do not know it.
    pub fn run_machine(&mut self, name: &str, enis: &[EniId], kind: &str, cards: &Path) -> Result<()> {
        self.launch(name, enis, kind, Distribution::Nothing, Some(cards.into()))
    }

    fn launch(
        &mut self,
        name: &str,
        enis: &[EniId],
        kind: &str,
        distribution: Distribution,
        cards: Option<PathBuf>,
    ) -> Result<()> {
        let is_taken = self.nodes.contains_key(name) || self.machines.contains_key(name);
        ensure!(!is_taken, "there is a node {name} already");
        let (primary, secondaries) = enis.split_first().context("an instance has at least its primary ENI")?;
        let network_cards = crate::vpc::network_cards(kind);
        let instance = self.fabric.world(|world| -> Result<InstanceId> {
            let instance = world.run_instance(primary, kind, network_cards)?;
            for (n, eni) in secondaries.iter().enumerate() {
                world.attach_network_interface(eni, &instance, 0, n as u32 + 1)?;
            }
            Ok(instance)
        })?;
        let metadata = Arc::new(Mutex::new(Published::new()));
        let (metadata_node, service) = self.serve_metadata(name, &instance, metadata.clone())?;
        let machine = Machine {
            instance: instance.clone(),
            distribution,
            cards,
            links: BTreeMap::new(),
            configured: BTreeSet::new(),
            metadata,
            service,
            _metadata_node: metadata_node,
        };
        self.machines.insert(name.into(), machine);
        self.published(name)?.publish_without_delay(&self.fabric.world(|world| view(world, &instance))?);
        self.boot(name)
    }

    /// The namespace in which an instance's metadata service listens.
    fn serve_metadata(&self, name: &str, instance: &str, metadata: Arc<Mutex<Published>>) -> Result<(Node, Service)> {
        let node = Node::create(&format!("metadata of {name}"))?;
        self.fabric.plug(Port::Metadata(instance.into()), Cable::plug_into(&node, "metadata", METADATA_MAC)?)?;
        let listeners = node.enter(|| {
            kernel::set_mtu("metadata", JUMBO_MTU)?;
            kernel::sysctl("ipv6/conf/metadata/accept_ra", "0")?;
            kernel::set_up("metadata")?;
            for address in [IpAddr::from(METADATA_IPV4), METADATA_IPV6.into()] {
                kernel::add_address("metadata", address.into(), None)?;
                kernel::add_route(&Route::new(everything(address), None, "metadata"))?;
            }
            let listeners = [
                TcpListener::bind((METADATA_IPV4, 80)).context("listening on the metadata service's IPv4 address")?,
                TcpListener::bind((METADATA_IPV6, 80)).context("listening on the metadata service's IPv6 address")?,
            ];
            Ok(listeners)
        })?;
        Ok((node, Service::start(listeners.into(), metadata)))
    }

    /// A fresh namespace with the instance's links, as its kernel finds them.
    fn boot(&mut self, name: &str) -> Result<()> {
        if self.machine(name)?.cards.is_none() {
            let node = Node::create(name)?;
            self.echoes.insert(name.into(), Echo::start(&node)?);
            self.nodes.insert(name.into(), node);
        }
        let instance = self.machine(name)?.instance.clone();
        let enis: Vec<Eni> = self.fabric.world(|world| world.enis_of(&instance).into_iter().cloned().collect());
        for eni in enis {
            self.plug(name, &eni, true)?;
        }
        Ok(())
    }

    fn plug(&mut self, name: &str, eni: &Eni, is_booting: bool) -> Result<()> {
        let Some(at) = &eni.attachment else { return Ok(()) };
        if eni.is_efa_only {
            return Ok(());
        }
        let link = match at.network_card {
            0 => format!("ens{}", 5 + at.device_number),
            card => format!("enp{card}s{}", 5 + at.device_number),
        };
        let port = Port::Eni(eni.id.clone());
        match &self.machine(name)?.cards {
            Some(folder) => self.fabric.plug(port, Card::create(folder, eni.mac)?)?,
            None => self.fabric.plug(port, Cable::plug_into(self.node(name)?, &link, eni.mac)?)?,
        }
        let is_primary = self.fabric.world(|world| world.instance(&at.instance).is_ok_and(|i| i.primary == eni.id));
        let machine = self.machines.get_mut(name).with_context(|| format!("there is no instance {name}"))?;
        machine.links.insert(eni.id.clone(), link.clone());
        let is_configured = match machine.distribution {
            Distribution::Nothing => false,
            Distribution::Primary => is_primary,
            Distribution::AtLaunch => is_booting,
            Distribution::EveryEni => true,
        };
        if is_configured {
            machine.configured.insert(eni.id.clone());
            // The primary's default route is the first.
            self.configure(name, eni, &link, if is_primary { 100 } else { 200 + at.device_number })?;
        }
        Ok(())
    }

    /// The address from which an instance talks to `to` when its program binds to none: by the connected routes and
    /// defaults that the distribution made, whatever else is attached.
    pub fn unbound_source(&self, name: &str, to: IpAddr) -> Option<IpAddr> {
        let machine = self.machines.get(name)?;
        self.fabric.world(|world| {
            let primary = &world.instance(&machine.instance).ok()?.primary;
            let is_in_its_subnet = |eni: &&Eni| match to {
                IpAddr::V4(to) => world.subnet(&eni.subnet).is_ok_and(|s| s.ipv4.is_some_and(|net| net.contains(&to))),
                // The distribution makes no connected route for IPv6.
                IpAddr::V6(_) => false,
            };
            let configured: Vec<&Eni> = machine.configured.iter().filter_map(|eni| world.eni(eni).ok()).collect();
            let primary = configured.iter().find(|eni| eni.id == *primary);
            let own = primary.into_iter().chain(&configured).copied().find(is_in_its_subnet).or(primary.copied())?;
            match to {
                IpAddr::V4(_) => own.ipv4s.first().map(|address| (*address).into()),
                IpAddr::V6(_) => own.ipv6s.first().map(|address| (*address).into()),
            }
        })
    }

    /// What a DHCP client and router advertisements make of a link.
    fn configure(&self, name: &str, eni: &Eni, link: &str, metric: u32) -> Result<()> {
        let (subnet4, subnet6) = self.fabric.world(|world| {
            let subnet = world.subnet(&eni.subnet)?;
            Ok::<_, anyhow::Error>((subnet.ipv4, subnet.ipv6s.first().copied()))
        })?;
        self.node(name)?.enter(|| {
            kernel::set_mtu(link, JUMBO_MTU)?;
            // As networkd does: it reads router advertisements itself.
            kernel::sysctl(&format!("ipv6/conf/{link}/accept_ra"), "0")?;
            kernel::set_up(link)?;
            if let (Some(address), Some(subnet)) = (eni.ipv4s.first(), subnet4) {
                let net = Ipv4Net::new(*address, subnet.prefix_len())?;
                kernel::add_address(link, net.into(), Some(LEASE))?;
                let route = Route::new(everything(net.addr().into()), Some(router(subnet.into())), link);
                kernel::add_route(&Route { metric, protocol: kernel::DHCP, ..route })?;
            }
            if let (Some(address), Some(_)) = (eni.ipv6s.first(), subnet6) {
                kernel::add_address(link, IpAddr::from(*address).into(), Some(LEASE))?;
                let route = Route::new(everything(IpAddr::from(*address)), Some(ROUTER_IPV6.into()), link);
                kernel::add_route(&Route { metric, protocol: kernel::RA, ..route })?;
            }
            Ok(())
        })
    }

    /// Stops an instance: what its kernel and its `/run` had is gone, its ENIs stay attached.
    pub fn stop_instance(&mut self, name: &str) -> Result<()> {
        let machine = self.machine_mut(name)?;
        let instance = machine.instance.clone();
        let links = std::mem::take(&mut machine.links);
        machine.configured.clear();
        self.fabric.world(|world| world.stop_instance(&instance))?;
        for eni in links.into_keys() {
            self.fabric.unplug(&Port::Eni(eni));
        }
        self.echoes.remove(name);
        if let Some(node) = self.nodes.remove(name) {
            std::fs::remove_dir_all(node.run_directory()).context("clearing the instance's /run")?;
        }
        Ok(())
    }

    pub fn start_instance(&mut self, name: &str) -> Result<()> {
        let instance = self.machine(name)?.instance.clone();
        ensure!(!self.is_running(name)?, "IncorrectInstanceState: {name} is running");
        self.fabric.world(|world| world.start_instance(&instance))?;
        self.published(name)?.publish_without_delay(&self.fabric.world(|world| view(world, &instance))?);
        self.boot(name)
    }

    pub fn create_network_interface(&mut self, create: CreateEni) -> Result<EniId> {
        self.fabric.world(|world| world.create_network_interface(create))
    }

    pub fn delete_network_interface(&mut self, eni: &str) -> Result<()> {
        self.fabric.world(|world| world.delete_network_interface(eni))
    }

    /// Attaches an ENI: its link is there at once, metadata follows as its propagation says.
    pub fn attach_network_interface(&mut self, eni: &str, name: &str, card: u32, device: u32) -> Result<()> {
        let instance = self.machine(name)?.instance.clone();
        self.fabric.world(|world| world.attach_network_interface(eni, &instance, card, device))?;
        if self.is_running(name)? {
            let eni = self.fabric.world(|world| world.eni(eni).cloned())?;
            self.plug(name, &eni, false)?;
        }
        self.publish(name)
    }

    pub fn detach_network_interface(&mut self, eni: &str) -> Result<()> {
        let at = self.name_of_owner(eni)?;
        self.fabric.world(|world| world.detach_network_interface(eni))?;
        self.fabric.unplug(&Port::Eni(eni.into()));
        let machine = self.machine_mut(&at)?;
        machine.links.remove(eni);
        machine.configured.remove(eni);
        self.publish(&at)
    }

    /// Detaches an ENI and attaches it to another instance: the classic failover.
    pub fn move_network_interface(&mut self, eni: &str, name: &str, card: u32, device: u32) -> Result<()> {
        let instance = self.machine(name)?.instance.clone();
        self.fabric.world(|world| world.ensure_slot_is_free(&instance, card, device))?;
        self.detach_network_interface(eni)?;
        self.attach_network_interface(eni, name, card, device)
    }

    /// Assigns addresses (whole-length prefixes) and delegated prefixes to an ENI; with `allow_reassignment` they may be
    /// another ENI's so far.
    pub fn assign(&mut self, eni: &str, sources: &[IpNet], allow_reassignment: bool) -> Result<()> {
        self.fabric.world(|world| world.assign(eni, sources, allow_reassignment))?;
        self.publish_all()
    }

    pub fn unassign(&mut self, eni: &str, sources: &[IpNet]) -> Result<()> {
        self.fabric.world(|world| world.unassign(eni, sources))?;
        self.publish_all()
    }

    pub fn allocate_address(&mut self) -> Ipv4Addr {
        self.fabric.world(World::allocate_address)
    }

    pub fn associate_address(&mut self, public: Ipv4Addr, eni: &str, private: Option<Ipv4Addr>) -> Result<()> {
        self.fabric.world(|world| world.associate_address(public, eni, private))?;
        self.publish_all()
    }

    pub fn disassociate_address(&mut self, public: Ipv4Addr) -> Result<()> {
        self.fabric.world(|world| world.disassociate_address(public))?;
        self.publish_all()
    }

    /// A new elastic IP in front of a private address.
    pub fn elastic_ip(&mut self, eni: &str, private: Option<Ipv4Addr>) -> Result<Ipv4Addr> {
        let public = self.allocate_address();
        self.associate_address(public, eni, private)?;
        Ok(public)
    }

    /// A host of the internet: no VPC checks what it sends.
    pub fn add_internet_host(&mut self, name: &str, ipv4: Option<Ipv4Addr>, ipv6: Option<Ipv6Addr>) -> Result<()> {
        let mac = self.fabric.world(|world| world.add_internet_host(name, ipv4, ipv6));
        let node = Node::create(name)?;
        self.fabric.plug(Port::Internet(name.into()), Cable::plug_into(&node, "eth0", mac)?)?;
        node.enter(|| {
            kernel::sysctl("ipv6/conf/eth0/accept_ra", "0")?;
            kernel::set_up("eth0")?;
            for address in ipv4.map(IpAddr::from).into_iter().chain(ipv6.map(IpAddr::from)) {
                kernel::add_address("eth0", address.into(), None)?;
                kernel::add_route(&Route::new(everything(address), None, "eth0"))?;
            }
            Ok(())
        })?;
        self.echoes.insert(name.into(), Echo::start(&node)?);
        self.nodes.insert(name.into(), node);
        Ok(())
    }

    /// A container on a bridge of an instance, in Docker's manner: with these addresses, and the bridge with the first of each
    /// of their nets.
    pub fn add_container(&mut self, name: &str, on: &str, bridge: &str, addresses: &[IpNet]) -> Result<()> {
        let container = Node::create(name)?;
        let host_end = format!("veth{}", self.nodes.len());
        let namespace = container.namespace();
        self.node(on)?.enter(|| {
            if kernel::index(bridge).is_err() {
                kernel::create_bridge(bridge)?;
                addresses.iter().try_for_each(|net| {
                    kernel::add_address(bridge, IpNet::new(router(*net), net.prefix_len())?, None)
                })?;
                kernel::set_up(bridge)?;
            }
            kernel::create_veth(&host_end, "eth0", &namespace.as_raw_fd())?;
            kernel::set_controller(&host_end, bridge)?;
            kernel::set_up(&host_end)?;
            kernel::sysctl("ipv4/ip_forward", "1")?;
            kernel::sysctl("ipv6/conf/all/forwarding", "1")
        })?;
        container.enter(|| {
            kernel::sysctl("ipv6/conf/eth0/accept_ra", "0")?;
            kernel::set_up("eth0")?;
            for net in addresses {
                kernel::add_address("eth0", *net, None)?;
                kernel::add_route(&Route::new(everything(net.addr()), Some(router(*net)), "eth0"))?;
            }
            Ok(())
        })?;
        self.echoes.insert(name.into(), Echo::start(&container)?);
        self.nodes.insert(name.into(), container);
        Ok(())
    }

    /// A container with addresses of a delegated prefix, in the manner of the VPC CNI: a host route to each of them.
    pub fn add_pod(&mut self, name: &str, on: &str, addresses: &[IpAddr]) -> Result<()> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let pod = Node::create(name)?;
        let host_end = format!("pod{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let namespace = pod.namespace();
        let (router4, router6) = (Ipv4Addr::new(169, 254, 1, 1), Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));
        self.node(on)?.enter(|| {
            kernel::create_veth(&host_end, "eth0", &namespace.as_raw_fd())?;
            kernel::set_up(&host_end)?;
            kernel::sysctl(&format!("ipv4/conf/{host_end}/proxy_arp"), "1")?;
            // No answer is delayed: proxy ARP otherwise waits up to 0.8 s to let the owner answer.
            kernel::sysctl(&format!("ipv4/neigh/{host_end}/proxy_delay"), "0")?;
            kernel::add_address(&host_end, Ipv6Net::new(router6, 64)?.into(), None)?;
            for address in addresses {
                kernel::add_route(&Route::new((*address).into(), None, &host_end))?;
            }
            kernel::sysctl("ipv4/ip_forward", "1")?;
            kernel::sysctl("ipv6/conf/all/forwarding", "1")
        })?;
        pod.enter(|| {
            kernel::sysctl("ipv6/conf/eth0/accept_ra", "0")?;
            kernel::set_up("eth0")?;
            for address in addresses {
                kernel::add_address("eth0", (*address).into(), None)?;
                let router: IpAddr = if address.is_ipv4() { router4.into() } else { router6.into() };
                if address.is_ipv4() {
                    kernel::add_route(&Route::new(router.into(), None, "eth0"))?;
                }
                kernel::add_route(&Route::new(everything(*address), Some(router), "eth0"))?;
            }
            Ok(())
        })?;
        self.echoes.insert(name.into(), Echo::start(&pod)?);
        self.nodes.insert(name.into(), pod);
        Ok(())
    }

    /// Ends a container with addresses of a delegated prefix; its host's link and routes go with it.
    pub fn remove_pod(&mut self, name: &str) -> Result<()> {
        let pod = self.nodes.remove(name).with_context(|| format!("there is no running node {name}"))?;
        self.echoes.remove(name);
        pod.enter(|| kernel::delete_link("eth0"))?;
        std::fs::remove_dir_all(pod.run_directory()).with_context(|| format!("clearing the /run of {name}"))
    }

    /// A tunnel from an instance to a node, whose end on the instance has this name. All that the node says goes there.
    pub fn add_tunnel(&mut self, name: &str, on: &str, link: &str, own: &[IpNet], other: &[IpAddr]) -> Result<()> {
        let far = Node::create(name)?;
        let namespace = far.namespace();
        self.node(on)?.enter(|| {
            kernel::create_veth(link, "tun0", &namespace.as_raw_fd())?;
            kernel::set_up(link)?;
            own.iter().try_for_each(|net| kernel::add_address(link, *net, None))
        })?;
        far.enter(|| {
            kernel::set_up("tun0")?;
            for address in other {
                let gateway = own.iter().map(IpNet::addr).find(|own| own.is_ipv4() == address.is_ipv4());
                kernel::add_address("tun0", (*address).into(), None)?;
                if let Some(gateway) = gateway {
                    kernel::add_route(&Route::new(gateway.into(), None, "tun0"))?;
                    kernel::add_route(&Route::new(everything(gateway), Some(gateway), "tun0"))?;
                }
            }
            Ok(())
        })?;
        self.echoes.insert(name.into(), Echo::start(&far)?);
        self.nodes.insert(name.into(), far);
        Ok(())
    }

    /// Gives an ENI's link, while it is down, the name that another kernel would have given it.
    pub fn rename_link(&mut self, eni: &str, to: &str) -> Result<()> {
        let (name, link) = self.link_of(eni).map(|(n, l)| (n.to_string(), l.to_string())).context("it has no link")?;
        self.node(&name)?.enter(|| kernel::rename(&link, to))?;
        self.machine_mut(&name)?.links.insert(eni.into(), to.into());
        Ok(())
    }

    /// An unasked router advertisement to an ENI, as routers send them every few minutes.
    pub fn advertise_router(&self, eni: &str) -> Result<()> {
        let all_nodes = (Mac([0x33, 0x33, 0, 0, 0, 1]), Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1));
        let frame = wire::router_advertisement(all_nodes, (ROUTER_MAC, ROUTER_IPV6));
        self.fabric.inject(&Port::Eni(eni.into()), &frame)
    }

    /// # Errors
    /// There is no node of this name, or it is stopped.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.get(name).with_context(|| format!("there is no running node {name}"))
    }

    pub fn nodes(&self) -> impl Iterator<Item = &str> {
        self.nodes.keys().map(String::as_str)
    }

    /// The name and id of every instance.
    pub fn instances(&self) -> impl Iterator<Item = (&str, &str)> {
        self.machines.iter().map(|(name, machine)| (name.as_str(), machine.instance.as_str()))
    }

    /// The name of an ENI's link on its instance.
    pub fn link_of(&self, eni: &str) -> Option<(&str, &str)> {
        self.machines.iter().find_map(|(name, machine)| Some((name.as_str(), machine.links.get(eni)?.as_str())))
    }

    pub fn service(&self, name: &str) -> Result<&Service> {
        Ok(&self.machine(name)?.service)
    }

    /// How metadata of an instance lags behind from here on.
    pub fn set_propagation(&self, name: &str, propagation: Propagation) -> Result<()> {
        self.published(name)?.set_propagation(propagation);
        Ok(())
    }

    /// What an instance's metadata service publishes; to hold keys back, or to read what it says.
    pub fn published(&self, name: &str) -> Result<MutexGuard<'_, Published>> {
        Ok(self.machine(name)?.metadata.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Streams of flows that are served at this moment, on all nodes.
    pub fn streams(&self) -> usize {
        self.echoes.values().map(Echo::streams).sum()
    }

    /// What full queues have thrown away so far, where any has: on each node and in the fabric.
    ///
    /// # Errors
    /// The kernel's counters cannot be read.
    pub fn overflows(&self) -> Result<Vec<String>> {
        let nodes = self.nodes.values().map(|node| Ok((node.name.as_str(), overflow::of(node)?)));
        let all = nodes.chain(std::iter::once_with(|| Ok(("fabric", overflow::of_this_namespace()?))));
        let told = |(place, full): (&str, BTreeMap<String, u64>)| {
            full.into_iter().map(|(queue, n)| format!("{place}: {n} at {queue}")).collect::<Vec<_>>()
        };
        all.collect::<Result<Vec<_>>>().map(|all| all.into_iter().flat_map(told).collect())
    }

    /// A program to run on a node.
    pub fn command(&self, name: &str, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        Ok(self.node(name)?.command(program))
    }

    /// Runs the binary under test on an instance, as a user would.
    pub fn eniup(&self, name: &str, arguments: &[&str]) -> Result<Output> {
        let mut command = self.command(name, &self.eniup)?;
        command.args(arguments).env_remove("AWS_EC2_METADATA_SERVICE_ENDPOINT").env_remove("RUNTIME_DIRECTORY");
        let output = match self.is_kernel_old {
            true => interposer::output(&mut command, interposer::forget_address_protocols),
            false => command.output().map_err(anyhow::Error::from),
        };
        output.with_context(|| format!("running {} on {name}", self.eniup.display()))
    }

    /// Makes these exchanges.
    pub fn probe(&self, probes: &[Probe], patience: Duration) -> Result<Vec<Outcome>> {
        probe_all(&self.nodes, probes, patience, |nonce| self.echoes.values().find_map(|echo| echo.pinged_by(nonce)))
    }

    fn is_running(&self, name: &str) -> Result<bool> {
        let instance = &self.machine(name)?.instance;
        self.fabric.world(|world| Ok(world.instance(instance)?.is_running))
    }

    fn machine(&self, name: &str) -> Result<&Machine> {
        self.machines.get(name).with_context(|| format!("InvalidInstanceID.NotFound: {name}"))
    }

    fn machine_mut(&mut self, name: &str) -> Result<&mut Machine> {
        self.machines.get_mut(name).with_context(|| format!("InvalidInstanceID.NotFound: {name}"))
    }

    fn name_of_owner(&self, eni: &str) -> Result<String> {
        let at = self.fabric.world(|world| world.eni(eni).map(|eni| eni.attachment.clone()))?;
        let at = at.with_context(|| format!("InvalidAttachmentID.NotFound: {eni} is not attached"))?;
        let owner = self.machines.iter().find(|(_, machine)| machine.instance == at.instance);
        owner.map(|(name, _)| name.clone()).with_context(|| format!("{} has no machine", at.instance))
    }

    fn publish(&self, name: &str) -> Result<()> {
        let instance = &self.machine(name)?.instance;
        let view = self.fabric.world(|world| view(world, instance))?;
        self.published(name)?.publish(&view);
        Ok(())
    }

    fn publish_all(&self) -> Result<()> {
        self.machines.keys().try_for_each(|name| self.publish(name))
    }
}

/// The destination of a default route for this address's family.
pub fn everything(address: IpAddr) -> IpNet {
    match address {
        IpAddr::V4(_) => Ipv4Net::default().into(),
        IpAddr::V6(_) => Ipv6Net::default().into(),
    }
}

/// EC2's truth about one instance, as its metadata service will tell it.
fn view(world: &World, instance: &str) -> Result<InstanceView> {
    let truth = world.instance(instance)?;
    let enis: Result<Vec<EniView>> = world.enis_of(instance).into_iter().map(|eni| eni_view(world, eni)).collect();
    Ok(InstanceView {
        instance_id: instance.into(),
        instance_type: truth.instance_type.clone(),
        primary_mac: world.eni(&truth.primary)?.mac.to_string(),
        availability_zone: "us-east-2c".into(),
        enis: enis?,
    })
}

fn eni_view(world: &World, eni: &Eni) -> Result<EniView> {
    let subnet = world.subnet(&eni.subnet)?;
    let at = eni.attachment.as_ref().with_context(|| format!("{} is not attached", eni.id))?;
    let cidrs = world.vpcs.get(&subnet.vpc).map_or(&[][..], Vec::as_slice);
    let cards = world.instance(&at.instance)?.network_cards;
    let of_v4 = |cidr: &IpNet| if let IpNet::V4(net) = cidr { Some(*net) } else { None };
    let of_v6 = |cidr: &IpNet| if let IpNet::V6(net) = cidr { Some(*net) } else { None };
    Ok(EniView {
        mac: eni.mac.to_string(),
        interface_id: eni.id.clone(),
        device_number: at.device_number,
        network_card: (cards > 1).then_some(at.network_card),
        owner_id: "123456789012".into(),
        subnet_id: eni.subnet.clone(),
        vpc_id: subnet.vpc.clone(),
        local_ipv4s: eni.ipv4s.clone(),
        ipv6s: eni.ipv6s.clone(),
        ipv4_prefixes: eni.ipv4_prefixes.clone(),
        ipv6_prefixes: eni.ipv6_prefixes.clone(),
        subnet_ipv4_cidr: subnet.ipv4,
        subnet_ipv6_cidrs: subnet.ipv6s.clone(),
        vpc_ipv4_cidrs: cidrs.iter().filter_map(of_v4).collect(),
        vpc_ipv6_cidrs: cidrs.iter().filter_map(of_v6).collect(),
        associations: world.associations_of(&eni.id),
        security_groups: eni.security_groups.clone(),
    })
}
