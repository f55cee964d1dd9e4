//! A machine's metadata, truth and service, for the tests of the client and for its figures.
#![allow(dead_code)] // The tests and the figures each use their own part.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use eniup::imds::{Error, Imds, Scope, Surroundings};
use eniup::metadata::{Answer, ROUTING_KEYS, Tree, eni_directory};
use eniup::net::MacAddr;
use tokio::time::Instant;
use vpc_lab::imds::{Faults, Occurrences, Rule, Service};
use vpc_lab::metadata::{EniView, InstanceView, Published, render};

/// An IPv4 ENI; the n-th of the machine, the primary being 0.
pub fn eni(n: u8) -> EniView {
    EniView {
        mac: mac(n).to_string(),
        interface_id: format!("eni-{n:017x}"),
        device_number: n.into(),
        network_card: None,
        owner_id: "123456789012".into(),
        subnet_id: format!("subnet-{n:017x}"),
        vpc_id: "vpc-0123456789abcdef0".into(),
        local_ipv4s: vec![Ipv4Addr::new(10, 0, n, 10)],
        ipv6s: Vec::new(),
        ipv4_prefixes: Vec::new(),
        ipv6_prefixes: Vec::new(),
        subnet_ipv4_cidr: Some(format!("10.0.{n}.0/24").parse().unwrap()),
        subnet_ipv6_cidrs: Vec::new(),
        vpc_ipv4_cidrs: vec!["10.0.0.0/16".parse().unwrap()],
        vpc_ipv6_cidrs: Vec::new(),
        associations: Vec::new(),
        security_groups: vec![("with a space".into(), "sg-1".into())],
    }
}

/// An ENI of both families on a machine of several cards.
pub fn dual_stack_eni(n: u8) -> EniView {
    EniView {
        network_card: Some(n as u32 / 8),
        device_number: n as u32 % 8,
        ipv6s: vec![Ipv6Addr::new(0x2600, 0x1f16, 0x67f, n.into(), 0, 0, 0, 0x10)],
        subnet_ipv6_cidrs: vec![format!("2600:1f16:67f:{n:x}::/64").parse().unwrap()],
        ..eni(n)
    }
}

pub fn mac(n: u8) -> MacAddr {
    MacAddr::from_bytes(&[2, 0, 0, 0, 1, n]).unwrap()
}

pub fn machine(enis: Vec<EniView>) -> InstanceView {
    InstanceView {
        instance_id: "i-0123456789abcdef0".into(),
        instance_type: "m5.large".into(),
        primary_mac: enis[0].mac.clone(),
        availability_zone: "us-east-1a".into(),
        enis,
    }
}

/// The links of a machine whose links are all there.
pub fn all_links(view: &InstanceView) -> Surroundings {
    let links = view.enis.iter().enumerate().map(|(n, eni)| (eni.mac.parse().unwrap(), format!("eth{n}")));
    Surroundings { links: links.collect(), is_ipv6_only: false }
}

/// A metadata service in good health, until told otherwise.
pub struct Lab {
    pub view: InstanceView,
    pub tree: Arc<Mutex<Published>>,
    pub service: Service,
    pub endpoint: String,
}

impl Lab {
    /// On 127.0.0.1.
    pub fn new(enis: Vec<EniView>) -> Lab {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        Lab::serving(enis, vec![listener], endpoint)
    }

    pub fn serving(enis: Vec<EniView>, listeners: Vec<TcpListener>, endpoint: String) -> Lab {
        let view = machine(enis);
        let tree = Arc::new(Mutex::new(Published::new()));
        tree.lock().unwrap().publish_without_delay(&view);
        Lab { service: Service::start(listeners, tree.clone()), tree, view, endpoint }
    }

    pub fn fault(&self, rules: Vec<Rule>) {
        self.service.set_faults(Faults { rules, ..Faults::default() });
    }

    pub async fn connect(&self, seconds: f64) -> Result<Imds, Error> {
        self.connect_with(&Surroundings::default(), seconds).await
    }

    pub async fn connect_with(&self, surroundings: &Surroundings, seconds: f64) -> Result<Imds, Error> {
        let deadline = Instant::now() + Duration::from_secs_f64(seconds);
        Imds::connect(Some(&self.endpoint), surroundings, deadline).await
    }

    pub async fn snapshot(&self, seconds: f64) -> Result<Tree, Error> {
        self.connect(seconds).await?.snapshot(Scope::Routing).await
    }

