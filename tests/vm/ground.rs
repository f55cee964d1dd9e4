//! An instance of the lab's VPC that is a virtual machine, and a client that talks to it from another subnet.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use vpc_lab::flows::{FlowReport, FlowSpec, Flows, Kind};
use vpc_lab::imds::{Action, Faults, Occurrences, Rule};
use vpc_lab::lab::{Distribution, Lab};
use vpc_lab::probe::{self, Bound, Probe};
use vpc_lab::vpc::{CreateEni, EniId, Mac};

use crate::qemu::{Machine, Parts, Said};

/// The address of the primary ENI.
pub const PRIMARY: &str = "10.0.0.10";

/// Secondary ENIs, each in a subnet of its own.
const SUBNETS: u8 = 20;

/// From one ping to the next: 100 Hz.
const EVERY: Duration = Duration::from_millis(10);

/// What a machine begins with: a disk, and what its memory was.
#[derive(Clone)]
pub struct Stage {
    pub kernel: PathBuf,
    pub disk: PathBuf,
    /// None: it boots.
    pub memory: Option<PathBuf>,
}

impl Stage {
    /// The one that was made in this folder.
    pub fn of(folder: &Path) -> Stage {
        let kernel = fs::read_link(folder.join("kernel")).unwrap_or_default();
        let memory = Some(folder.join("memory")).filter(|memory| memory.exists());
        Stage { kernel, disk: folder.join("disk"), memory }
    }
}

/// What came of one step, as the table has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub scenario: String,
    pub kernel: String,
    pub step: String,
    pub sent: u64,
    pub lost: u64,
    /// Milliseconds: the longest time without an answer.
    pub gap: u64,
    pub note: String,
}

/// What a step may cost those who talk to the machine.
#[derive(Clone, Copy)]
pub enum Loss<'a> {
    Nothing,
    /// These go on after a silence that is reported, however long; the others lose nothing.
    Of(&'a [IpAddr]),
}

pub struct Attached {
    pub eni: EniId,
    pub device: u32,
    mac: Mac,
    pub ipv4: IpAddr,
    pub ipv6: IpAddr,
}

pub struct Ground {
    pub lab: Lab,
    machine: Machine,
    subnets: Vec<String>,
    pub scenario: String,
    kernel: String,
    pub rows: Vec<Row>,
}

impl Ground {
    /// The instance with so many secondary ENIs from the start, in a folder of its own; if wanted metadata is silent.
    pub fn start(
        scenario: &str,
        stage: &Stage,
        folder: &Path,
        enis: u32,
        is_metadata_dead: bool,
    ) -> Result<(Ground, Vec<Attached>)> {
        fs::create_dir_all(folder)?;
        let mut lab = Lab::new(env!("CARGO_BIN_EXE_eniup"))?;
        let subnets = create_subnets(&lab)?;
        let client = create_eni(&mut lab, &subnets, SUBNETS - 1)?;
        lab.run_instance("client", &[client.eni], "t3.micro", Distribution::Primary)?;
        let primary = CreateEni { subnet: subnets[0].clone(), ipv4s: vec![PRIMARY.parse()?], ..CreateEni::default() };
        let primary = lab.create_network_interface(primary)?;
        let attached: Vec<Attached> =
            (1..=enis).map(|n| create_eni(&mut lab, &subnets, n as u8)).collect::<Result<_>>()?;
        let all: Vec<EniId> = std::iter::once(&primary).chain(attached.iter().map(|one| &one.eni)).cloned().collect();
        lab.run_machine("web", &all, "m7i.24xlarge", folder)?;
        set_metadata_dead(&lab, is_metadata_dead)?;
        let mac = lab.world().eni(&primary)?.mac;
        let cards = std::iter::once((0, mac)).chain(attached.iter().map(|one| (one.device, one.mac))).collect();
        let kernel = fs::read_to_string(stage.kernel.join("release")).context("reading the kernel's release")?;
        let (kernel_folder, disk) = (stage.kernel.clone(), stage.disk.clone());
        let parts = Parts { kernel: kernel_folder, disk, package: package()?, folder: folder.into(), cards };
        let machine = Machine::start(parts, stage.memory.as_deref())?;
        let kernel = kernel.trim().split('.').take(2).collect::<Vec<_>>().join(".");
        let ground = Ground { lab, machine, subnets, scenario: scenario.into(), kernel, rows: Vec::new() };
        Ok((ground, attached))
    }

    /// Until systemd says that all is up.
    pub fn wait_for_boot(&mut self) -> Result<()> {
        self.machine.wait_for_agent()?;
        let said = self.machine.say("systemctl is-system-running --wait")?;
        if said.text.trim() != "running" {
            bail!(
                "{}: {}",
                said.text.trim(),
                self.machine.say("systemctl --failed --no-pager; journalctl -b -p warning --no-pager")?.text
            );
        }
        self.run("udevadm settle").map(|_| ())
    }

