//! What happens to the machine, and what has to come of it.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::beside;
use crate::ground::{Attached, Ground, Loss, Row, Stage};

/// For what should be done at once, on a busy machine that is emulated.
const SOON: Duration = Duration::from_secs(90);

/// Machines to begin with, in the order in which they are made of each other.
pub const STAGES: [&str; 5] = ["booted", "peer", "enabled", "watched", "off"];

pub struct Scenario {
    pub name: &'static str,
    begin: Begin,
    play: fn(&mut Ground, &[Attached]) -> Result<()>,
}

/// How the machine is when a scenario begins.
enum Begin {
    /// Running, with Debian's packages alone.
    Booted,
    /// Running, with eniup.service enabled.
    Enabled,
    /// Running, with eniup-watch.service enabled.
    Watched,
    /// Running, with amazon-ec2-net-utils.
    Peer,
    /// It boots with so many secondary ENIs and eniup.service enabled.
    Boot(u32),
    /// The same, and metadata does not answer.
    BootWithoutMetadata(u32),
}

impl Begin {
    fn stage(&self) -> &'static str {
        match self {
            Begin::Booted => "booted",
            Begin::Enabled => "enabled",
            Begin::Watched => "watched",
            Begin::Peer => "peer",
            Begin::Boot(_) | Begin::BootWithoutMetadata(_) => "off",
        }
    }

    fn enis(&self) -> u32 {
        match self {
            Begin::Booted | Begin::Enabled | Begin::Watched | Begin::Peer => 0,
            Begin::Boot(enis) | Begin::BootWithoutMetadata(enis) => *enis,
        }
    }
}

pub const SCENARIOS: &[Scenario] = &[
    Scenario { name: "package", begin: Begin::Booted, play: package },
    Scenario { name: "hotplug", begin: Begin::Enabled, play: hotplug },
    Scenario { name: "addresses", begin: Begin::Enabled, play: addresses },
    Scenario { name: "networkd-alone", begin: Begin::Booted, play: networkd_alone },
    Scenario { name: "networkd", begin: Begin::Enabled, play: networkd },
    Scenario { name: "carrier", begin: Begin::Enabled, play: carrier },
    Scenario { name: "netplan", begin: Begin::Enabled, play: netplan },
    Scenario { name: "network-manager", begin: Begin::Enabled, play: network_manager },
    Scenario { name: "ifupdown", begin: Begin::Enabled, play: ifupdown },
    Scenario { name: "bad-input", begin: Begin::Enabled, play: bad_input },
    Scenario { name: "reboot", begin: Begin::Enabled, play: reboot },
    Scenario { name: "boot-1", begin: Begin::Boot(1), play: boot },
    Scenario { name: "boot-4", begin: Begin::Boot(4), play: boot },
    Scenario { name: "boot-15", begin: Begin::Boot(15), play: boot },
    Scenario { name: "boot-without-metadata", begin: Begin::BootWithoutMetadata(1), play: boot_without_metadata },
    Scenario { name: "beside-eniup", begin: Begin::Enabled, play: beside::measure },
    Scenario { name: "beside-eniup-watch", begin: Begin::Watched, play: beside::measure },
    Scenario { name: "beside-amazon-ec2-net-utils", begin: Begin::Peer, play: beside::measure },
];

/// What a stage is made of, if not of the image.
fn origin(stage: &str) -> Option<&'static str> {
    match stage {
        "peer" | "enabled" => Some("booted"),
        "watched" | "off" => Some("enabled"),
        _ => None,
    }
}

pub fn needs(scenario: &Scenario, stage: &str) -> bool {
    std::iter::successors(Some(scenario.begin.stage()), |stage| origin(stage)).any(|needed| needed == stage)
}