    /// Every routing key of every ENI: what the client says, and the truth.
    pub fn keys(&self, tree: &Tree) -> BTreeMap<String, (Answer, Option<String>)> {
        let truth = render(&self.view);
        let macs = self.view.enis.iter().map(|eni| eni.mac.parse().unwrap());
        let paths = macs.flat_map(|mac| ROUTING_KEYS.map(|key| format!("{}{key}", eni_directory(mac))));
        paths
            .chain(["mac".to_string()])
            .map(|path| (path.clone(), (tree.get(&path), truth.get(&path).cloned())))
            .collect()
    }

    /// Nothing that the client is certain of may be wrong; gives the number of keys that it does not know.
    pub fn unknown_keys(&self, tree: &Tree) -> Result<usize> {
        let mut unknown = 0;
        for (path, (answer, truth)) in self.keys(tree) {
            match answer {
                Answer::Present(body) => ensure!(truth.as_ref() == Some(&body), "{path}: {body:?} for {truth:?}"),
                Answer::Absent => ensure!(truth.is_none(), "{path}: absent for {truth:?}"),
                Answer::Unknown(_) => unknown += 1,
            }
        }
        Ok(unknown)
    }
}

pub fn rule(path: &str, occurrences: Occurrences, action: vpc_lab::imds::Action) -> Rule {
    Rule::new(path, occurrences, action)
}

/// On a runtime like the program's.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// ip(8), which has to succeed.
pub fn ip(arguments: &str) -> Result<()> {
    let output =
        Command::new("ip").args(arguments.split_whitespace()).output().context("running ip: install iproute2")?;
    ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Moves this thread into a network namespace of its own, whose loopback is up.
pub fn enter_namespace() -> Result<()> {
    // SAFETY: unshare moves this thread alone into a new network namespace.
    ensure!(unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0, "unshare: {}", std::io::Error::last_os_error());
    ip("link set lo up")
}

/// A link by this name in this thread's namespace, whose other end is in a namespace where `far` is done.
pub fn plug<T: Send + 'static>(
    name: &str,
    mac: MacAddr,
    far: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    // SAFETY: gettid always succeeds.
    let here = unsafe { libc::gettid() };
    let link = format!("link add {name} address {mac} type veth peer name far");
    let thread = std::thread::spawn(move || {
        enter_namespace()?;
        ip(&link)?;
        ip(&format!("link set {} netns {here}", link.split_whitespace().nth(2).unwrap_or_default()))?;
        ip("link set far up")?;
        far()
    });
    let result = thread.join().expect("the far end's thread panicked")?;
    ip(&format!("link set {name} up"))?;
    Ok(result)
}

/// The far end of an ENI's link: the VPC with its metadata service, on both its addresses.
pub fn metadata_listeners() -> Result<Vec<TcpListener>> {
    for address in ["169.254.169.254/32", "fd00:ec2::254/128 nodad", "10.0.0.1/24", "fd99::1/64 nodad"] {
        ip(&format!("addr add {address} dev far"))?;
    }
    Ok(vec![TcpListener::bind("169.254.169.254:80")?, TcpListener::bind("[fd00:ec2::254]:80")?])
}

/// Packets that the link has sent and received.
pub fn packets(link: &str) -> Result<(u64, u64)> {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    let line = table.lines().find_map(|line| line.trim().strip_prefix(link)?.strip_prefix(':'));
    let columns: Vec<u64> =
        line.context("no such link")?.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    Ok((columns[9], columns[1]))
}

/// The most packets that passed in any second.
#[derive(Clone, Copy, Debug, Default)]
pub struct Peak {
    pub sent: u64,
    pub both: u64,
}

/// Counts what passes by a link of this namespace while the work is done.
pub fn watching<T>(link: &str, work: impl FnOnce() -> Result<T>) -> Result<(T, Peak)> {
    let is_done = AtomicBool::new(false);
    let watch = || {
        let mut samples = Vec::new();
        loop {
            let is_last = is_done.load(Ordering::Relaxed);
            samples.push((Instant::now(), packets(link)?));
            if is_last {
                return anyhow::Ok(peak(&samples));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    std::thread::scope(|scope| {
        let watcher = scope.spawn(watch);
        let result = work();
        is_done.store(true, Ordering::Relaxed);
        Ok((result?, watcher.join().expect("the watcher panicked")?))
    })
}

fn peak(samples: &[(Instant, (u64, u64))]) -> Peak {
    let mut peak = Peak::default();
    for (n, (start, (sent, received))) in samples.iter().enumerate() {
        let within = samples[n..].iter().take_while(|(time, _)| *time <= *start + Duration::from_secs(1));
        if let Some((_, (last_sent, last_received))) = within.last() {
            peak.sent = peak.sent.max(last_sent - sent);
            peak.both = peak.both.max(last_sent - sent + last_received - received);
        }
    }
    peak
}
