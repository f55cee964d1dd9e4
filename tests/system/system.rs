//! One Debian in one instance of one VPC.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;
use vpc_lab::imds::{Action, Faults, Occurrences, Rule};
use vpc_lab::lab::{Distribution, Lab};
use vpc_lab::metadata::Propagation;
use vpc_lab::probe::{Bound, Kind, Probe};
use vpc_lab::vpc::{CreateEni, EniId};

/// The address of the ENI that is there at boot beside the primary.
pub const SECOND: &str = "10.0.1.20";

/// The lab's machine is not EC2's.
const LAB: &str = "[Unit]\nConditionPathExists=|/\n";

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Installed {
    No,
    Enabled,
    EnabledAndDeadMetadata,
    /// eniup-watch instead of eniup.
    Watched,
    /// Somebody has enabled eniup as well.
    WatchedAndEnabled,
}

impl Installed {
    fn enabled(self) -> &'static [&'static str] {
        match self {
            Installed::No => &[],
            Installed::Enabled | Installed::EnabledAndDeadMetadata => &["eniup.service"],
            Installed::Watched => &["eniup-watch.service"],
            Installed::WatchedAndEnabled => &["eniup.service", "eniup-watch.service"],
        }
    }
}

pub struct System {
    lab: Lab,
    process: Child,
    /// Of its first process.
    pid: u32,
    subnet: String,
    devices: u32,
    _layer: TempDir,
}

pub struct Attached {
    eni: EniId,
    pub address: String,
}

impl System {
    pub fn boot(installed: Installed) -> Result<System> {
        let (lab, subnet) = vpc()?;
        if matches!(installed, Installed::EnabledAndDeadMetadata) {
            lab.service("web")?.set_faults(dead());
        }
        let root = given("ENIUP_SYSTEM_ROOT")?;
        let layer = tempfile::tempdir()?;
        if !matches!(installed, Installed::No) {
            unpack_enabled(layer.path(), installed)?;
        }
        let lowers = format!("{}:{}", layer.path().display(), root.display());
        let boot = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/system/boot");
        let mut process = lab.command("web", boot)?.args([lowers.as_str(), "/run/system"]).spawn()?;
        let pid = first_process(&mut process)?;
        let system = System { lab, process, pid, subnet, devices: 1, _layer: layer };
        if !matches!(installed, Installed::EnabledAndDeadMetadata) {
            let minute = Duration::from_secs(60);
            system.wait(minute, "the boot", |system| {
                let state = system.says(&["systemctl", "is-system-running"])?;
                ensure!(
                    state.trim() != "degraded",
                    "{}",
                    system.says(&["journalctl", "-b", "-p", "notice", "--no-pager"])?
                );
                Ok(state.trim() == "running")
            })?;
            system.run(&["udevadm", "settle"])?;
        }
        if !matches!(installed, Installed::No | Installed::EnabledAndDeadMetadata) {
            system.wait(Duration::from_secs(15), "the second ENI", |system| system.answers(SECOND))?;
        }
        if matches!(installed, Installed::Enabled) {
            system.wait(Duration::from_secs(15), "the end of runs", |system| system.is_idle("hotplug"))?;
        }
        Ok(system)
    }

    /// As the administrator does.
    pub fn install(&self) -> Result<()> {
        let package = given("ENIUP_SYSTEM_DEB")?;
        fs::copy(&package, self.path("/root/eniup.deb")).context("copying the package")?;
        self.run(&["dpkg", "--install", "/root/eniup.deb"])?;
        lay_lab(&self.path("/"))?;
        self.run(&["systemctl", "daemon-reload"])?;
        self.run(&["udevadm", "control", "--reload"])
    }

    /// A new ENI, attached to the next device number.
    pub fn attach(&mut self) -> Result<Attached> {
        let create = CreateEni { subnet: self.subnet.clone(), ..CreateEni::default() };
        let eni = self.lab.create_network_interface(create)?;
        let address = self.lab.world().eni(&eni)?.ipv4s[0].to_string();
        self.devices += 1;
        self.lab.attach_network_interface(&eni, "web", 0, self.devices)?;
        Ok(Attached { eni, address })
    }

    pub fn detach(&mut self, attached: &Attached) -> Result<()> {
        self.lab.detach_network_interface(&attached.eni)
    }

    pub fn answers(&self, to: &str) -> Result<bool> {
        let to = to.parse()?;
        let probe = Probe { from: "client".into(), bound: Bound::Nothing, to, kind: Kind::Icmp };
        let outcomes = self.lab.probe(&[probe], Duration::from_millis(300))?;
        Ok(outcomes.iter().all(|outcome| outcome.is_answer_of(to)))
    }

    /// How long metadata takes to list what is attached from here on.
    pub fn list_after(&self, delay: Duration) -> Result<()> {
        self.lab.set_propagation("web", Propagation { listing_entry: delay, ..Propagation::default() })
    }

