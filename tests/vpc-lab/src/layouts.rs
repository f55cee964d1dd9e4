//! The layouts of the reachability matrix: an instance `web`, whatever else is configured on it, and clients everywhere.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::Result;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::check::{Check, Expected};
use crate::forward::ROUTER_IPV6;
use crate::kernel::{self, Route, Rule};
use crate::lab::{Distribution, Lab, everything};
use crate::nat;
use crate::probe::{Bound, Kind, Probe};
use crate::scene::{Client, FORWARDED, Place, Scene, UNBOUND};
use crate::vpc::{CreateEni, EniId, SubnetId, VpcId};

pub struct Layout {
    pub name: &'static str,
    pub about: &'static str,
    pub build: fn(&Path) -> Result<Stage>,
}

/// A layout, built.
pub struct Stage {
    pub scene: Scene,
    /// Something else on the machine decides about what is not an ENI's that eniup configures: a full-tunnel VPN, say. Then
    /// unbound traffic and the primary's have to stay as they were, whatever that is.
    pub is_governed_by_others: bool,
    /// Exchanges that do not follow from the VPC alone.
    pub extra: Vec<Check>,
}

/// All layouts, in the order of the table.
pub const LAYOUTS: [Layout; 26] = [
    Layout { name: "distinct-subnets", about: "every ENI has a subnet to itself", build: distinct_subnets },
    Layout { name: "one-shared-subnet", about: "all ENIs are in the primary's subnet", build: one_shared_subnet },
    Layout { name: "two-of-three-share", about: "two secondary ENIs share a subnet", build: two_of_three_share },
    Layout { name: "ipv6-only-secondary", about: "a secondary ENI without IPv4", build: ipv6_only_secondary },
    Layout { name: "ipv4-only-primary", about: "IPv6 on a secondary ENI alone", build: ipv4_only_primary },
    Layout {
        name: "ipv6-only-instance",
        about: "no IPv4 anywhere, metadata by fd00:ec2::254",
        build: ipv6_only_instance,
    },
    Layout { name: "two-ipv6-cidrs", about: "subnets with two IPv6 CIDRs each", build: two_ipv6_cidrs },
    Layout {
        name: "delegated-prefixes",
        about: "containers with addresses of a /28 and a /80",
        build: delegated_prefixes,
    },
    Layout { name: "many-cards", about: "four network cards, device numbers repeat", build: many_cards },
    Layout { name: "32-cards", about: "64 ENIs on 32 cards", build: thirty_two_cards },
    Layout { name: "efa-only", about: "an ENI without address and link", build: efa_only },
    Layout {
        name: "dhcp-on-every-link",
        about: "connected routes and defaults of all ENIs in main",
        build: dhcp_everywhere,
    },
    Layout { name: "keepalived", about: "addresses are there with lifetimes or another length", build: keepalived },
    Layout {
        name: "foreign-link-group",
        about: "the second link is in somebody's group, and in main",
        build: foreign_group,
    },
    Layout { name: "strict-rp-filter", about: "reverse-path filtering on every link", build: strict_rp_filter },
    Layout { name: "nat-box", about: "source check off, a private subnet goes out through web", build: nat_box },
    Layout {
        name: "static-routes",
        about: "the user's routes through an instance and through an ENI",
        build: static_routes,
    },
    Layout { name: "openvpn", about: "halves of the internet in main", build: openvpn },
    Layout { name: "wg-quick", about: "a full tunnel by a rule after ours", build: wg_quick },
    Layout { name: "wg-quick-before", about: "a full tunnel by a rule before ours", build: wg_quick_before },
    Layout { name: "tailscale", about: "a tunnel's routes by a rule before ours", build: tailscale },
    Layout {
        name: "tailscale-exit-node",
        about: "a full tunnel by a rule before ours, metadata behind it",
        build: tailscale_exit_node,
    },
    Layout {
        name: "swapped-roles",
        about: "two instances, each secondary in the other's subnet",
        build: swapped_roles,
    },
    Layout { name: "overlapping-vpc", about: "an ENI of another VPC with the same CIDR", build: overlapping_vpc },
    Layout { name: "one-eni", about: "no second ENI, secondary addresses only", build: one_eni },
    Layout { name: "link-names-swapped", about: "the second ENI's link is named before the first's", build: renamed },
];