/// Makes a stage in its folder below `scratch`.
pub fn make(name: &str, image: &Stage, scratch: &Path) -> Result<()> {
    let folder = scratch.join(name);
    let stage = origin(name).map_or(image.clone(), |origin| Stage::of(&scratch.join(origin)));
    let (mut ground, _) = Ground::start(name, &stage, &folder, 0, false)?;
    match name {
        "booted" => {
            ground.wait_for_boot()?;
            ground.until_answer(&[primary()], SOON)?;
            ground.into_stage(&folder, &stage, true)
        }
        "enabled" => {
            ground.install()?;
            ground.run("systemctl enable --now eniup")?;
            ground.settle()?;
            ground.into_stage(&folder, &stage, true)
        }
        "watched" => {
            ground.run("systemctl disable --now eniup; systemctl enable --now eniup-watch")?;
            ground.settle()?;
            ground.into_stage(&folder, &stage, true)
        }
        "peer" => {
            beside::install_peer(&mut ground)?;
            ground.until_answer(&[primary()], SOON)?;
            ground.into_stage(&folder, &stage, true)
        }
        "off" => ground.into_stage(&folder, &stage, false),
        _ => bail!("there is no stage {name}"),
    }
}

pub fn play(scenario: &Scenario, scratch: &Path) -> (Vec<Row>, Result<()>) {
    let Scenario { name, begin, play } = scenario;
    let stage = Stage::of(&scratch.join(begin.stage()));
    let is_dead = matches!(begin, Begin::BootWithoutMetadata(_));
    match Ground::start(name, &stage, &scratch.join(format!("of-{name}")), begin.enis(), is_dead) {
        Ok((mut ground, attached)) => {
            let result = play(&mut ground, &attached);
            (ground.rows, result)
        }
        Err(error) => (Vec::new(), Err(error)),
    }
}

fn primary() -> IpAddr {
    IpAddr::from([10, 0, 0, 10])
}

fn both(one: &Attached) -> [IpAddr; 2] {
    [one.ipv4, one.ipv6]
}

fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

/// Routes, rules and addresses, without how long they are valid.
fn network(ground: &mut Ground) -> Result<String> {
    let script = "for what in link addr '-4 route show table all' '-6 route show table all' '-4 rule' '-6 rule'; do \
        ip -N $what | sed -e '/valid_lft/d' -e 's/ expires [0-9]*sec//'; done";
    ground.run(script)
}

fn ensure_same(ground: &mut Ground, before: &str, after_what: &str) -> Result<()> {
    let now = network(ground)?;
    let only = |here: &str, there: &str| -> String {
        here.lines().filter(|line| !there.lines().any(|other| other == *line)).collect::<Vec<_>>().join("\n")
    };
    let (lost, new) = (only(before, &now), only(&now, before));
    ensure!(lost.is_empty() && new.is_empty(), "{after_what} has changed the network.\nlost:\n{lost}\nnew:\n{new}");
    Ok(())
}

/// Nothing of an address in rules and routes that are ours.
fn ensure_gone(ground: &mut Ground, address: IpAddr) -> Result<()> {
    let script = "ip rule; ip -6 rule; ip addr; for way in -4 -6; do ip $way route show table all proto 176; done";
    let left: Vec<String> = ground
        .run(script)?
        .lines()
        .filter(|line| line.split([' ', '/']).any(|word| word == address.to_string()))
        .map(String::from)
        .collect();
    ensure!(left.is_empty(), "left of {address}: {left:#?}");
    Ok(())
}

fn ensure_healthy(ground: &mut Ground) -> Result<()> {
    let state = ground.say("systemctl is-system-running; systemctl --failed --no-legend --plain")?.text;
    ensure!(state.trim() == "running", "systemd: {state}\n{}", ground.story()?);
    Ok(())
}

/// Attached, and every address of it answers.
fn attached(ground: &mut Ground, device: u32) -> Result<Attached> {
    let one = ground.attach(device)?;
    ground.until_answer(&both(&one), SOON)?;
    ground.settle()?;
    Ok(one)
}

