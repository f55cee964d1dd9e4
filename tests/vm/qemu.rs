//! A virtual machine: QEMU's process, its monitor, and the lab's agent in the guest, which is no part of the network.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use vpc_lab::card::Names;
use vpc_lab::vpc::Mac;

/// Slot of the PCI bus in which the first network card is: the guest calls it ens5, as Nitro does.
const FIRST_SLOT: u32 = 5;

/// An emulated TSC is measured wrong now and then on a busy machine, and then the guest's time runs a hundred times too fast; and
/// the kernel's look whether the timer ticks at all comes out wrong.
const KERNEL_PARAMETERS: &str =
    "console=ttyS0 quiet net.ifnames=1 systemd.show_status=0 tsc=unstable clocksource=acpi_pm no_timer_check";

/// For what QEMU or the agent does at once, on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// For a boot where this machine has ten times as much to do as it can.
const BOOT: Duration = Duration::from_secs(600);

/// What a machine is made of.
#[derive(Clone)]
pub struct Parts {
    /// A folder with `kernel` and `initrd`.
    pub kernel: PathBuf,
    /// What its disk is before it writes to it.
    pub disk: PathBuf,
    /// A file that it has as a second disk, to be read.
    pub package: PathBuf,
    /// Its own folder: what it writes, its sockets.
    pub folder: PathBuf,
    /// The network cards that it has from the start, by device number.
    pub cards: Vec<(u32, Mac)>,
}

pub struct Machine {
    parts: Parts,
    process: Child,
    monitor: Monitor,
    agent: BufReader<UnixStream>,
    /// Of the last script.
    number: u64,
}

/// How a script ended, and all that it printed.
pub struct Said {
    pub code: i32,
    pub text: String,
}