const INTERNET_IPV4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const INTERNET_IPV6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 7);
/// Host number of the client in each subnet.
const CLIENT: u16 = 100;

/// The families of a subnet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Families {
    Ipv4,
    Ipv6,
    Both,
    /// IPv4 and two IPv6 CIDRs.
    Three,
}

/// An ENI by its subnet's number and its hosts' numbers there.
#[derive(Clone, Copy)]
struct Plug<'a> {
    subnet: usize,
    ipv4s: &'a [u8],
    ipv6s: &'a [u16],
}

struct Builder {
    lab: Lab,
    vpc: VpcId,
    subnets: Vec<SubnetId>,
    families: Vec<Families>,
    clients: Vec<Client>,
    instances: Vec<String>,
    web: Vec<EniId>,
}

fn ipv6(subnet: usize, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2600, 0x1f16, 0x67f, 0xf200 + subnet as u16, 0, 0, 0, host)
}

/// The second IPv6 CIDR of a subnet.
fn second_cidr(subnet: usize) -> Result<Ipv6Net> {
    Ok(Ipv6Net::new(Ipv6Addr::new(0x2600, 0x1f16, 0x67f, 0xf280 + subnet as u16, 0, 0, 0, 0), 64)?)
}

impl Builder {
    /// A VPC with such subnets, 10.0.0.0/24 and on, and a peered one.
    fn new(eniup: &Path, families: &[Families]) -> Result<Builder> {
        let lab = Lab::new(eniup)?;
        let (vpc, subnets) = lab.fabric.world(|world| -> Result<_> {
            let vpc = world.create_vpc(&["10.0.0.0/16".parse()?, "2600:1f16:67f:f200::/56".parse()?]);
            let mut subnets = Vec::new();
            for (n, families) in families.iter().enumerate() {
                let ipv4 = Ipv4Net::new(Ipv4Addr::new(10, 0, n as u8, 0), 24)?;
                let ipv6 = Ipv6Net::new(ipv6(n, 0), 64)?;
                let ipv6s = match families {
                    Families::Ipv4 => vec![],
                    Families::Ipv6 | Families::Both => vec![ipv6],
                    Families::Three => vec![ipv6, second_cidr(n)?],
                };
                let ipv4 = (*families != Families::Ipv6).then_some(ipv4);
                subnets.push(world.create_subnet(&vpc, ipv4, &ipv6s)?);
            }
            Ok((vpc, subnets))
        })?;
        let families = families.to_vec();
        let (clients, instances, web) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Builder { lab, vpc, subnets, families, clients, instances, web })
    }

    fn create(&self, plug: Plug) -> CreateEni {
        CreateEni {
            subnet: self.subnets[plug.subnet].clone(),
            ipv4s: plug.ipv4s.iter().map(|host| Ipv4Addr::new(10, 0, plug.subnet as u8, *host)).collect(),
            ipv6s: plug.ipv6s.iter().map(|host| ipv6(plug.subnet, *host)).collect(),
            is_ipv6_only: plug.ipv4s.is_empty(),
            ..CreateEni::default()
        }
    }

    /// An elastic IP in front of the first address of each.
    fn enis(&mut self, plugs: &[Plug]) -> Result<Vec<EniId>> {
        let mut enis = Vec::new();
        for plug in plugs {
            let eni = self.lab.create_network_interface(self.create(*plug))?;
            if !plug.ipv4s.is_empty() {
                self.lab.elastic_ip(&eni, None)?;
            }
            enis.push(eni);
        }
        Ok(enis)
    }

    /// The instance under test with these ENIs, from the primary on.
    fn web(&mut self, plugs: &[Plug], distribution: Distribution) -> Result<()> {
        self.web = self.enis(plugs)?;
        self.lab.run_instance("web", &self.web, "m7i.24xlarge", distribution)?;
        self.instances.push("web".into());
        Ok(())
    }

    fn client(&mut self, name: &str, class: &str, create: CreateEni) -> Result<()> {
        let vpc = self.lab.world().subnet(&create.subnet)?.vpc.clone();
        let eni = self.lab.create_network_interface(create)?;
        let addresses = self.lab.world().eni(&eni)?.addresses();
        self.lab.run_instance(name, &[eni], "t3.micro", Distribution::Primary)?;
        self.clients.push(Client { node: name.into(), class: class.into(), addresses, place: Place::Vpc(vpc) });
        Ok(())
    }

    /// A client in each subnet, in a peered VPC and in the internet, and a container on the instance's bridge.
    fn clients(&mut self) -> Result<()> {
        let world = self.lab.world();
        let of_web: Vec<SubnetId> =
            self.web.iter().map(|eni| world.eni(eni).map(|eni| eni.subnet.clone())).collect::<Result<_>>()?;
        for (n, families) in self.families.clone().into_iter().enumerate() {
            let class = match of_web.iter().position(|subnet| *subnet == self.subnets[n]) {
                Some(0) => "primary's net",
                Some(_) => "ENI's net",
                None => "third net",
            };
            let ipv4s: &[u8] = if families == Families::Ipv6 { &[] } else { &[CLIENT as u8] };
            let ipv6s: &[u16] = if families == Families::Ipv4 { &[] } else { &[CLIENT] };
            let create = self.create(Plug { subnet: n, ipv4s, ipv6s });
            self.client(&format!("client{n}"), class, create)?;
        }
        let vpc = self.vpc.clone();
        let subnet = self.lab.fabric.world(|world| -> Result<SubnetId> {
            let other = world.create_vpc(&["172.31.0.0/16".parse()?, "2600:1f16:aaa:bb00::/56".parse()?]);
            world.peer(&vpc, &other);
            world.create_subnet(&other, Some("172.31.1.0/24".parse()?), &["2600:1f16:aaa:bb01::/64".parse()?])
        })?;
        let (ipv4s, ipv6s) = (vec![Ipv4Addr::new(172, 31, 1, 100)], vec!["2600:1f16:aaa:bb01::100".parse()?]);
        self.client("peer", "peer", CreateEni { subnet, ipv4s, ipv6s, ..CreateEni::default() })?;
        self.lab.add_internet_host("internet", Some(INTERNET_IPV4), Some(INTERNET_IPV6))?;
        let addresses = vec![INTERNET_IPV4.into(), INTERNET_IPV6.into()];
        self.clients.push(Client {
            node: "internet".into(),
            class: "internet".into(),
            addresses,
            place: Place::Internet,
        });
        let nets: [IpNet; 2] = ["172.17.0.2/16".parse()?, "fd17::2/64".parse()?];
        self.lab.add_container("container", "web", "docker0", &nets)?;
        self.on_web(|| nets.iter().try_for_each(|net| nat::masquerade(*net, "docker0")))?;
        self.clients.push(Client {
            node: "container".into(),
            class: "container".into(),
            addresses: nets.iter().map(IpNet::addr).collect(),
            place: Place::Container { on: "web".into(), is_masqueraded: true },
        });
        Ok(())
    }

    fn pod(&mut self, name: &str, addresses: &[IpAddr]) -> Result<()> {
        self.lab.add_pod(name, "web", addresses)?;
        let place = Place::Pod { on: "web".into() };
        self.clients.push(Client { node: name.into(), class: "pod".into(), addresses: addresses.into(), place });
        Ok(())
    }

    fn finish(self) -> Stage {
        let scene = Scene { lab: self.lab, instances: self.instances, clients: self.clients };
        Stage { scene, is_governed_by_others: false, extra: Vec::new() }
    }

    /// With all clients.
    fn stage(mut self) -> Result<Stage> {
        self.clients()?;
        Ok(self.finish())
    }

    fn on_web(&self, act: impl FnOnce() -> Result<()> + Send) -> Result<()> {
        self.lab.node("web")?.enter(act)
    }
}