/// Installing changes nothing, and neither do an upgrade and a removal; what is enabled works.
fn package(ground: &mut Ground, _: &[Attached]) -> Result<()> {
    // A router is heard of at its own time.
    ground.run("timeout 20 sh -c 'until ip -6 route show default dev ens5 | grep -q .; do sleep 0.1; done'")?;
    let before = network(ground)?;
    ground.step("install", Loss::Nothing, &[primary()], |ground| ground.install().map(|()| String::new()))?;
    ensure_same(ground, &before, "installing")?;
    let one = ground.attach(1)?;
    ground.run("udevadm settle")?;
    ensure!(!ground.answers(one.ipv4)?, "a new ENI was configured by what is not enabled");
    let all = [primary(), one.ipv4, one.ipv6];
    ground.step("enable --now", Loss::Nothing, &[primary()], |ground| {
        ground.run("systemctl enable --now eniup")?;
        ground.until_answer(&all, SOON).map(|_| String::new())
    })?;
    ensure_healthy(ground)?;
    let configured = network(ground)?;
    ground.step("upgrade", Loss::Nothing, &all, |ground| {
        ground.run("dpkg --install /root/packages/eniup.deb").map(|_| String::new())
    })?;
    ensure_same(ground, &configured, "upgrading")?;
    for unit in ["eniup.service", "eniup-hotplug.path", "eniup-refresh.timer"] {
        ground.run(&format!("systemctl is-active {unit}")).with_context(|| format!("upgrading has stopped {unit}"))?;
    }
    ground.step("remove", Loss::Nothing, &all, |ground| ground.run("dpkg --remove eniup").map(|_| String::new()))?;
    ensure_same(ground, &configured, "removing")?;
    ground.step("purge", Loss::Nothing, &all, |ground| ground.run("dpkg --purge eniup").map(|_| String::new()))?;
    ensure_same(ground, &configured, "purging")?;
    ensure_healthy(ground)
}

fn hotplug(ground: &mut Ground, _: &[Attached]) -> Result<()> {
    let mut found = None;
    ground.step("attach", Loss::Nothing, &[primary()], |ground| {
        let one = ground.attach(1)?;
        let took = ground.until_answer(&[one.ipv4], SOON)?;
        ground.until_answer(&both(&one), SOON)?;
        found = Some(one);
        Ok(format!("first answer after {}", seconds(took)))
    })?;
    let one = found.take().context("attached")?;
    ground.step("detach", Loss::Nothing, &[primary()], |ground| {
        ground.detach(&one)?;
        ground.settle()?;
        both(&one).iter().try_for_each(|address| ground_is_clear(ground, *address)).map(|()| String::new())
    })?;
    ground.step("attach it as another device", Loss::Nothing, &[primary()], |ground| {
        let one = ground.attach_again(one, 3)?;
        let took = ground.until_answer(&[one.ipv4], SOON)?;
        ground.until_answer(&both(&one), SOON)?;
        let links = ground.run("ip -br link")?;
        ensure!(links.contains("ens8"), "its link has another name than expected: {links}");
        found = Some(one);
        Ok(format!("first answer after {}", seconds(took)))
    })?;
    let one = found.context("attached")?;
    let all = [primary(), one.ipv4, one.ipv6];
    let mut ten = Vec::new();
    ground.step("attach ten at once", Loss::Nothing, &all, |ground| {
        let begun = Instant::now();
        ten = (4..14).map(|device| ground.attach(device)).collect::<Result<_>>()?;
        let addresses: Vec<IpAddr> = ten.iter().flat_map(both).collect();
        let plugged = begun.elapsed();
        ground.until_answer(&addresses, SOON)?;
        Ok(format!("plugged within {}, all answered after {}", seconds(plugged), seconds(begun.elapsed())))
    })?;
    ground.step("detach ten", Loss::Nothing, &all, |ground| {
        ten.iter().try_for_each(|one| ground.detach(one))?;
        ground.settle()?;
        ten.iter().flat_map(both).try_for_each(|address| ground_is_clear(ground, address)).map(|()| String::new())
    })?;
    ensure_healthy(ground)
}

/// The run behind the event of a link that goes may still be about to begin.
fn ground_is_clear(ground: &mut Ground, address: IpAddr) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        match ensure_gone(ground, address) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// Secondary addresses come and go.
fn addresses(ground: &mut Ground, _: &[Attached]) -> Result<()> {
    let one = attached(ground, 1)?;
    let all = [primary(), one.ipv4, one.ipv6];
    for (what, unit) in [("the timer", ""), ("watch", "eniup-watch.service")] {
        if !unit.is_empty() {
            ground.step("watch in place of the timer", Loss::Nothing, &all, |ground| {
                ground
                    .run(&format!("systemctl disable --now eniup; systemctl enable --now {unit}"))
                    .map(|_| String::new())
            })?;
        }
        let new = IpAddr::from([10, 0, 1, 77]);
        ground.step(&format!("assign an address ({what})"), Loss::Nothing, &all, |ground| {
            ground.lab.assign(&one.eni, &[new.into()], false)?;
            Ok(format!("first answer after {}", seconds(ground.until_answer(&[new], SOON)?)))
        })?;
        ground.step(&format!("unassign it ({what})"), Loss::Nothing, &all, |ground| {
            let begun = Instant::now();
            ground.lab.unassign(&one.eni, &[new.into()])?;
            ground_is_clear(ground, new)?;
            Ok(format!("gone after {}", seconds(begun.elapsed())))
        })?;
    }
    ensure_healthy(ground)
}