    /// A key of ENIs that are attached from here on does not come.
    pub fn withhold(&self, key: &str) -> Result<()> {
        let overrides = [(key.to_string(), Duration::from_secs(3600))].into();
        self.lab.set_propagation("web", Propagation { overrides, ..Propagation::default() })
    }

    pub fn kill_metadata(&self) -> Result<()> {
        self.lab.service("web")?.set_faults(dead());
        Ok(())
    }

    pub fn revive_metadata(&self) -> Result<()> {
        self.lab.service("web")?.set_faults(Faults::default());
        Ok(())
    }

    /// What udev hears when a network card comes.
    pub fn event(&self) -> Result<()> {
        self.run(&["udevadm", "trigger", "--settle", "--action=add", "/sys/class/net/ens6"])
    }

    /// How often `eniup-<name>.service` has begun.
    pub fn runs(&self, name: &str) -> Result<usize> {
        match fs::read_to_string(self.path(&format!("/run/runs-{name}"))) {
            Ok(text) => Ok(text.lines().count()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error).context("counting runs"),
        }
    }

    /// Neither running nor about to.
    pub fn is_idle(&self, name: &str) -> Result<bool> {
        let unit = format!("eniup-{name}.service");
        let state = self.says(&["systemctl", "show", "-P", "ActiveState", "-P", "Job", &unit])?;
        let is_waiting = fs::read_dir(self.path("/run/eniup/hotplug"))?.next().is_some();
        Ok(!is_waiting && ["inactive", "failed"].contains(&state.lines().next().unwrap_or_default()))
    }

    /// Links, addresses, routes and rules, once the kernel has made up its mind about its own IPv6 addresses.
    pub fn network(&self) -> Result<String> {
        self.wait(Duration::from_secs(15), "the kernel's link-local addresses", |system| {
            Ok(system.says(&["ip", "-6", "addr", "show", "tentative"])?.is_empty())
        })?;
        let mut all = String::new();
        for what in ["-d link", "addr", "-4 route show table all", "-6 route show table all", "-4 rule", "-6 rule"] {
            let words: Vec<&str> = std::iter::once("ip").chain(what.split(' ')).collect();
            for line in self.says(&words)?.lines() {
                // How long something is valid goes down by itself.
                if !line.contains("valid_lft") {
                    all += &format!("{line}\n");
                }
            }
        }
        Ok(all)
    }

    /// The network is as it was.
    pub fn ensure_network(&self, before: &str) -> Result<()> {
        let (lost, new) = self.changes(before)?;
        ensure!(lost.is_empty() && new.is_empty(), "the network has changed.\nlost:\n{lost}\nnew:\n{new}");
        Ok(())
    }

    /// What is not there any more, and what was not there.
    pub fn changes(&self, before: &str) -> Result<(String, String)> {
        let now = self.network()?;
        let only = |here: &str, there: &str| -> String {
            here.lines().filter(|line| !there.lines().any(|other| other == *line)).collect::<Vec<_>>().join("\n")
        };
        Ok((only(before, &now), only(&now, before)))
    }

    /// Routes and rules that carry our mark, in no order of their own.
    pub fn network_of_ours(&self) -> Result<Vec<String>> {
        let network = self.network()?;
        let mut ours: Vec<String> =
            network.lines().filter(|line| line.contains("proto eniup")).map(String::from).collect();
        ensure!(!ours.is_empty(), "ip does not know our mark by name: {network}");
        ours.sort();
        Ok(ours)
    }

    /// Nobody took away what eniup has added.
    pub fn ensure_ours(&self, before: &[String]) -> Result<()> {
        let now = self.network_of_ours()?;
        let lost: Vec<&String> = before.iter().filter(|line| !now.contains(line)).collect();
        ensure!(lost.is_empty(), "lost: {lost:#?}\nnow: {now:#?}");
        Ok(())
    }

    /// A property of `eniup-watch.service`.
    pub fn of_watch(&self, property: &str) -> Result<String> {
        Ok(self.says(&["systemctl", "show", "-P", property, "eniup-watch.service"])?.trim().into())
    }

    pub fn is_active(&self, unit: &str) -> Result<bool> {
        Ok(self.says(&["systemctl", "is-active", unit])?.trim() == "active")
    }

    pub fn is_configured(&self, link: &str) -> Result<bool> {
        Ok(self.says(&["networkctl", "status", "--no-pager", link])?.contains("(configured)"))
    }