const BOTH: [Families; 4] = [Families::Both; 4];

const PRIMARY: Plug = Plug { subnet: 0, ipv4s: &[10, 11], ipv6s: &[0x10, 0x11] };
const SECOND: Plug = Plug { subnet: 1, ipv4s: &[20, 21, 22], ipv6s: &[0x20, 0x21] };
const THIRD: Plug = Plug { subnet: 2, ipv4s: &[30, 31], ipv6s: &[0x30] };

fn three_enis(eniup: &Path, distribution: Distribution) -> Result<Builder> {
    let mut builder = Builder::new(eniup, &BOTH)?;
    builder.web(&[PRIMARY, SECOND, THIRD], distribution)?;
    Ok(builder)
}

fn distinct_subnets(eniup: &Path) -> Result<Stage> {
    three_enis(eniup, Distribution::Primary)?.stage()
}

fn one_shared_subnet(eniup: &Path) -> Result<Stage> {
    let mut builder = Builder::new(eniup, &BOTH[..2])?;
    let second = Plug { subnet: 0, ..SECOND };
    let third = Plug { subnet: 0, ..THIRD };
    builder.web(&[PRIMARY, second, third], Distribution::Primary)?;
    builder.stage()
}

fn two_of_three_share(eniup: &Path) -> Result<Stage> {
    let mut builder = Builder::new(eniup, &BOTH[..3])?;
    builder.web(&[PRIMARY, SECOND, Plug { subnet: 1, ..THIRD }], Distribution::Primary)?;
    builder.stage()
}