/// What networkd costs where nobody else has a part in it.
fn networkd_alone(ground: &mut Ground, _: &[Attached]) -> Result<()> {
    for script in ["systemctl restart systemd-networkd", "networkctl reconfigure ens5"] {
        let what = format!("{script}, without eniup");
        ground.step(&what, Loss::Of(&[primary()]), &[primary()], |ground| ground.run(script).map(|_| String::new()))?;
    }
    Ok(())
}

/// What systemd-networkd does to links, with the package's drop-in and without.
fn networkd(ground: &mut Ground, _: &[Attached]) -> Result<()> {
    let one = attached(ground, 1)?;
    let all = [primary(), one.ipv4, one.ipv6];
    let verbs = [
        // With it networkd reads the drop-in, as at any boot.
        ("first restart after the installation", "systemctl restart systemd-networkd"),
        ("restart", "systemctl restart systemd-networkd"),
        ("reload", "networkctl reload"),
        ("reconfigure the primary", "networkctl reconfigure ens5"),
        ("renew", "networkctl renew ens5"),
    ];
    for (what, script) in verbs {
        ground.step(what, Loss::Of(&[primary()]), &all, |ground| ground.run(script).map(|_| String::new()))?;
    }
    ground.run("mkdir -p /etc/systemd/networkd.conf.d; : >/etc/systemd/networkd.conf.d/50-eniup.conf")?;
    for (what, script) in &verbs[1..] {
        let what = format!("{what}, without the drop-in");
        ground.step(&what, Loss::Of(&all), &all, |ground| ground.run(script).map(|_| String::new()))?;
    }
    ensure_healthy(ground)
}

/// The cable is out for a moment.
fn carrier(ground: &mut Ground, _: &[Attached]) -> Result<()> {
    let one = attached(ground, 1)?;
    let all = [primary(), one.ipv4, one.ipv6];
    for (device, cut_off) in [(1, &all[1..]), (0, &all[..1])] {
        let what = format!("the cable of device {device} is out for a second");
        ground.step(&what, Loss::Of(cut_off), &all, |ground| {
            ground.set_carrier(device, false)?;
            std::thread::sleep(Duration::from_secs(1));
            ground.set_carrier(device, true)?;
            Ok(String::new())
        })?;
    }
    ensure_healthy(ground)
}

/// netplan that has the primary alone, and netplan that has all that is named en*.
fn netplan(ground: &mut Ground, _: &[Attached]) -> Result<()> {
    let one = attached(ground, 1)?;
    let all = [primary(), one.ipv4, one.ipv6];
    let file = |ethernet: &str| format!("network:\n  version: 2\n  renderer: networkd\n  ethernets:\n{ethernet}");
    let cases = [
        ("of the primary", &all[..1], file("    ens5:\n      dhcp4: true\n")),
        ("of en*", &all[..], file("    all:\n      match: {name: \"en*\"}\n      dhcp4: true\n      dhcp6: true\n")),
    ];
    // networkd reads the package's drop-in when it starts; `netplan apply` may only reload it.
    ground.run("systemctl restart systemd-networkd")?;
    ground.until_answer(&all, SOON)?;
    ground.run("rm /etc/systemd/network/10-primary.network; mkdir -p /etc/netplan")?;
    for (what, cut_off, text) in cases {
        ground.write("/etc/netplan/50-image.yaml", &text)?;
        ground.run("chmod 600 /etc/netplan/50-image.yaml")?;
        for again in ["", " again"] {
            let what = format!("netplan apply {what}{again}");
            ground.step(&what, Loss::Of(cut_off), &all, |ground| ground.run("netplan apply").map(|_| String::new()))?;
        }
    }
    ensure_healthy(ground)
}