    /// The package, and what differs in the lab: the driver of its links.
    pub fn install(&mut self) -> Result<()> {
        // The second disk is as long as whole sectors are.
        let length = fs::metadata(package()?)?.len();
        self.run(&format!("head -c {length} /dev/vdb >/root/packages/eniup.deb"))?;
        self.run("dpkg --install /root/packages/eniup.deb")?;
        self.write("/etc/udev/rules.d/99-eniup-lab.rules", include_str!("../system/99-eniup-lab.rules"))?;
        self.run("udevadm control --reload").map(|_| ())
    }

    pub fn write(&mut self, file: &str, text: &str) -> Result<()> {
        self.run(&format!("mkdir -p $(dirname {file}); cat >{file} <<'END'\n{text}\nEND")).map(|_| ())
    }

    pub fn run(&mut self, script: &str) -> Result<String> {
        self.machine.run(script)
    }

    pub fn say(&mut self, script: &str) -> Result<Said> {
        self.machine.say(script)
    }

    /// A new ENI at this device number: EC2's answer, and then the card.
    pub fn attach(&mut self, device: u32) -> Result<Attached> {
        let one = create_eni(&mut self.lab, &self.subnets, device as u8)?;
        self.attach_again(one, device)
    }

    /// One that was detached, perhaps as another device: then its link has another name.
    pub fn attach_again(&mut self, one: Attached, device: u32) -> Result<Attached> {
        self.lab.attach_network_interface(&one.eni, "web", 0, device)?;
        self.machine.plug(device, one.mac)?;
        Ok(Attached { device, ..one })
    }

    pub fn detach(&mut self, one: &Attached) -> Result<()> {
        self.machine.unplug(one.device)?;
        self.lab.detach_network_interface(&one.eni)
    }

    pub fn set_carrier(&mut self, device: u32, is_up: bool) -> Result<()> {
        self.machine.set_carrier(device, is_up)
    }

    pub fn set_metadata_dead(&self, is_dead: bool) -> Result<()> {
        set_metadata_dead(&self.lab, is_dead)
    }

    /// Until the network is gone with what it knew.
    pub fn reboot(&mut self) -> Result<()> {
        self.run("systemctl reboot --no-block")?;
        let begun = Instant::now();
        while self.answers(PRIMARY.parse()?)? {
            ensure!(begun.elapsed() < Duration::from_secs(120), "it does not reboot");
        }
        Ok(())
    }

    pub fn answers(&self, to: IpAddr) -> Result<bool> {
        let probe = Probe { from: "client".into(), bound: Bound::Nothing, to, kind: probe::Kind::Icmp };
        let outcomes = self.lab.probe(&[probe], Duration::from_millis(100))?;
        Ok(outcomes.iter().all(|outcome| outcome.is_answer_of(to)))
    }

    /// How long it takes until all of these have answered.
    pub fn until_answer(&mut self, all: &[IpAddr], patience: Duration) -> Result<Duration> {
        let begun = Instant::now();
        for one in all {
            while !self.answers(*one)? {
                if begun.elapsed() > patience {
                    bail!("{one} did not answer within {patience:?}:\n{}", self.story()?);
                }
            }
        }
        Ok(begun.elapsed())
    }

    /// What the machine itself tells of its network.
    pub fn story(&mut self) -> Result<String> {
        let script = "ip -br addr; ip rule; ip -6 rule; ip route show table all | grep -v ^local; \
            eniup status; systemctl --no-pager --plain list-units 'eniup*'; journalctl -b -n 40 --no-pager -o short-monotonic";
        Ok(self.machine.say(script)?.text)
    }

    /// Until nothing is under way: no event of udev's, no job of systemd's, no run of eniup's. How many times it had to look.
    pub fn settle(&mut self) -> Result<u64> {
        let script = "udevadm settle; systemctl list-jobs --no-legend
            systemctl show -P ActiveState eniup-hotplug.service eniup-refresh.service | grep activating; true";
        let begun = Instant::now();
        for looks in 1.. {
            let under_way = self.run(script)?;
            if under_way.trim().is_empty() {
                return Ok(looks);
            }
            ensure!(begun.elapsed() < Duration::from_secs(900), "it is busy for ever: {under_way}");
            std::thread::sleep(Duration::from_millis(200));
        }
        unreachable!("it looks until one of both")
    }