fn ipv6_only_secondary(eniup: &Path) -> Result<Stage> {
    let mut builder = Builder::new(eniup, &[Families::Both, Families::Ipv6, Families::Both])?;
    builder.web(&[PRIMARY, Plug { ipv4s: &[], ..SECOND }], Distribution::Primary)?;
    builder.stage()
}

fn ipv4_only_primary(eniup: &Path) -> Result<Stage> {
    let mut builder = Builder::new(eniup, &[Families::Ipv4, Families::Both, Families::Both])?;
    builder.web(&[Plug { ipv6s: &[], ..PRIMARY }, SECOND], Distribution::Primary)?;
    let mut stage = builder.stage()?;
    // Without a default of its own the machine could not use IPv6 unbound at all.
    for to in [IpAddr::from(ipv6(2, CLIENT)), INTERNET_IPV6.into()] {
        stage.extra.extend(asks_from(UNBOUND, "web", to, ipv6(1, 0x20).into()));
    }
    Ok(stage)
}

fn ipv6_only_instance(eniup: &Path) -> Result<Stage> {
    let mut builder = Builder::new(eniup, &[Families::Ipv6, Families::Ipv6, Families::Both])?;
    builder.web(&[Plug { ipv4s: &[], ..PRIMARY }, Plug { ipv4s: &[], ..SECOND }], Distribution::Primary)?;
    builder.stage()
}

fn two_ipv6_cidrs(eniup: &Path) -> Result<Stage> {
    let mut builder = Builder::new(eniup, &[Families::Three; 3])?;
    builder.web(&[PRIMARY, SECOND], Distribution::Primary)?;
    let other = |subnet| -> Result<IpAddr> {
        let base: u128 = second_cidr(subnet)?.network().into();
        Ok(Ipv6Addr::from(base + 0x77).into())
    };
    for (n, eni) in builder.web.clone().iter().enumerate() {
        builder.lab.assign(eni, &[other(n)?.into()], false)?;
    }
    builder.stage()
}

fn delegated_prefixes(eniup: &Path) -> Result<Stage> {
    let mut builder = Builder::new(eniup, &BOTH)?;
    builder.web(&[PRIMARY, SECOND, THIRD], Distribution::Primary)?;
    let ipv4 = "10.0.1.64/28".parse()?;
    let ipv6 = "2600:1f16:67f:f202:abcd::/80".parse()?;
    builder.lab.assign(&builder.web[1].clone(), &[ipv4], false)?;
    builder.lab.assign(&builder.web[2].clone(), &[ipv6], false)?;
    builder.pod("pod4", &["10.0.1.65".parse()?])?;
    builder.pod("pod6", &["2600:1f16:67f:f202:abcd::7".parse()?])?;
    builder.stage()
}

/// Attaches two ENIs on each card but the first, in turn in the subnets from 1 on.
fn fill_cards(builder: &mut Builder, cards: u32) -> Result<()> {
    let subnets = builder.subnets.len() - 2;
    for card in 1..cards {
        for device in 0..2 {
            let n = (card - 1) * 2 + device;
            let (subnet, host) = (1 + n as usize % subnets, 0x40 + (n as usize / subnets) as u8);
            let plug = Plug { subnet, ipv4s: &[host], ipv6s: &[host.into()] };
            let eni = builder.lab.create_network_interface(builder.create(plug))?;
            builder.lab.attach_network_interface(&eni, "web", card, device)?;
            builder.web.push(eni);
        }
    }
    Ok(())
}