impl Machine {
    /// Starts it with a disk of its own. With `memory` it goes on from there, else it boots.
    pub fn start(parts: Parts, memory: Option<&Path>) -> Result<Machine> {
        let at = |name: &str| parts.folder.join(name);
        create_disk(&parts.disk, &at("disk"))?;
        let mut command = Command::new("qemu-system-x86_64");
        // Software emulation wherever it runs: what is measured is to mean the same.
        command.args(["-accel", "tcg,thread=multi", "-cpu", "Nehalem", "-smp", "2", "-m", "768", "-M", "pc"]);
        command.args(["-nodefaults", "-display", "none", "-no-user-config"]);
        // What cloud-init, systemd and others know EC2 by.
        command.args(["-smbios", "type=0,vendor=Amazon EC2"]);
        command.args([
            "-smbios",
            "type=1,manufacturer=Amazon EC2,product=m7i.large,uuid=ec2e1916-9099-7caf-fd21-012345abcdef",
        ]);
        command.arg("-kernel").arg(parts.kernel.join("kernel")).arg("-initrd").arg(parts.kernel.join("initrd"));
        command.args(["-append", KERNEL_PARAMETERS]);
        command.arg("-serial").arg(format!("file:{}", at("console").display()));
        command.args(["-device", "virtio-serial-pci,addr=3", "-device", "virtserialport,chardev=agent,name=lab"]);
        command.arg("-chardev").arg(format!("socket,id=agent,server=on,wait=off,path={}", at("agent").display()));
        command.arg("-drive").arg(format!("if=none,id=disk,cache=unsafe,file={}", at("disk").display()));
        command.args(["-device", "virtio-blk-pci,drive=disk,addr=4"]);
        command
            .arg("-drive")
            .arg(format!("if=none,id=package,format=raw,readonly=on,file={}", parts.package.display()));
        command.args(["-device", "virtio-blk-pci,drive=package,addr=0x1f"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", at("monitor").display()));
        for (number, mac) in &parts.cards {
            command.arg("-netdev").arg(backend(&parts.folder, *number, *mac).to_string());
            command.arg("-device").arg(card(*number, *mac).to_string());
        }
        if memory.is_some() {
            command.args(["-incoming", "defer"]);
        }
        let log = fs::File::create(at("qemu.log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut process = command.spawn().context("starting qemu-system-x86_64")?;
        let mut connect = |name: &str| {
            let stream = connect(&at(name), &mut process).with_context(|| {
                format!("QEMU did not start: {}", fs::read_to_string(at("qemu.log")).unwrap_or_default())
            })?;
            stream.set_read_timeout(Some(SOON))?;
            anyhow::Ok(BufReader::new(stream))
        };
        let monitor = Monitor { stream: connect("monitor")?, events: Vec::new() };
        let agent = connect("agent")?;
        let mut machine = Machine { parts, process, monitor, agent, number: 0 };
        machine.monitor.greet()?;
        if let Some(memory) = memory {
            machine.go_on_from(memory)?;
        }
        Ok(machine)
    }

    fn go_on_from(&mut self, memory: &Path) -> Result<()> {
        self.monitor.prepare_for_files()?;
        self.monitor.execute("migrate-incoming", json!({"uri": format!("file:{}", memory.display())}))?;
        self.monitor.wait_until("the memory", |monitor| {
            Ok(monitor.execute("query-migrate", json!({}))?["status"] == "completed")
        })?;
        self.monitor.execute("cont", json!({}))?;
        self.set_clock()
    }

    fn set_clock(&mut self) -> Result<()> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        self.run(&format!("date --set @{:.3}", now.as_secs_f64())).map(|_| ())
    }

    /// Writes its memory down and ends it; its disk stays where it is, and both together are a machine to go on from.
    pub fn freeze(mut self, memory: &Path) -> Result<PathBuf> {
        self.run("sync")?;
        self.monitor.prepare_for_files()?;
        self.monitor.execute("stop", json!({}))?;
        self.monitor.execute("migrate", json!({"uri": format!("file:{}", memory.display())}))?;
        self.monitor.wait_until("the memory", |monitor| {
            let state = monitor.execute("query-migrate", json!({}))?;
            ensure!(state["status"] != "failed", "writing the memory down: {state}");
            Ok(state["status"] == "completed")
        })?;
        self.end()
    }

    /// Shuts it down in order; its disk stays where it is.
    pub fn power_off(mut self) -> Result<PathBuf> {
        self.run("sync; systemctl poweroff --no-block")?;
        let deadline = Instant::now() + 3 * SOON;
        while self.process.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "the machine does not power off");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(self.parts.folder.join("disk"))
    }

    fn end(mut self) -> Result<PathBuf> {
        self.monitor.execute("quit", json!({}))?;
        self.process.wait()?;
        Ok(self.parts.folder.join("disk"))
    }

    /// Plugs a network card in while it runs.
    pub fn plug(&mut self, number: u32, mac: Mac) -> Result<()> {
        self.monitor.execute("netdev_add", backend(&self.parts.folder, number, mac))?;
        self.monitor.execute("device_add", card(number, mac)).map(|_| ())
    }

    /// Pulls it out, and waits until the guest has let go of it.
    pub fn unplug(&mut self, number: u32) -> Result<()> {
        let id = format!("card{number}");
        self.monitor.events.clear();
        self.monitor.execute("device_del", json!({"id": id}))?;
        self.monitor.wait_until("the guest's leave", |monitor| {
            monitor.execute("query-status", json!({}))?;
            let is_gone = |event: &Value| event["event"] == "DEVICE_DELETED" && event["data"]["device"] == *id;
            Ok(monitor.events.iter().any(is_gone))
        })?;
        self.monitor.execute("netdev_del", json!({"id": format!("cable{number}")})).map(|_| ())
    }

    /// Takes a card's cable out, or puts it back.
    pub fn set_carrier(&mut self, number: u32, is_up: bool) -> Result<()> {
        self.monitor.execute("set_link", json!({"name": format!("card{number}"), "up": is_up})).map(|_| ())
    }

    /// A script that has to succeed; gives what it printed.
    pub fn run(&mut self, script: &str) -> Result<String> {
        let said = self.say(script)?;
        ensure!(said.code == 0, "{script} ({}): {}", said.code, said.text);
        Ok(said.text)
    }

    /// Until the agent answers, which it does not while the machine boots.
    pub fn wait_for_agent(&mut self) -> Result<()> {
        let deadline = Instant::now() + BOOT;
        self.agent.get_ref().set_read_timeout(Some(Duration::from_secs(3)))?;
        while let Err(error) = self.ask("true", Duration::ZERO) {
            ensure!(Instant::now() < deadline, "{error:#}");
        }
        self.agent.get_ref().set_read_timeout(Some(SOON)).map_err(anyhow::Error::from)
    }

    pub fn say(&mut self, script: &str) -> Result<Said> {
        self.ask(script, 3 * SOON)
    }

    fn ask(&mut self, script: &str, patience: Duration) -> Result<Said> {
        self.number += 1;
        let line = format!("{} {}\n", self.number, base64(script.as_bytes()));
        self.agent.get_mut().write_all(line.as_bytes())?;
        let deadline = Instant::now() + patience;
        loop {
            let mut answer = String::new();
            match self.agent.read_line(&mut answer) {
                Ok(0) => bail!("the machine is gone: {}", self.console()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => continue,
                Err(error) => return Err(error).with_context(|| format!("waiting for {script}: {}", self.console())),
            }
            let mut words = answer.trim().splitn(3, ' ');
            let (number, code) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            // What an earlier life of the machine was asked is of no interest.
            if number == self.number.to_string() {
                let text = String::from_utf8_lossy(&unbase64(words.next().unwrap_or_default())).into_owned();
                return Ok(Said { code: code.parse().context("the agent's exit code")?, text });
            }
        }
    }

    fn console(&self) -> String {
        let text = fs::read(self.parts.folder.join("console")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        text.lines().rev().take(20).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A disk that is what another one was, until it is written to.
fn create_disk(backing: &Path, disk: &Path) -> Result<()> {
    let format = if backing.extension().is_some_and(|end| end == "raw") { "raw" } else { "qcow2" };
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", format, "-b"]).arg(backing).arg(disk);
    let status = command.status().context("starting qemu-img")?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

fn connect(socket: &Path, process: &mut Child) -> Result<UnixStream> {
    let deadline = Instant::now() + SOON;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) => ensure!(Instant::now() < deadline, "{}: {error}", socket.display()),
        }
        if let Some(status) = process.try_wait()? {
            bail!("it ended ({status})");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn backend(folder: &Path, number: u32, mac: Mac) -> Value {
    let Names { fabric, machine } = Names::of(folder, mac);
    json!({
        "type": "dgram", "id": format!("cable{number}"),
        "local": {"type": "unix", "path": machine}, "remote": {"type": "unix", "path": fabric},
    })
}

fn card(number: u32, mac: Mac) -> Value {
    json!({
        "driver": "virtio-net-pci", "id": format!("card{number}"), "netdev": format!("cable{number}"),
        "mac": mac.to_string(), "addr": format!("{:#x}", FIRST_SLOT + number),
    })
}

/// QEMU's own protocol: a line of JSON for each command, answer and event.
struct Monitor {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Monitor {
    fn greet(&mut self) -> Result<()> {
        self.read()?;
        self.execute("qmp_capabilities", json!({})).map(|_| ())
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.stream.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut answer = self.read()?;
            if answer.get("event").is_some() {
                self.events.push(answer);
                continue;
            }
            ensure!(answer.get("error").is_none(), "{command} {arguments}: {}", answer["error"]["desc"]);
            return Ok(answer["return"].take());
        }
    }

    /// Each page of memory has its place in the file.
    fn prepare_for_files(&mut self) -> Result<()> {
        let capability = json!({"capability": "mapped-ram", "state": true});
        self.execute("migrate-set-capabilities", json!({"capabilities": [capability]}))?;
        self.execute("migrate-set-parameters", json!({"max-bandwidth": 10_000_000_000_u64})).map(|_| ())
    }

    fn wait_until(&mut self, what: &str, is_so: impl Fn(&mut Monitor) -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + SOON;
        while !is_so(self)? {
            ensure!(Instant::now() < deadline, "{what} did not come in {SOON:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        let length = self.stream.read_line(&mut line).context("waiting for QEMU's monitor")?;
        ensure!(length > 0, "QEMU has ended");
        Ok(serde_json::from_str(&line)?)
    }
}

const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn base64(bytes: &[u8]) -> String {
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let number = group.iter().chain([0; 2].iter()).take(3).fold(0, |sum, byte| sum << 8 | u32::from(*byte));
        for digit in 0..4 {
            let is_padding = digit > group.len();
            let value = (number >> (18 - 6 * digit) & 63) as usize;
            text.push(if is_padding { '=' } else { DIGITS[value].into() });
        }
    }
    text
}

fn unbase64(text: &str) -> Vec<u8> {
    let values = text.bytes().filter_map(|byte| DIGITS.iter().position(|digit| *digit == byte));
    let values: Vec<u32> = values.map(|value| value as u32).collect();
    let group = |group: &[u32]| {
        let number = group.iter().chain([0; 3].iter()).take(4).fold(0, |sum, value| sum << 6 | value);
        number.to_be_bytes()[1..group.len()].to_vec()
    };
    values.chunks(4).flat_map(group).collect()
}