    /// Does something while somebody pings all these addresses a hundred times a second and has a connection to each.
    pub fn step(
        &mut self,
        what: &str,
        loss: Loss,
        to: &[IpAddr],
        act: impl FnOnce(&mut Ground) -> Result<String>,
    ) -> Result<()> {
        let kinds = [Kind::Icmp, Kind::Tcp];
        let spec =
            |to: &IpAddr, kind| FlowSpec { from: "client".into(), bound: Bound::Nothing, to: *to, kind, every: EVERY };
        let specs: Vec<FlowSpec> = to.iter().flat_map(|to| kinds.map(|kind| spec(to, kind))).collect();
        self.lab.fabric.forget_drops();
        let flows = Flows::start(&self.lab, &specs).with_context(|| format!("before {what}"))?;
        let note = act(self).with_context(|| what.to_string())?;
        self.settle().with_context(|| format!("after {what}"))?;
        if matches!(loss, Loss::Of(_)) {
            self.until_answer(to, Duration::from_secs(60))?;
        }
        std::thread::sleep(Duration::from_secs(1));
        let reports = flows.finish();
        let row = self.row(what, &reports, note);
        self.rows.push(row);
        let may_lose = |flow: &&FlowReport| matches!(loss, Loss::Of(those) if those.contains(&flow.spec.to));
        let broken: Vec<&FlowReport> = reports.iter().filter(|flow| !flow.is_whole() && !may_lose(flow)).collect();
        if !broken.is_empty() {
            let broken = broken.into_iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            let dropped = [self.lab.fabric.last_drops(), self.lab.overflows()?].concat().join("\n");
            bail!("{what}: {broken}\ndropped by the VPC:\n{dropped}\n{}", self.story()?);
        }
        Ok(())
    }

    fn row(&self, what: &str, reports: &[FlowReport], note: String) -> Row {
        let pings = || reports.iter().filter(|flow| flow.spec.kind == Kind::Icmp);
        let losers = pings().filter(|flow| flow.lost() > 0).map(|flow| format!("{} {}", flow.spec.to, flow.lost()));
        let note = Some(note).filter(|note| !note.is_empty()).into_iter().chain(losers).collect::<Vec<_>>().join(", ");
        Row {
            scenario: self.scenario.clone(),
            kernel: self.kernel.clone(),
            step: what.into(),
            sent: pings().map(|flow| flow.sent).sum(),
            lost: pings().map(FlowReport::lost).sum(),
            gap: pings().map(|flow| flow.longest_gap.as_millis() as u64).max().unwrap_or_default(),
            note,
        }
    }

    /// A line of the table without any pings.
    pub fn note(&mut self, what: &str, note: String) {
        let row = self.row(what, &[], note);
        self.rows.push(row);
    }

    /// Writes the machine down as a stage for others, with its memory or (shut down in order) without.
    pub fn into_stage(self, folder: &Path, stage: &Stage, with_memory: bool) -> Result<()> {
        std::os::unix::fs::symlink(&stage.kernel, folder.join("kernel"))?;
        match with_memory {
            true => self.machine.freeze(&folder.join("memory"))?,
            false => self.machine.power_off()?,
        };
        Ok(())
    }
}

/// The .deb under test.
fn package() -> Result<PathBuf> {
    Ok(std::env::var_os("ENIUP_VM_DEB").context("ENIUP_VM_DEB is not set: run tests/vm/run")?.into())
}

fn set_metadata_dead(lab: &Lab, is_dead: bool) -> Result<()> {
    let rules = if is_dead { vec![Rule::new("*", Occurrences::Always, Action::Hang)] } else { Vec::new() };
    lab.service("web")?.set_faults(Faults { rules, ..Faults::default() });
    Ok(())
}

fn create_subnets(lab: &Lab) -> Result<Vec<String>> {
    lab.fabric.world(|world| {
        let vpc = world.create_vpc(&["10.0.0.0/16".parse()?, "2600:1f16:67f:f200::/56".parse()?]);
        let subnet = |n: u8| {
            let ipv6 = format!("2600:1f16:67f:f2{n:02x}::/64").parse()?;
            world.create_subnet(&vpc, Some(Ipv4Net::new(Ipv4Addr::new(10, 0, n, 0), 24)?), &[ipv6])
        };
        (0..SUBNETS).map(subnet).collect()
    })
}

/// An ENI in the subnet of this number, to be attached as the device of that number.
fn create_eni(lab: &mut Lab, subnets: &[String], number: u8) -> Result<Attached> {
    let subnet = subnets.get(usize::from(number)).context("there are fewer subnets")?.clone();
    let (ipv4, ipv6) = addresses(number);
    let create = CreateEni { subnet, ipv4s: vec![ipv4], ipv6s: vec![ipv6], ..CreateEni::default() };
    let eni = lab.create_network_interface(create)?;
    let mac = lab.world().eni(&eni)?.mac;
    Ok(Attached { eni, device: number.into(), mac, ipv4: ipv4.into(), ipv6: ipv6.into() })
}

fn addresses(number: u8) -> (Ipv4Addr, Ipv6Addr) {
    (Ipv4Addr::new(10, 0, number, 10), Ipv6Addr::new(0x2600, 0x1f16, 0x67f, 0xf200 + u16::from(number), 0, 0, 0, 0x10))
}