/// NetworkManager in networkd's place, with secondary ENIs left alone as docs/other-managers.md has it, and without.
fn network_manager(ground: &mut Ground, _: &[Attached]) -> Result<()> {
    let one = attached(ground, 1)?;
    let all = [primary(), one.ipv4, one.ipv6];
    let mac = ground.run("cat /sys/class/net/ens6/address")?;
    let file = "/etc/NetworkManager/conf.d/90-eniup.conf";
    ground.write(file, &format!("[keyfile]\nunmanaged-devices=mac:{}\n", mac.trim()))?;
    ground.run("systemctl unmask NetworkManager NetworkManager-dispatcher")?;
    ground.step("networkd goes, NetworkManager comes", Loss::Of(&[primary()]), &all, |ground| {
        ground.run(
            "systemctl disable --now systemd-networkd.socket systemd-networkd; systemctl enable --now NetworkManager",
        )?;
        Ok(String::new())
    })?;
    let connection = ground.run("nmcli -g GENERAL.CONNECTION device show ens5")?;
    let up = format!("nmcli connection up '{}'", connection.trim());
    for (what, script) in
        [("nmcli connection up, the primary's", up.as_str()), ("restart", "systemctl restart NetworkManager")]
    {
        ground.step(what, Loss::Of(&[primary()]), &all, |ground| ground.run(script).map(|_| String::new()))?;
    }
    ground.step("it takes the second ENI, too", Loss::Of(&all), &all, |ground| {
        ground
            .run(&format!("rm {file}; systemctl reload NetworkManager; nmcli device set ens6 managed yes; sleep 3"))
            .map(|_| String::new())
    })?;
    ground.step("restart with the second ENI", Loss::Of(&all), &all, |ground| {
        ground.run("systemctl restart NetworkManager").map(|_| String::new())
    })?;
    ensure_healthy(ground)
}

/// ifupdown in networkd's place.
fn ifupdown(ground: &mut Ground, _: &[Attached]) -> Result<()> {
    let one = attached(ground, 1)?;
    let all = [primary(), one.ipv4, one.ipv6];
    ground.write("/etc/network/interfaces", "auto lo\niface lo inet loopback\nauto ens5\niface ens5 inet dhcp\n")?;
    ground.run("systemctl unmask networking")?;
    ground.step("networkd goes, ifupdown comes", Loss::Of(&[primary()]), &all, |ground| {
        ground.run(
            "systemctl disable --now systemd-networkd.socket systemd-networkd; systemctl enable --now networking",
        )?;
        Ok(String::new())
    })?;
    let verbs =
        [("restart", "systemctl restart networking"), ("ifdown and ifup of the primary", "ifdown ens5; ifup ens5")];
    for (what, script) in verbs {
        ground.step(what, Loss::Of(&[primary()]), &all, |ground| ground.run(script).map(|_| String::new()))?;
    }
    ensure_healthy(ground)
}

/// Each is told in a clear line and with the right exit code, is no loop, and takes nothing away.
fn bad_input(ground: &mut Ground, _: &[Attached]) -> Result<()> {
    let one = attached(ground, 1)?;
    let all = [primary(), one.ipv4, one.ipv6];
    let event = "touch /run/eniup/hotplug/event";
    let cases = [
        (
            "nonsense in the configuration",
            "echo 'tineout = 3' >/etc/eniup/config.toml",
            event,
            "78",
            "tineout",
            "rm /etc/eniup/config.toml",
        ),
        ("an event for a link that is gone", "true", event, "0", "", "true"),
        ("a package that is half removed", "mv /usr/sbin/eniup /root/", event, "203", "", "mv /root/eniup /usr/sbin/"),
    ];
    for (what, before, event, code, word, after) in cases {
        ground.step(what, Loss::Nothing, &all, |ground| {
            ground.run(before)?;
            let told = one_run(ground, event, code)?;
            ensure!(told.contains(word), "it does not say {word}: {told}");
            ground.run(after)?;
            Ok(told.lines().last().unwrap_or_default().into())
        })?;
    }
    ground.step("an event without metadata", Loss::Nothing, &all, |ground| {
        ground.set_metadata_dead(true)?;
        let told = one_run(ground, event, "69")?;
        ensure!(told.contains("metadata"), "{told}");
        ground.set_metadata_dead(false)?;
        Ok(told.lines().last().unwrap_or_default().into())
    })?;
    ground.step("a /run that cannot be written to", Loss::Nothing, &all, |ground| {
        ground.run("mount --bind /run/eniup /run/eniup && mount -o remount,bind,ro /run/eniup")?;
        let said = ground.say("eniup reconcile --timeout 5s")?;
        ground.run("umount /run/eniup")?;
        ensure!(said.code == 1 && said.text.contains("/run/eniup"), "{}: {}", said.code, said.text);
        Ok(said.text.lines().last().unwrap_or_default().into())
    })?;
    ground.run("systemctl reset-failed")?;
    one_run(ground, event, "0")?;
    ensure_healthy(ground)
}

