//! A machine of so many ENIs in this namespace, on which eniup really runs.
#![allow(dead_code)] // Each benchmark uses its own part.

use std::fs::{self, File};
use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use eniup::config::Config;
use eniup::desired::desired;
use eniup::metadata::attached;
use eniup::netlink::Netlink;
use eniup::operation::{LinkChange, Operation};
use eniup::plan::{Plan, plan};
use tempfile::NamedTempFile;
use vpc_lab::cost::{Cost, times};
use vpc_lab::interposer::{self, Datagram, Message};

use super::eniup;
use super::lab::{Lab, block_on, enter_namespace, ip, mac, metadata_listeners, plug};
use super::machine::Size;
use super::netlink::Cpu;

/// The primary's own address, by DHCP.
const BOOTED: &str = "10.0.0.10/24";

pub struct Instance {
    pub size: Size,
    pub lab: Lab,
    /// The other ends of its links but the primary's.
    _far: Option<File>,
}

impl Instance {
    pub fn new(size: Size) -> Result<Instance> {
        ip("link set lo up")?;
        let listeners = plug("eth0", mac(0), metadata_listeners)?;
        ip(&format!("addr add {BOOTED} dev eth0"))?;
        ip("route add default via 10.0.0.1")?;
        let far = plug_secondaries(size.enis)?;
        let lab = Lab::serving(size.enis(), listeners, String::new());
        // The link has only just come up, and the first packet of all may be lost.
        drop(TcpStream::connect("169.254.169.254:80")?);
        Ok(Instance { size, lab, _far: far })
    }

    /// As it booted: nothing of eniup's is there, and the links are down. What others have done in its place goes, too: of
    /// that, eniup takes for its own only what bears its mark.
    pub fn forget(&self) -> Result<()> {
        Cost::of(Command::new(eniup()).args(["release", "--quiet"]))?;
        let observed = block_on(async { Netlink::open()?.observe().await })?;
        let names = observed.links.values().flat_map(|link| {
            link.altnames.iter().map(|altname| format!("link property del dev {} altname {altname}", link.name))
        });
        let links = (1..self.size.enis).map(|n| format!("link set eth{n} mtu 1500 group default down"));
        let addresses = observed.addresses.iter().filter_map(|(index, address)| {
            let link = observed.links.get(index)?;
            let is_secondary = link.name != "lo" && address.net.to_string() != BOOTED;
            (is_secondary && address.net.addr().is_ipv4())
                .then(|| format!("addr del {} dev {}", address.net, link.name))
        });
        batch(names.chain(addresses).chain(links), &[])
    }

    /// As [`Self::forget`], with the sysctls as eniup sets them: what is left to do is netlink's alone.
    pub fn forget_but_sysctls(&self) -> Result<()> {
        self.forget()?;
        for step in self.plan()?.steps {
            if let Operation::SetLink { link, change: LinkChange::AcceptRa(value) } = step.operation {
                let file = format!("/proc/sys/net/ipv6/conf/{}/accept_ra", link.name);
                fs::write(&file, value.to_string()).context(file)?;
            }
        }
        Ok(())
    }

    /// An address that is not one of its size.
    pub fn with_one_more(&self) -> Result<()> {
        let mut view = self.lab.view.clone();
        let last = view.enis.last_mut().context("a machine has an ENI")?;
        last.local_ipv4s.push(Ipv4Addr::new(10, 0, self.size.enis - 1, 250));
        self.lab.tree.lock().expect("nobody panics with it").publish_without_delay(&view);
        Ok(())
    }

    pub fn with_one_less(&self) -> Result<()> {
        self.lab.tree.lock().expect("nobody panics with it").publish_without_delay(&self.lab.view);
        self.reconcile().map(drop)
    }

    pub fn reconcile(&self) -> Result<Cost> {
        Cost::of(Command::new(eniup()).args(["reconcile", "--quiet"]))
    }

    pub fn requests(&self) -> u64 {
        let requests = self.lab.service.requests();
        requests.tokens + requests.gets_by_path.values().sum::<u64>()
    }

    /// What is left to do.
    pub fn plan(&self) -> Result<Plan> {
        let attached = attached(&self.size.tree())?;
        let config = Config::default();
        let observed = block_on(async { Netlink::open()?.observe().await })?;
        Ok(plan(&desired(&attached, &config), &observed, attached.primary, &config))
    }

    /// Addresses, routes, rules and changes of links, on a machine that has just booted.
    pub fn objects(&self) -> Result<usize> {
        self.forget()?;
        Ok(self.plan()?.steps.len())
    }

    /// The datagrams by which eniup configures the machine as it is, and has then configured it.
    pub fn messages(&self) -> Result<Vec<Vec<u8>>> {
        let mut datagrams = self.said()?;
        let is_acknowledged = |message: &Message| message.flags() & ACKNOWLEDGE != 0;
        datagrams.retain_mut(|datagram| interposer::messages(datagram).iter().all(is_acknowledged));
        Ok(datagrams)
    }