fn many_cards(eniup: &Path) -> Result<Stage> {
    let mut builder = Builder::new(eniup, &BOTH)?;
    builder.web = builder.enis(&[PRIMARY, SECOND])?;
    builder.lab.run_instance("web", &builder.web, "p4d.24xlarge", Distribution::Primary)?;
    builder.instances.push("web".into());
    fill_cards(&mut builder, 4)?;
    builder.stage()
}

fn thirty_two_cards(eniup: &Path) -> Result<Stage> {
    let mut builder = Builder::new(eniup, &[Families::Both; 6])?;
    builder.web = builder.enis(&[PRIMARY, SECOND])?;
    builder.lab.run_instance("web", &builder.web, "p5.48xlarge", Distribution::Primary)?;
    builder.instances.push("web".into());
    fill_cards(&mut builder, 32)?;
    builder.stage()
}

fn efa_only(eniup: &Path) -> Result<Stage> {
    let mut builder = three_enis(eniup, Distribution::Primary)?;
    let create = CreateEni { subnet: builder.subnets[1].clone(), is_efa_only: true, ..CreateEni::default() };
    let eni = builder.lab.create_network_interface(create)?;
    builder.lab.attach_network_interface(&eni, "web", 0, 3)?;
    builder.stage()
}

fn dhcp_everywhere(eniup: &Path) -> Result<Stage> {
    three_enis(eniup, Distribution::AtLaunch)?.stage()
}

fn keepalived(eniup: &Path) -> Result<Stage> {
    // The first addresses are there from DHCP, with their lifetimes.
    let builder = three_enis(eniup, Distribution::AtLaunch)?;
    builder.on_web(|| {
        kernel::add_address("ens6", "10.0.1.21/24".parse()?, None)?;
        kernel::add_address("ens7", "10.0.2.31/30".parse()?, None)
    })?;
    builder.stage()
}

fn foreign_group(eniup: &Path) -> Result<Stage> {
    let builder = three_enis(eniup, Distribution::AtLaunch)?;
    builder.on_web(|| kernel::set_group("ens6", 42))?;
    builder.stage()
}

fn strict_rp_filter(eniup: &Path) -> Result<Stage> {
    let builder = three_enis(eniup, Distribution::Primary)?;
    for link in ["all", "default", "ens5", "ens6", "ens7"] {
        builder.lab.node("web")?.sysctl(&format!("ipv4/conf/{link}/rp_filter"), "1")?;
    }
    builder.stage()
}

/// A private subnet whose way out is the instance's second ENI, and a host in the third ENI's own subnet that has the
/// instance for its gateway; both masqueraded out of the primary.
fn nat_box(eniup: &Path) -> Result<Stage> {
    let builder = three_enis(eniup, Distribution::Primary)?;
    let (second, private) = (builder.web[1].clone(), builder.subnets[3].clone());
    builder.lab.fabric.world(|world| -> Result<()> {
        for eni in &builder.web {
            world.modify_source_dest_check(eni, false)?;
        }
        world.create_route(&private, everything(INTERNET_IPV4.into()), &second)
    })?;
    builder.on_web(|| {
        kernel::sysctl("ipv4/ip_forward", "1")?;
        nat::masquerade("10.0.3.0/24".parse()?, "ens6")?;
        nat::masquerade("10.0.2.0/24".parse()?, "ens7")
    })?;
    let web = builder.web[0].clone();
    let mut stage = builder.stage()?;
    let world = stage.scene.lab.world();
    for (public, _) in world.associations_of(&web) {
        for client in ["client2", "client3"] {
            stage.extra.extend(asks_from(FORWARDED, client, INTERNET_IPV4.into(), public.into()));
        }
    }
    // Forwarded packets of an ENI's own subnet must not be taken for what the machine itself sends.
    let by_web = Some(IpAddr::from([10, 0, 2, 30]));
    stage
        .scene
        .lab
        .node("client2")?
        .enter(|| kernel::add_route(&Route::new(IpAddr::from(INTERNET_IPV4).into(), by_web, "ens5")))?;
    Ok(stage)
}

