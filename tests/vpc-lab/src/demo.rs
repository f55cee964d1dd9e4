//! The main job on a fresh machine: an instance with a primary ENI and three more, before and after `eniup reconcile`,
//! then an ENI attached while it runs, an address moved to a standby and an ENI moved to it.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::check;
use crate::lab::{Distribution, Lab};
use crate::metadata::Propagation;
use crate::probe::{Bound, Kind, Probe};
use crate::scene::{Client, Place, Scene};
use crate::table::{Style, has_colour, paint};
use crate::vpc::{CreateEni, EniId};

/// An exchange that is not answered within this time never will be: the whole VPC is on one machine.
const PATIENCE: Duration = Duration::from_millis(700);

/// From attaching an ENI until metadata has the last of its keys. On EC2 it takes seconds; the demo does not want to.
const PROPAGATION: Duration = Duration::from_millis(400);

/// The internet's host.
pub const INTERNET_IPV4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
pub const INTERNET_IPV6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 7);

/// A container on a bridge of `web`, and one with an address of the delegated prefix.
const DOCKER: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 2);
const POD: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 65);

const GROUP: (&str, &str) = ("web servers", "sg-0123456789abcdef0");

/// The VPC of the demo.
pub struct Demo {
    pub scene: Scene,
    subnets: [String; 4],
    /// The ENIs of the instance `web`, from its primary one on.
    web: Vec<EniId>,
    /// The primary ENI of the instance `standby`.
    standby: EniId,
}

/// Builds the VPC: an instance with four ENIs, a standby, and clients everywhere.
///
/// # Errors
/// The machine lacks what a lab needs.
pub fn build(eniup: impl Into<std::path::PathBuf>) -> Result<Demo> {
    let mut lab = Lab::new(eniup)?;
    let v6 = |net: u16| Ipv6Net::new(Ipv6Addr::new(0x2600, 0x1f16, 0x67f, 0xf200 + net, 0, 0, 0, 0), 64);
    let (vpc, subnets, peer_vpc, peer) = lab.fabric.world(|world| -> Result<_> {
        let cidr6: IpNet = "2600:1f16:67f:f200::/56".parse()?;
        let vpc = world.create_vpc(&["10.0.0.0/16".parse()?, cidr6]);
        let mut subnets = Vec::new();
        for n in 0..4u8 {
            let ipv4 = Ipv4Net::new(Ipv4Addr::new(10, 0, n, 0), 24)?;
            subnets.push(world.create_subnet(&vpc, Some(ipv4), &[v6(n.into())?])?);
        }
        let other = world.create_vpc(&["172.31.0.0/16".parse()?]);
        let peer = world.create_subnet(&other, Some("172.31.1.0/24".parse()?), &[])?;
        world.peer(&vpc, &other);
        Ok((vpc, subnets, other, peer))
    })?;
    let subnets: [String; 4] = subnets.try_into().map_err(|_| anyhow::anyhow!("four subnets were made"))?;

    let eni = |subnet: usize, hosts: &[u8], hosts6: &[u16]| CreateEni {
        subnet: subnets[subnet].clone(),
        ipv4s: hosts.iter().map(|host| Ipv4Addr::new(10, 0, subnet as u8, *host)).collect(),
        ipv6s: hosts6.iter().map(|host| address6(subnet as u16, *host)).collect(),
        security_groups: vec![(GROUP.0.into(), GROUP.1.into())],
        ..CreateEni::default()
    };
    let prefix = Ipv4Net::new(Ipv4Addr::new(10, 0, 2, 64), 28)?;
    let creates = [
        eni(0, &[10, 11], &[0x10]),
        eni(0, &[20, 21, 22], &[]),
        eni(1, &[30, 31], &[0x30, 0x31]),
        CreateEni { ipv4_prefixes: vec![prefix], ..eni(2, &[40], &[]) },
    ];
    let web: Vec<EniId> =
        creates.into_iter().map(|create| lab.create_network_interface(create)).collect::<Result<_>>()?;
    for (n, private) in [(0, None), (1, None), (1, Some(Ipv4Addr::new(10, 0, 0, 21))), (2, None), (3, None)] {
        lab.elastic_ip(&web[n], private)?;
    }
    lab.run_instance("web", &web, "m7i.large", Distribution::AtLaunch)?;
    lab.add_container("docker", "web", "docker0", &[Ipv4Net::new(DOCKER, 16)?.into()])?;
    lab.add_pod("pod", "web", &[POD.into()])?;

    let standby = lab.create_network_interface(eni(0, &[50], &[0x50]))?;
    lab.run_instance("standby", std::slice::from_ref(&standby), "m7i.large", Distribution::Primary)?;
    let mut clients = Vec::new();
    for (name, subnet) in [("subnet-a", 0), ("subnet-b", 1), ("subnet-d", 3)] {
        let create = eni(subnet, &[100], &[0x100]);
        clients.push(client(&mut lab, name, &vpc, create)?);
    }
    let ipv4s = vec![Ipv4Addr::new(172, 31, 1, 100)];
    clients.push(client(&mut lab, "peer", &peer_vpc, CreateEni { subnet: peer, ipv4s, ..CreateEni::default() })?);
    lab.add_internet_host("internet", Some(INTERNET_IPV4), Some(INTERNET_IPV6))?;
    let addresses = vec![INTERNET_IPV4.into(), INTERNET_IPV6.into()];
    clients.push(Client { node: "internet".into(), class: "internet".into(), addresses, place: Place::Internet });
    let place = Place::Container { on: "web".into(), is_masqueraded: false };
    clients.push(Client { node: "docker".into(), class: "docker".into(), addresses: vec![DOCKER.into()], place });
    let place = Place::Pod { on: "web".into() };
    clients.push(Client { node: "pod".into(), class: "pod".into(), addresses: vec![POD.into()], place });
    let scene = Scene { lab, instances: vec!["web".into(), "standby".into()], clients };
    Ok(Demo { scene, subnets, web, standby })
}