    /// What a run says to rtnetlink, datagram by datagram.
    pub fn said(&self) -> Result<Vec<Vec<u8>>> {
        let mut datagrams = Vec::new();
        let output = interposer::output(Command::new(eniup()).args(["reconcile", "--quiet"]), |datagram| {
            if let Datagram::Said(said) = datagram {
                datagrams.push(said.clone());
            }
            Ok(())
        })?;
        ensure!(output.status.success(), "eniup reconcile: {}", String::from_utf8_lossy(&output.stderr));
        Ok(datagrams)
    }

    /// How many changes a run asks the kernel for.
    pub fn changes(&self) -> Result<usize> {
        Ok(self.said()?.iter_mut().map(|datagram| changes(datagram.as_mut_slice())).sum())
    }

    /// The same done for a run from nothing, one with nothing to do, and one with an address to add.
    pub fn three_runs<T>(&self, act: impl Fn(&Instance) -> Result<T>) -> Result<[T; 3]> {
        self.forget()?;
        let (cold, idle) = (act(self)?, act(self)?);
        self.with_one_more()?;
        let one = act(self)?;
        self.with_one_less()?;
        Ok([cold, idle, one])
    }
}

/// Messages of the datagram that change something. The last two bits of a kind: 0 new, 1 delete, 2 get, 3 set.
pub fn changes(datagram: &mut [u8]) -> usize {
    interposer::messages(datagram).iter().filter(|message| message.kind() % 4 != 2).count()
}

/// `NLM_F_ACK`: eniup asks for it with changes only.
const ACKNOWLEDGE: u16 = 4;

impl Drop for Instance {
    fn drop(&mut self) {
        let links = (0..self.size.enis).map(|n| format!("link del eth{n}"));
        if let Err(error) = batch(links, &[]).and_then(|()| ip("-4 rule flush")).and_then(|()| standard_rules()) {
            eprintln!("the next machine finds something of this one: {error:#}");
        }
    }
}

/// The rules that the kernel begins with, after a flush, which leaves the first.
fn standard_rules() -> Result<()> {
    ip("-4 rule add priority 32766 lookup main")?;
    ip("-4 rule add priority 32767 lookup default")
}

/// One namespace for the far ends of all; it lives as long as what is given.
fn plug_secondaries(enis: u8) -> Result<Option<File>> {
    if enis < 2 {
        return Ok(None);
    }
    // SAFETY: gettid always succeeds.
    let here = unsafe { libc::gettid() };
    let far = move || -> Result<File> {
        enter_namespace()?;
        let links = (1..enis).flat_map(|n| {
            let mac = mac(n);
            [
                format!("link add eth{n} address {mac} type veth peer name far{n}"),
                format!("link set far{n} up"),
                format!("link set eth{n} netns {here}"),
            ]
        });
        batch(links, &[])?;
        Ok(File::open("/proc/thread-self/ns/net")?)
    };
    std::thread::spawn(far).join().expect("the far ends' thread panicked").map(Some)
}

/// Each line by ip(8), in one process.
pub fn batch(lines: impl IntoIterator<Item = String>, options: &[&str]) -> Result<()> {
    let mut lines: Vec<String> = lines.into_iter().collect();
    if lines.is_empty() {
        return Ok(());
    }
    lines.push(String::new());
    let mut child = Command::new("ip").args(options).args(["-batch", "-"]).stdin(Stdio::piped()).spawn()?;
    child.stdin.take().context("ip's standard input")?.write_all(lines.join("\n").as_bytes())?;
    let status = child.wait()?;
    ensure!(status.success(), "ip -batch: {status}");
    Ok(())
}

/// The changes as eniup prints them, in two processes: a batch is of one family, and a rule for all sources of IPv6 can be told
/// by nothing else.
pub fn ip_batch(commands: &[String]) -> Result<Cpu> {
    let arguments = commands.iter().map(|command| arguments(command)).collect::<Result<Vec<String>>>()?;
    let (ipv6, ipv4): (Vec<String>, Vec<String>) = arguments.into_iter().partition(|line| line.starts_with("-6 "));
    let mut files = Vec::new();
    for (family, lines) in [("-4", ipv4), ("-6", ipv6)] {
        let mut file = NamedTempFile::new()?;
        for line in lines {
            writeln!(file, "{}", line.strip_prefix(family).unwrap_or(&line))?;
        }
        files.push((family, file));
    }
    Cpu::of_children(|| {
        let cost = |(family, file): &(&str, NamedTempFile)| {
            times(Command::new("ip").args([family, "-batch"]).arg(file.path())).map(|(_, cpu)| cpu)
        };
        files.iter().map(cost).sum()
    })
}

/// The changes as eniup prints them, each in a process of its own.
pub fn ip_each(commands: &[String]) -> Result<Cpu> {
    Cpu::of_children(|| {
        let mut cpu = Duration::ZERO;
        for command in commands {
            cpu += times(Command::new("ip").args(arguments(command)?.split_whitespace()))?.1;
        }
        Ok(cpu)
    })
}

/// Without the mark of an address, which ip(8) cannot set before iproute2 6.3.
fn arguments(command: &str) -> Result<String> {
    let arguments = command.strip_prefix("ip ").with_context(|| format!("not a command of ip: {command}"))?;
    Ok(match arguments.split_once(" proto ") {
        Some((address, _)) if address.contains("addr ") => address.to_string(),
        _ => arguments.to_string(),
    })
}