/// Nets behind an instance: one that the user routes through that instance, one that he routes through the second ENI.
fn static_routes(eniup: &Path) -> Result<Stage> {
    let mut builder = three_enis(eniup, Distribution::Primary)?;
    let create = builder.create(Plug { subnet: 0, ipv4s: &[50], ipv6s: &[0x50] });
    let gateway = builder.lab.create_network_interface(create)?;
    builder.lab.run_instance("gateway", std::slice::from_ref(&gateway), "t3.micro", Distribution::Primary)?;
    builder.lab.fabric.world(|world| -> Result<()> {
        world.modify_source_dest_check(&gateway, false)?;
        for subnet in &builder.subnets {
            for net in ["192.168.77.0/24", "192.168.78.0/24", "fd77::/64", "fd78::/64"] {
                world.create_route(subnet, net.parse()?, &gateway)?;
            }
        }
        Ok(())
    })?;
    builder.lab.node("gateway")?.enter(|| {
        kernel::add_address("lo", "192.168.77.1/32".parse()?, None)?;
        kernel::add_address("lo", "192.168.78.1/32".parse()?, None)?;
        // On the link, or it could not ask for its neighbours from there until its link-local address is settled.
        kernel::add_address("ens5", "fd77::1/128".parse()?, None)?;
        kernel::add_address("ens5", "fd78::1/128".parse()?, None)
    })?;
    builder.on_web(|| {
        kernel::set_up("ens6")?;
        kernel::add_route(&Route::new("10.0.1.1/32".parse()?, None, "ens6"))?;
        let by_instance = Some(IpAddr::from([10, 0, 0, 50]));
        kernel::add_route(&Route::new("192.168.77.0/24".parse()?, by_instance, "ens5"))?;
        let by_eni = Some(IpAddr::from([10, 0, 1, 1]));
        kernel::add_route(&Route::new("192.168.78.0/24".parse()?, by_eni, "ens6"))?;
        let by_instance = Some(IpAddr::from(ipv6(0, 0x50)));
        kernel::add_route(&Route::new(IpAddr::from(ipv6(0, 0x50)).into(), None, "ens5"))?;
        kernel::add_route(&Route::new("fd77::/64".parse()?, by_instance, "ens5"))?;
        kernel::add_route(&Route::new("fd78::/64".parse()?, Some(ROUTER_IPV6.into()), "ens6"))
    })?;
    let place = Place::Behind(builder.vpc.clone());
    let addresses = vec![IpAddr::from([192, 168, 77, 1]), "fd77::1".parse()?];
    builder.clients.push(Client { node: "gateway".into(), class: "routed".into(), addresses, place });
    let mut stage = builder.stage()?;
    let by_eni = [IpAddr::from([192, 168, 78, 1]), "fd78::1".parse()?];
    // The kernel takes the first address of the link by which the user's route leaves.
    stage.extra.extend(asks_from(UNBOUND, "web", by_eni[0], IpAddr::from([10, 0, 1, 20])));
    stage.extra.extend(asks_from(UNBOUND, "web", by_eni[1], ipv6(1, 0x20).into()));
    for own in [[10, 0, 1, 21], [10, 0, 2, 30], [10, 0, 2, 31]].map(IpAddr::from) {
        stage.extra.extend(asks_bound(own, by_eni[0]));
    }
    for own in [ipv6(1, 0x21), ipv6(2, 0x30)].map(IpAddr::from) {
        stage.extra.extend(asks_bound(own, by_eni[1]));
    }
    Ok(stage)
}

/// A tunnel `tun0` of the instance to a node that answers for the internet's host, too, as what is behind a VPN does.
fn tunnel(builder: &mut Builder, own: Ipv4Net, other: Ipv4Addr) -> Result<()> {
    let own6 = Ipv6Net::new(Ipv6Addr::new(0xfd08, 0, 0, 0, 0, 0, 0, 2), 64)?;
    let other6 = Ipv6Addr::new(0xfd08, 0, 0, 0, 0, 0, 0, 1);
    builder.lab.add_tunnel("vpn", "web", "tun0", &[own.into(), own6.into()], &[other.into(), other6.into()])?;
    builder.lab.node("vpn")?.enter(|| {
        kernel::answer_for(IpAddr::from(INTERNET_IPV4).into())?;
        kernel::answer_for(IpAddr::from(INTERNET_IPV6).into())
    })?;
    let place = Place::Container { on: "web".into(), is_masqueraded: false };
    let addresses = vec![other.into(), other6.into()];
    builder.clients.push(Client { node: "vpn".into(), class: "tunnel".into(), addresses, place });
    Ok(())
}