/// An instance with one ENI that only asks and answers.
fn client(lab: &mut Lab, name: &str, vpc: &str, create: CreateEni) -> Result<Client> {
    let eni = lab.create_network_interface(create)?;
    let addresses = lab.world().eni(&eni)?.addresses();
    lab.run_instance(name, &[eni], "t3.micro", Distribution::Primary)?;
    Ok(Client { node: name.into(), class: name.into(), addresses, place: Place::Vpc(vpc.into()) })
}

fn address6(net: u16, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2600, 0x1f16, 0x67f, 0xf200 + net, 0, 0, 0, host)
}

/// Says what is being done, and how long it took.
pub fn step<T>(what: &str, act: impl FnOnce() -> Result<T>) -> Result<T> {
    eprint!("{what} … ");
    let started = Instant::now();
    let result = act();
    match &result {
        Ok(_) => eprintln!("{}", took(started.elapsed())),
        Err(_) => eprintln!("failed"),
    }
    result
}

fn took(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds < 1.0 => format!("{:.0} ms", seconds * 1000.0),
        seconds => format!("{seconds:.1} s"),
    }
}

/// Plays the demo; gives whether every cell that had to be right was right.
///
/// # Errors
/// Something could not even be tried.
pub fn play(eniup: impl Into<std::path::PathBuf>) -> Result<bool> {
    let mut demo = step("building a VPC with two instances, clients and an internet", || build(eniup))?;
    let mut is_right = true;
    demo.describe()?;

    heading("Before: every link configured by DHCP, as stock images do it, and nothing else");
    demo.look("before", false)?;

    heading("eniup reconcile");
    demo.scene.lab.fabric.forget_drops();
    demo.reconcile("web")?;
    demo.reconcile("standby")?;
    is_right &= demo.is_clean();

    heading("After");
    is_right &= demo.look("after", true)?;

    heading("An ENI is attached while the instance runs");
    is_right &= demo.attach_while_running()?;
    heading("A secondary address moves to the standby: the classic failover");
    is_right &= demo.move_address()?;
    heading("An ENI moves to the standby with all its addresses");
    is_right &= demo.move_eni()?;

    heading("At the end");
    is_right &= demo.look("at the end", true)?;
    let verdict = match is_right {
        true => paint("Every exchange is right, and nothing left by a wrong ENI.", Style::Good, has_colour()),
        false => paint("Something is wrong: see above.", Style::Bad, has_colour()),
    };
    println!("{verdict}");
    println!("\nGo on by hand in the same VPC: cargo run --release -p vpc-lab -- shell");
    Ok(is_right)
}

fn heading(text: &str) {
    println!("\n{}", paint(text, Style::Bold, has_colour()));
    // A pipe buffers; progress on stderr would overtake it.
    let _ = std::io::stdout().flush();
}

impl Demo {
    fn describe(&self) -> Result<()> {
        let world = self.scene.lab.world();
        for (name, id) in self.scene.lab.instances().filter(|(name, _)| ["web", "standby"].contains(name)) {
            println!("{name} ({id})");
            for eni in world.enis_of(id) {
                let subnet = world.subnet(&eni.subnet)?;
                let link = self.scene.lab.link_of(&eni.id).map_or("?", |(_, link)| link);
                let nets = subnet.ipv4.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
                let addresses = eni.ipv4s.len() + eni.ipv6s.len();
                let elastic = world.associations_of(&eni.id).len();
                let prefixes: Vec<String> = eni.ipv4_prefixes.iter().map(|net| format!(", prefix {net}")).collect();
                println!(
                    "  {link}  {}  in {nets}, {addresses} addresses, {elastic} elastic{}",
                    eni.id,
                    prefixes.join("")
                );
            }
        }
        Ok(())
    }

