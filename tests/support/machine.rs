//! A machine for tests on the real kernel: a network namespace with links for ENIs and a metadata service, on which
//! eniup runs as a user runs it and ip(8) says what came of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use eniup::eni::Attached;
use eniup::net::MacAddr;
use vpc_lab::imds::Service;
use vpc_lab::interposer::{self, Datagram};
use vpc_lab::metadata::Published;

use super::{Scenario, scenarios, tools};

/// Runs a test in a sandbox (see [`vpc_lab::inside`]) in which ip(8) is at hand.
pub fn inside(test: impl FnOnce() -> Result<()>) {
    // Outside, where packages can be had if need be.
    tools::path();
    vpc_lab::inside(test);
}

/// A machine: a network namespace (this thread's) with links for ENIs and a metadata service on its loopback.
pub struct Machine {
    pub directory: PathBuf,
    pub endpoint: String,
    pub tree: Arc<Mutex<Published>>,
    pub service: Service,
    /// MAC → the link's name.
    pub links: BTreeMap<MacAddr, String>,
    /// As eniup sees it.
    pub kernel: Kernel,
}

/// What eniup takes for the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kernel {
    /// As it is.
    Own,
    /// As one before Linux 5.18, which forgets the mark of addresses.
    Old,
    /// As one of tomorrow, which tells more than anybody knows.
    New,
}

/// Runs the test on a machine of its own: a thread in a new network namespace.
pub fn on_a_machine<T: Send>(test: impl FnOnce(&mut Machine) -> Result<T> + Send) -> Result<T> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let run = || {
        // SAFETY: unshare moves this thread alone into a new network namespace.
        ensure!(unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0, "unshare: {}", std::io::Error::last_os_error());
        ip("link set lo up")?;
        let tree = Arc::new(Mutex::new(Published::new()));
        let (service, address) = vpc_lab::imds::serve_on_loopback(tree.clone())?;
        let directory = PathBuf::from(format!("/run/machine-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        let endpoint = format!("http://{address}");
        let mut machine = Machine { directory, endpoint, tree, service, links: BTreeMap::new(), kernel: Kernel::Own };
        test(&mut machine)
    };
    std::thread::scope(|scope| scope.spawn(run).join().expect("the test's thread panicked"))
}

pub fn output(command: &mut Command) -> Result<Output> {
    command.output().with_context(|| format!("running {command:?}"))
}

/// A command that finds ip(8) on its PATH.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", tools::path());
    command
}

/// ip(8), which has to succeed.
pub fn ip(arguments: &str) -> Result<String> {
    let output = output(command("ip").args(arguments.split_whitespace()))?;
    ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

pub struct Run {
    pub exit: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    fn of(output: Output) -> Result<Run> {
        Ok(Run {
            exit: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout)?,
            stderr: String::from_utf8(output.stderr)?,
        })
    }
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Result<Run> {
    Run::of(output(command)?)
}

/// The leaves of a snapshot.
pub fn read_leaves(snapshot: &Path) -> Result<BTreeMap<String, String>> {
    let snapshot: serde_json::Value = serde_json::from_str(&fs::read_to_string(snapshot)?)?;
    Ok(serde_json::from_value(snapshot["leaves"].clone())?)
}

impl Machine {
    /// From now on eniup is configured with this text, in place of what it was before.
    pub fn configure(&self, text: &str) -> Result<()> {
        fs::create_dir_all(&self.directory)?;
        Ok(fs::write(self.configuration(), text)?)
    }

    fn configuration(&self) -> PathBuf {
        self.directory.join("test.toml")
    }

    /// eniup with these arguments, on this machine.
    pub fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_eniup"));
        let configuration = self.configuration();
        if configuration.exists() {
            command.arg("--config").arg(configuration);
        }
        command.args(arguments.split_whitespace());
        command.env("RUNTIME_DIRECTORY", &self.directory).env("AWS_EC2_METADATA_SERVICE_ENDPOINT", &self.endpoint);
        command
    }

    pub fn eniup(&self, arguments: &str) -> Result<Run> {
        match self.kernel {
            Kernel::Own => run(&mut self.command(arguments)),
            Kernel::Old => self.eniup_with(interposer::forget_address_protocols, arguments),
            Kernel::New => self.eniup_with(interposer::tell_of_tomorrow, arguments),
        }
    }

    /// The same with somebody between it and the kernel.
    pub fn eniup_with(&self, between: impl FnMut(Datagram) -> std::io::Result<()>, arguments: &str) -> Result<Run> {
        Run::of(interposer::output(&mut self.command(arguments), between)?)
    }

    /// Reconciles and expects this exit code.
    pub fn reconcile(&self, exit: i32) -> Result<Run> {
        let run = self.eniup("reconcile --timeout 1s")?;
        ensure!(run.exit == exit, "exit {} instead of {exit}: {}", run.exit, run.stderr);
        Ok(run)
    }

    /// A second run finds nothing to do and says nothing.
    pub fn assert_settled(&self) -> Result<()> {
        let plan = self.eniup("plan --detailed-exitcode")?;
        ensure!(plan.exit != 2 && plan.stdout.is_empty(), "something is left to do:\n{}", plan.stdout);
        if plan.exit == 0 {
            let again = self.reconcile(0)?;
            ensure!(again.stderr.is_empty() && again.stdout.is_empty(), "a second run says: {}", again.stderr);
        }
        Ok(())
    }

    /// What EC2 does when this snapshot becomes true: links come and go, and metadata tells so.
    pub fn become_attached(&mut self, metadata: &Path, attached: &Attached) -> Result<()> {
        self.publish(read_leaves(metadata)?);
        // An EFA-only ENI has no link.
        let has_link = |mac: &&MacAddr| match attached.ready.get(*mac) {
            Some(eni) => !(eni.ipv4s.is_empty() && eni.ipv6s.is_empty()),
            None => true,
        };
        let listed = attached.ready.keys().chain(attached.pending.keys());
        let wanted: BTreeSet<MacAddr> = listed.filter(has_link).copied().collect();
        let gone: Vec<MacAddr> = self.links.keys().filter(|mac| !wanted.contains(mac)).copied().collect();
        for mac in gone {
            let name = self.links.remove(&mac).unwrap_or_default();
            ip(&format!("link del {name}"))?;
        }
        for mac in wanted {
            if !self.links.contains_key(&mac) {
                self.plug(mac, mac == attached.primary)?;
            }
        }
        Ok(())
    }

    /// Metadata tells exactly this from here on.
    pub fn publish(&self, leaves: BTreeMap<String, String>) {
        *self.tree.lock().unwrap() = Published::raw(leaves, BTreeMap::new());
    }

    fn plug(&mut self, mac: MacAddr, is_primary: bool) -> Result<()> {
        let number = mac.to_string().rsplit(':').next().unwrap_or_default().to_string();
        let name = format!("eth{number}");
        ip(&format!("link add {name} address {mac} type veth peer name peer{number} address 02:99:00:00:00:{number}"))?;
        ip(&format!("link set peer{number} up"))?;
        if is_primary {
            ip(&format!("link set {name} mtu 9001 up"))?;
            ip(&format!("addr add 10.0.0.10/24 dev {name}"))?;
            ip("route add default via 10.0.0.1 proto dhcp metric 100")?;
        }
        self.links.insert(mac, name);
        Ok(())
    }
}