fn openvpn(eniup: &Path) -> Result<Stage> {
    let mut builder = three_enis(eniup, Distribution::Primary)?;
    tunnel(&mut builder, "10.8.0.2/24".parse()?, Ipv4Addr::new(10, 8, 0, 1))?;
    builder.on_web(|| {
        let by = |address: &str| -> Result<Option<IpAddr>> { Ok(Some(address.parse()?)) };
        kernel::add_route(&Route::new("0.0.0.0/1".parse()?, by("10.8.0.1")?, "tun0"))?;
        kernel::add_route(&Route::new("128.0.0.0/1".parse()?, by("10.8.0.1")?, "tun0"))?;
        kernel::add_route(&Route::new("2000::/3".parse()?, by("fd08::1")?, "tun0"))?;
        kernel::add_route(&Route::new("fc00::/7".parse()?, by("fd08::1")?, "tun0"))
    })?;
    // A client that wants metadata keeps it outside the tunnel, as AWS advises.
    keep_metadata_outside(&builder)?;
    governed(builder)
}

fn governed(builder: Builder) -> Result<Stage> {
    let mut stage = builder.stage()?;
    stage.is_governed_by_others = true;
    Ok(stage)
}

fn keep_metadata_outside(builder: &Builder) -> Result<()> {
    builder.on_web(|| {
        kernel::add_route(&Route::new("169.254.169.254/32".parse()?, Some(IpAddr::from([10, 0, 0, 1])), "ens5"))
    })
}

fn wg_quick(eniup: &Path) -> Result<Stage> {
    wireguard(eniup, 32_766)
}

/// The kernel gives rules without a priority the one before the first there is, which is the guard's once eniup has run.
fn wg_quick_before(eniup: &Path) -> Result<Stage> {
    wireguard(eniup, 19_900)
}

fn wireguard(eniup: &Path, first_priority: u32) -> Result<Stage> {
    const TABLE: u32 = 51_820;
    let mut builder = three_enis(eniup, Distribution::Primary)?;
    tunnel(&mut builder, "10.8.0.2/24".parse()?, Ipv4Addr::new(10, 8, 0, 1))?;
    builder.on_web(|| {
        for is_ipv6 in [false, true] {
            let gateway: IpAddr = if is_ipv6 { "fd08::1".parse()? } else { "10.8.0.1".parse()? };
            let route = Route::new(everything(gateway), Some(gateway), "tun0");
            kernel::add_route(&Route { table: TABLE, ..route })?;
            let main = Rule::new(is_ipv6, first_priority - 2, kernel::MAIN);
            kernel::add_rule(&Rule { suppress_prefix_length: Some(0), ..main })?;
            let tunnel = Rule::new(is_ipv6, first_priority - 1, TABLE);
            kernel::add_rule(&Rule { mark: Some((0xca6c, u32::MAX)), is_inverted: true, ..tunnel })?;
        }
        Ok(())
    })?;
    keep_metadata_outside(&builder)?;
    governed(builder)
}

fn tailscale(eniup: &Path) -> Result<Stage> {
    tailscaled(eniup, false)?.stage()
}

fn tailscale_exit_node(eniup: &Path) -> Result<Stage> {
    governed(tailscaled(eniup, true)?)
}

fn tailscaled(eniup: &Path, has_exit_node: bool) -> Result<Builder> {
    const TABLE: u32 = 52;
    /// What tailscaled marks its own packets with.
    const MARK: (u32, u32) = (0x80000, 0xff0000);
    let mut builder = three_enis(eniup, Distribution::Primary)?;
    tunnel(&mut builder, "100.64.0.2/32".parse()?, Ipv4Addr::new(100, 64, 0, 1))?;
    builder.on_web(|| {
        for is_ipv6 in [false, true] {
            for (priority, table) in [(5210, kernel::MAIN), (5230, 253)] {
                kernel::add_rule(&Rule { mark: Some(MARK), ..Rule::new(is_ipv6, priority, table) })?;
            }
            kernel::add_rule(&Rule::new(is_ipv6, 5270, TABLE))?;
        }
        let everything: &[&str] = if has_exit_node { &["0.0.0.0/0", "::/0"] } else { &[] };
        for net in ["100.64.0.1/32", "100.100.100.100/32", "192.168.99.0/24"].iter().chain(everything) {
            kernel::add_route(&Route { table: TABLE, ..Route::new(net.parse()?, None, "tun0") })?;
        }
        Ok(())
    })?;
    Ok(builder)
}