    /// Both tables, and what the VPC dropped meanwhile.
    pub fn look(&self, when: &str, must_be_right: bool) -> Result<bool> {
        let mut is_right = true;
        self.scene.lab.fabric.forget_drops();
        for (title, checks) in self.scene.tables() {
            let label = format!("{when}: {} exchanges", checks.len());
            let faults = step(&label, || check::run(&self.scene.lab, &checks, PATIENCE))?;
            println!("{}", check::table(title, &checks, &faults));
            let wrong: Vec<&String> = faults.iter().flatten().collect();
            is_right &= wrong.is_empty();
            if must_be_right {
                wrong.iter().take(10).for_each(|fault| println!("  wrong: {fault}"));
            }
        }
        let dropped = self.scene.lab.fabric.source_drops();
        let dropped_style = if dropped == 0 { Style::Good } else { Style::Bad };
        let text = format!("{dropped} packets dropped by the VPC's source check");
        println!("{}", paint(&text, dropped_style, has_colour()));
        if must_be_right && dropped > 0 {
            self.scene.lab.fabric.last_drops().iter().rev().take(5).for_each(|drop| println!("  {drop}"));
        }
        Ok(is_right && dropped == 0)
    }

    fn reconcile(&self, name: &str) -> Result<Duration> {
        let started = Instant::now();
        let output = self.scene.lab.eniup(name, &["reconcile"])?;
        let elapsed = started.elapsed();
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "eniup reconcile on {name} ({}):\n{stderr}", output.status);
        let changes = stderr.lines().filter(|line| line.contains("# ")).count();
        println!("{name}: {changes} changes in {}", took(elapsed));
        Ok(elapsed)
    }

    /// Runs `eniup reconcile` on these nodes while asking an address until it answers, the time counted from `since`.
    fn first_answer(&self, to: IpAddr, reconcile: &[&str], since: Instant) -> Result<bool> {
        let probe = Probe { from: "subnet-d".into(), bound: Bound::Nothing, to, kind: Kind::Udp };
        std::thread::scope(|scope| {
            let runs: Vec<_> = reconcile.iter().map(|name| scope.spawn(|| self.reconcile(name))).collect();
            let mut answered = None;
            while answered.is_none() && since.elapsed() < Duration::from_secs(20) {
                let outcome = self.scene.lab.probe(std::slice::from_ref(&probe), Duration::from_millis(20))?;
                answered = outcome[0].is_answer_of(to).then(|| since.elapsed());
            }
            for run in runs {
                run.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
            }
            match answered {
                Some(time) => println!("first answer of {to} after {}", took(time)),
                None => println!("{to} never answered"),
            }
            Ok(answered.is_some())
        })
    }

    fn attach_while_running(&mut self) -> Result<bool> {
        let create = CreateEni {
            subnet: self.subnets[3].clone(),
            ipv4s: vec![Ipv4Addr::new(10, 0, 3, 60), Ipv4Addr::new(10, 0, 3, 61)],
            ipv6s: vec![address6(3, 0x60)],
            ..CreateEni::default()
        };
        let eni = self.scene.lab.create_network_interface(create)?;
        let of_key = |name: &str, share: u32| (name.to_string(), PROPAGATION * share / 4);
        let overrides = [of_key("interface-id", 1), of_key("device-number", 2), of_key("local-ipv4s", 3)].into();
        let propagation = Propagation { delay: PROPAGATION, overrides, ..Propagation::default() };
        self.scene.lab.set_propagation("web", propagation)?;
        let since = Instant::now();
        self.scene.lab.attach_network_interface(&eni, "web", 0, 4)?;
        println!("metadata takes {} to know all of it, key by key", took(PROPAGATION));
        let is_right = self.first_answer(IpAddr::from([10, 0, 3, 60]), &["web"], since)?;
        self.scene.lab.set_propagation("web", Propagation::default())?;
        self.web.push(eni);
        Ok(is_right && self.is_clean())
    }

    fn move_address(&mut self) -> Result<bool> {
        let address = IpAddr::from([10, 0, 0, 22]);
        let since = Instant::now();
        self.scene.lab.assign(&self.standby.clone(), &[address.into()], true)?;
        let is_right = self.first_answer(address, &["standby", "web"], since)?;
        Ok(is_right && self.is_clean())
    }

    fn move_eni(&mut self) -> Result<bool> {
        let eni = self.web.get(2).context("web has a third ENI")?.clone();
        let since = Instant::now();
        self.scene.lab.move_network_interface(&eni, "standby", 0, 1)?;
        let is_right = self.first_answer(IpAddr::from([10, 0, 1, 30]), &["standby", "web"], since)?;
        Ok(is_right && self.is_clean())
    }

    /// Whether nothing of the instances' own was dropped since the last look. What a container host forwards towards an
    /// address that it does not have yet does not count: the VPC delivers before anybody can know.
    fn is_clean(&self) -> bool {
        let misrouted = self.scene.lab.fabric.misrouted();
        if misrouted > 0 {
            println!("{misrouted} packets left by the wrong ENI meanwhile: {:#?}", self.scene.lab.fabric.last_drops());
        }
        misrouted == 0
    }
}