/// What the kernel has, as iproute2 tells it, without what differs by itself between two namespaces.
pub fn dump() -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let dumps =
        ["-d -o link", "-d -o addr", "-4 -d route show table all", "-6 -d route show table all", "-4 rule", "-6 rule"];
    for dump in dumps {
        for line in ip(dump)?.lines() {
            // The index, and the kernel's own routes for peers' link-local addresses, which come when they come.
            let line = line
                .split_once(": ")
                .map_or(line, |(first, rest)| if first.parse::<u32>().is_ok() { rest } else { line });
            // A link that was never up has no queueing discipline yet.
            let line = without_carrier(&line.replace("qdisc noop ", "qdisc noqueue "));
            let is_kernels = line.contains("fe80::") && !line.contains("proto 176") || line.contains("ff00::/8");
            if !is_kernels {
                lines.push(format!("{dump}: {}", line.trim_end()));
            }
        }
    }
    Ok(lines)
}

/// Without what the kernel finds out about the carrier, which it does when it gets to it.
fn without_carrier(line: &str) -> String {
    let line = line.replace("NO-CARRIER,", "").replace(",LOWER_UP", "").replace(" linkdown", "");
    match line.split_once(" state ") {
        Some((before, after)) => format!("{before} {}", after.split_once(' ').map_or("", |(_, rest)| rest)),
        None => line,
    }
}

pub fn difference(before: &[String], after: &[String]) -> String {
    let gone = before.iter().filter(|line| !after.contains(line)).map(|line| format!("- {line}\n"));
    let come = after.iter().filter(|line| !before.contains(line)).map(|line| format!("+ {line}\n"));
    gone.chain(come).collect()
}

/// Lets so many milliseconds pass between what was noted and what comes.
pub fn age_notes(machine: &Machine, milliseconds: u64) -> Result<()> {
    let path = machine.directory.join("ledger.json");
    let mut ledger: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    for sighting in ledger["sightings"].as_array_mut().context("the ledger has no sightings")? {
        let since = sighting["since"].as_u64().context("a sighting has no time")?;
        sighting["since"] = since.saturating_sub(milliseconds).into();
    }
    Ok(fs::write(path, ledger.to_string())?)
}

/// The scenario of this name.
/// Lets so many milliseconds pass since the arrivals that were noted, and since notes were lost.
pub fn age_arrivals(machine: &Machine, milliseconds: u64) -> Result<()> {
    let path = machine.directory.join("ledger.json");
    let mut ledger: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    let age = |time: &mut serde_json::Value| -> Result<()> {
        *time = time.as_u64().context("no time")?.saturating_sub(milliseconds).into();
        Ok(())
    };
    for of_eni in ledger["arrivals"].as_object_mut().context("the ledger has no arrivals")?.values_mut() {
        of_eni.as_object_mut().context("no arrivals")?.values_mut().try_for_each(age)?;
    }
    ledger.get_mut("unknown_before").map_or(Ok(()), age)?;
    Ok(fs::write(path, ledger.to_string())?)
}

pub fn scenario(name: &str) -> Result<Scenario> {
    scenarios()?.into_iter().find(|scenario| scenario.name == name).with_context(|| format!("no scenario {name}"))
}

/// A machine as this scenario has it, nothing configured but its primary ENI.
pub fn with_scenario<T: Send>(name: &str, test: impl FnOnce(&mut Machine) -> Result<T> + Send) -> Result<T> {
    let scenario = scenario(name)?;
    on_a_machine(|machine| {
        machine.become_attached(&scenario.folder.join("metadata.json"), &scenario.attached)?;
        test(machine)
    })
}

/// A machine with a second ENI, dual stack.
pub fn with_two_enis<T: Send>(test: impl FnOnce(&mut Machine) -> Result<T> + Send) -> Result<T> {
    with_scenario("two-subnets-dual-stack", test)
}

/// Lets the command run as a process without any capability, also as root.
pub fn drop_capabilities(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: prctl is async-signal-safe. Without the bounding set, exec leaves even root without capabilities.
    unsafe {
        command.pre_exec(|| {
            for capability in 0..64 {
                libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
            }
            Ok(())
        })
    };
}