fn swapped_roles(eniup: &Path) -> Result<Stage> {
    let mut builder = Builder::new(eniup, &BOTH[..3])?;
    builder.web(&[PRIMARY, SECOND], Distribution::Primary)?;
    let first = Plug { subnet: 1, ipv4s: &[40, 41], ipv6s: &[0x40] };
    let second = Plug { subnet: 0, ipv4s: &[50, 51], ipv6s: &[0x50] };
    let mirror = builder.enis(&[first, second])?;
    builder.lab.run_instance("mirror", &mirror, "m7i.large", Distribution::Primary)?;
    builder.instances.push("mirror".into());
    // Each is the other's client, from its unbound address on.
    let world = builder.lab.world();
    for (node, enis) in [("web", &builder.web), ("mirror", &mirror)] {
        let primary = world.eni(&enis[0])?.addresses();
        let place = Place::Vpc(builder.vpc.clone());
        builder.clients.push(Client { node: node.into(), class: "each other".into(), addresses: primary, place });
    }
    builder.stage()
}

/// The second ENI is of another VPC, whose subnet has the same IPv4 CIDR, and a client there has the address of one here.
/// IPv6 CIDRs are Amazon's, and no two VPCs have the same.
fn overlapping_vpc(eniup: &Path) -> Result<Stage> {
    let mut builder = Builder::new(eniup, &BOTH[..2])?;
    let net6 = |host| Ipv6Addr::new(0x2600, 0x1f16, 0xccc, 0xdd00, 0, 0, 0, host);
    let other = builder.lab.fabric.world(|world| -> Result<SubnetId> {
        let vpc = world.create_vpc(&["10.0.0.0/16".parse()?, "2600:1f16:ccc:dd00::/56".parse()?]);
        world.create_subnet(&vpc, Some("10.0.0.0/24".parse()?), &[Ipv6Net::new(net6(0), 64)?])
    })?;
    let create = |hosts: &[u8]| CreateEni {
        subnet: other.clone(),
        ipv4s: hosts.iter().map(|host| Ipv4Addr::new(10, 0, 0, *host)).collect(),
        ipv6s: hosts.iter().map(|host| net6((*host).into())).collect(),
        ..CreateEni::default()
    };
    let second = builder.lab.create_network_interface(create(&[20, 21]))?;
    let mut enis = builder.enis(&[PRIMARY])?;
    enis.push(second);
    builder.web.clone_from(&enis);
    builder.lab.run_instance("web", &enis, "m7i.large", Distribution::Primary)?;
    builder.instances.push("web".into());
    builder.client("other-vpc", "ENI's net", create(&[CLIENT as u8]))?;
    builder.stage()
}

fn one_eni(eniup: &Path) -> Result<Stage> {
    let mut builder = Builder::new(eniup, &BOTH[..2])?;
    builder.web(&[PRIMARY], Distribution::Primary)?;
    builder.stage()
}

fn renamed(eniup: &Path) -> Result<Stage> {
    let mut builder = three_enis(eniup, Distribution::Primary)?;
    builder.lab.rename_link(&builder.web[1].clone(), "eth0")?;
    builder.stage()
}

fn asks_from(class: &str, from: &str, to: IpAddr, seen: IpAddr) -> [Check; 3] {
    Kind::ALL.map(|kind| Check {
        row: from.into(),
        column: class.into(),
        probe: Probe { from: from.into(), bound: Bound::Nothing, to, kind },
        expected: Expected::seen_as(seen),
    })
}

fn asks_bound(own: IpAddr, to: IpAddr) -> [Check; 3] {
    Kind::ALL.map(|kind| Check {
        row: format!("bound to {own}"),
        column: crate::scene::BY_ADDRESS.into(),
        probe: Probe { from: "web".into(), bound: Bound::Address(own), to, kind },
        expected: Expected::seen_as(own),
    })
}