    /// Messages of this boot.
    pub fn journal(&self, option: &str, value: &str) -> Result<String> {
        let text = self.says(&["journalctl", "--no-pager", "-q", "-o", "cat", option, value])?;
        // Of the container itself, not of what is installed in it.
        let is_ours = |line: &&str| option == "-u" || line.contains("eniup") || line.contains("udev");
        Ok(text.lines().filter(is_ours).map(|line| format!("{line}\n")).collect())
    }

    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        write(&self.path(file), text)
    }

    /// A command that has to succeed.
    pub fn run(&self, words: &[&str]) -> Result<()> {
        let output = self.output(words)?;
        let told = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        ensure!(output.status.success(), "{words:?} ({}): {told}", output.status);
        Ok(())
    }

    /// What a command prints, however it ends.
    pub fn says(&self, words: &[&str]) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.output(words)?.stdout).into_owned())
    }

    fn output(&self, words: &[&str]) -> Result<Output> {
        let pid = self.pid.to_string();
        let mut command = Command::new("nsenter");
        command.args(["--all", "--target", &pid, "--", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"]);
        command.args(words).output().with_context(|| format!("running {words:?}"))
    }

    pub fn wait(&self, patience: Duration, what: &str, is_so: impl Fn(&System) -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + patience;
        while !is_so(self)? {
            if Instant::now() > deadline {
                bail!(
                    "{what} did not come in {patience:?}:\n{}",
                    self.says(&["journalctl", "--no-pager", "-n", "60"])?
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn path(&self, path: &str) -> PathBuf {
        format!("/proc/{}/root{path}", self.pid).into()
    }
}

impl Drop for System {
    fn drop(&mut self) {
        // All processes of the system end with its first one.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An instance whose primary ENI the lab configures, with a second one; and a client in a third subnet, where more are made.
fn vpc() -> Result<(Lab, String)> {
    let mut lab = Lab::new(env!("CARGO_BIN_EXE_eniup"))?;
    let subnets = lab.fabric.world(|world| -> Result<Vec<String>> {
        let vpc = world.create_vpc(&["10.0.0.0/16".parse()?]);
        (0..3).map(|n| world.create_subnet(&vpc, Some(format!("10.0.{n}.0/24").parse()?), &[])).collect()
    })?;
    let mut eni = |n: usize, address: &str| -> Result<EniId> {
        lab.create_network_interface(CreateEni {
            subnet: subnets[n].clone(),
            ipv4s: vec![address.parse()?],
            ..CreateEni::default()
        })
    };
    let (enis, client) = ([eni(0, "10.0.0.10")?, eni(1, SECOND)?], eni(2, "10.0.2.30")?);
    lab.run_instance("web", &enis, "m7i.large", Distribution::Primary)?;
    lab.run_instance("client", &[client], "t3.micro", Distribution::Primary)?;
    Ok((lab, subnets[2].clone()))
}

fn dead() -> Faults {
    Faults { rules: vec![Rule::new("*", Occurrences::Always, Action::Hang)], ..Faults::default() }
}

fn given(variable: &str) -> Result<PathBuf> {
    let path = std::env::var_os(variable).with_context(|| format!("{variable} is not set: run tests/system/run"))?;
    Ok(path.into())
}

/// The package's files with the lab's, enabled: what an image has that was made with it.
fn unpack_enabled(layer: &Path, installed: Installed) -> Result<()> {
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("--extract").arg(given("ENIUP_SYSTEM_DEB")?).arg(layer);
    let mut enable = Command::new("systemctl");
    enable.arg("--root").arg(layer).arg("enable").args(installed.enabled()).stderr(Stdio::null());
    for command in [&mut unpack, &mut enable] {
        let status = command.status().with_context(|| format!("starting {command:?}"))?;
        ensure!(status.success(), "{command:?}: {status}");
    }
    lay_lab(layer)
}

/// What differs in the lab, below a root.
fn lay_lab(root: &Path) -> Result<()> {
    let rules = include_str!("99-eniup-lab.rules");
    write(&root.join("etc/udev/rules.d/99-eniup-lab.rules"), rules)?;
    let conditional = [
        "eniup.service",
        "eniup-hotplug.path",
        "eniup-refresh.path",
        "eniup-refresh.service",
        "eniup-refresh.timer",
        "eniup-watch.service",
    ];
    for unit in conditional {
        write(&root.join(format!("etc/systemd/system/{unit}.d/lab.conf")), LAB)?;
    }
    for name in ["hotplug", "refresh"] {
        // In front of all else and outside the sandbox.
        let count = format!("[Service]\nExecStartPre=+/bin/sh -c 'echo run >>/run/runs-{name}'\n");
        write(&root.join(format!("etc/systemd/system/eniup-{name}.service.d/count.conf")), &count)?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::create_dir_all(path.parent().context("a file is in a folder")?)?;
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// The number of the system's first process, once it is systemd.
fn first_process(boot: &mut Child) -> Result<u32> {
    let deadline = Instant::now() + Duration::from_secs(20);
    let children = format!("/proc/{0}/task/{0}/children", boot.id());
    loop {
        let child = fs::read_to_string(&children).unwrap_or_default().trim().parse::<u32>().ok();
        let is_systemd =
            |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "systemd\n");
        if let Some(pid) = child.filter(is_systemd) {
            return Ok(pid);
        }
        if let Some(status) = boot.try_wait()? {
            bail!("the system did not boot: {status}");
        }
        ensure!(Instant::now() < deadline, "the system did not boot");
        std::thread::sleep(Duration::from_millis(20));
    }
}