/// What an event makes eniup-hotplug.service say; it runs once, ends with this code, and does not run again by itself.
fn one_run(ground: &mut Ground, event: &str, code: &str) -> Result<String> {
    // The timer's runs say the same in between.
    let runs = "systemctl show -P ExecMainStartTimestampMonotonic -P InactiveEnterTimestampMonotonic eniup-hotplug.service | tr '\\n' ' '";
    let before = ground.run(runs)?;
    let since = ground.run("date +%s.%N")?;
    ground.run(event)?;
    let script = format!(
        "n=0; until test \"$({runs})\" != '{before}' && ! systemctl is-active eniup-hotplug.service | grep -q activating; do
            n=$((n + 1)); test $n -lt 400 || exit 1; sleep 0.2; done
        sleep 3; {runs}"
    );
    ground.run(&script).context("no run ended")?;
    let after = ground.run(&format!("sleep 3; {runs}"))?;
    ensure!(ground.run(&format!("sleep 3; {runs}"))? == after, "it runs again and again");
    let status = ground.run("systemctl show -P ExecMainStatus eniup-hotplug.service")?;
    let told =
        ground.run(&format!("journalctl -u eniup-hotplug.service -o cat --no-pager --since @{}", since.trim()))?;
    ensure!(status.trim() == code, "it ended with {} in place of {code}: {told}", status.trim());
    Ok(told)
}

fn reboot(ground: &mut Ground, _: &[Attached]) -> Result<()> {
    let ones = (1..4).map(|device| attached(ground, device)).collect::<Result<Vec<_>>>()?;
    ground.reboot()?;
    told_boot(ground, &ones)
}

fn boot(ground: &mut Ground, attached: &[Attached]) -> Result<()> {
    told_boot(ground, attached)
}

fn told_boot(ground: &mut Ground, attached: &[Attached]) -> Result<()> {
    let begun = Instant::now();
    let patience = 3 * SOON;
    ground.until_answer(&[primary()], patience)?;
    let first = begun.elapsed();
    ground.until_answer(&attached.iter().flat_map(both).collect::<Vec<_>>(), patience)?;
    let all = begun.elapsed();
    ground.wait_for_boot()?;
    ground.settle()?;
    ensure_healthy(ground)?;
    let unit = ground
        .run("systemctl show -P ActiveEnterTimestampMonotonic -P InactiveExitTimestampMonotonic eniup.service")?;
    let times: Vec<u64> = unit.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let [one, other] = times[..] else { bail!("eniup.service has not run: {unit}") };
    let took = Duration::from_micros(one.abs_diff(other));
    let note = format!(
        "{} secondary ENIs; the primary answered after {}, all after {}, of which eniup.service took {}",
        attached.len(),
        seconds(first),
        seconds(all),
        seconds(took)
    );
    ground.note("boot", note);
    Ok(())
}

/// The boot goes on, and the timer heals it when metadata is there.
fn boot_without_metadata(ground: &mut Ground, attached: &[Attached]) -> Result<()> {
    let begun = Instant::now();
    ground.until_answer(&[primary()], 3 * SOON)?;
    let state = ground.say("systemctl is-system-running --wait")?.text;
    let booted = begun.elapsed();
    let code = ground.run("systemctl show -P ExecMainStatus eniup.service")?;
    // On a starved machine systemd's patience may end before the run's own time.
    ensure!(["69", "15"].contains(&code.trim()), "eniup.service ended with {code}");
    ensure!(!ground.answers(attached[0].ipv4)?);
    ground.set_metadata_dead(false)?;
    let healed = ground.until_answer(&both(&attached[0]), SOON)?;
    let note = format!(
        "eniup.service ended with {}; booted ({}) after {}; all answered {} after metadata did",
        code.trim(),
        state.trim(),
        seconds(booted),
        seconds(healed)
    );
    ground.note("boot without metadata", note);
    Ok(())
}
