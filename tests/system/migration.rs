//! The steps of `docs/migration.md`, there and back, on a real systemd-networkd, beside somebody who asks all the time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};

use crate::system::{Installed, SECOND, System};

const PATIENCE: Duration = Duration::from_secs(15);

/// What a connection does not notice much: TCP sends again after 0.2, 0.6, 1.4, 3 s.
const LONGEST_GAP: Duration = Duration::from_secs(3);

/// Drop-ins as amazon-ec2-net-utils makes them of metadata (`lib/lib.sh`), beside its `80-ec2.network` for every ENI. A veth has no
/// driver of EC2's to match by.
const NET_UTILS: &str = "/run/systemd/network/70-ens6.network";

fn net_utils(system: &System) -> Result<()> {
    let all = "[Match]\nName=ens*\n[Link]\nMTUBytes=9001\n[Network]\nDHCP=ipv4\nIPv6AcceptRA=no\n";
    system.write("/usr/lib/systemd/network/80-ec2.network", all)?;
    of_net_utils(system, "ens5", 512)?;
    of_net_utils(system, "ens6", 513)
}

fn of_net_utils(system: &System, link: &str, metric: u32) -> Result<()> {
    let network = format!("/run/systemd/network/70-{link}.network");
    let mut eni = format!("[Match]\nMACAddress={}\n[DHCPv4]\nRouteMetric={metric}\n", mac(system, link)?);
    if network == NET_UTILS {
        eni += "[Route]\nTable=10001\nGateway=_dhcp4\n[Route]\nTable=10001\nDestination=10.0.1.0/24\n";
        let rule = format!("[RoutingPolicyRule]\nFrom={SECOND}\nPriority=10001\nTable=10001\n");
        system.write(&format!("{network}.d/ec2net_policy_4.conf"), &rule)?;
    }
    system.write(&format!("{network}.d/eni.conf"), &eni)?;
    system.run(&["ln", "-s", "/usr/lib/systemd/network/80-ec2.network", &network])
}

/// What netplan makes of cloud-init's configuration (`convert_ec2_metadata_network_config`).
const NETPLAN: &str = "/run/systemd/network/10-netplan-ens6.network";

fn cloud_init(system: &System) -> Result<()> {
    let dhcp = "[Network]\nDHCP=ipv4\nLinkLocalAddressing=ipv6\n[DHCP]\nUseMTU=true\n";
    let primary = format!("[Match]\nName=ens5\n{dhcp}RouteMetric=100\n");
    system.write("/run/systemd/network/10-netplan-ens5.network", &primary)?;
    let second = format!(
        "[Match]\nName=ens6\n{dhcp}RouteMetric=200\n\
         [Route]\nDestination=0.0.0.0/0\nGateway=10.0.1.1\nTable=101\n\
         [Route]\nDestination=10.0.1.0/24\nScope=link\nTable=101\n\
         [RoutingPolicyRule]\nFrom={SECOND}\nTable=101\n"
    );
    system.write(NETPLAN, &second)
}

fn mac(system: &System, link: &str) -> Result<String> {
    Ok(system.says(&["cat", &format!("/sys/class/net/{link}/address")])?.trim().into())
}

/// How long nobody was answered at a time, while this is done.
fn gaps(system: &System, act: impl FnOnce() -> Result<()>) -> Result<Vec<Duration>> {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| -> Result<Vec<Duration>> {
            let (mut gaps, mut silent_since) = (Vec::new(), None);
            while !is_over.load(Ordering::Relaxed) || silent_since.is_some() {
                let asked = Instant::now();
                match system.answers(SECOND)? {
                    true => gaps.extend(silent_since.take().map(|since: Instant| since.elapsed())),
                    false => ensure!(silent_since.get_or_insert(asked).elapsed() < PATIENCE, "nobody answers any more"),
                }
            }
            Ok(gaps)
        });
        let done = act();
        is_over.store(true, Ordering::Relaxed);
        let gaps = asking.join().map_err(|_| anyhow!("a thread panicked"))?;
        done.and(gaps)
    })
}

fn ensure_short(gaps: &[Duration], what: &str) -> Result<()> {
    println!("{what}: not answered for {gaps:?}");
    ensure!(gaps.iter().max().is_none_or(|gap| *gap < LONGEST_GAP), "{what}: not answered for {gaps:?}");
    Ok(())
}

/// Steps 3 to 5.
fn take_over(system: &System) -> Result<()> {
    system.install()?;
    system.run(&["systemctl", "restart", "systemd-networkd"])?;
    system.run(&["eniup", "reconcile"])?;
    system.run(&["systemctl", "enable", "--now", "eniup-watch"])
}

/// networkd has nothing to do with the second ENI any more, and all of it is eniup's.
fn ensure_taken_over(system: &System) -> Result<()> {
    system.wait(PATIENCE, "networkd to leave the link", |system| {
        Ok(system.says(&["networkctl", "status", "--no-pager", "ens6"])?.contains("(unmanaged)"))
    })?;
    let is_whole = |system: &System| Ok(system.says(&["eniup", "status"])?.contains("10.0.1.20/24, by eniup"));
    system.wait(PATIENCE, "the address", is_whole)?;
    let doctor = system.says(&["eniup", "doctor"])?;
    ensure!(doctor.contains("0 failed, 0 with a warning"), "{doctor}");
    Ok(())
}

#[test]
fn whoever_comes_from_amazon_ec2_net_utils_is_reached_all_the_time_there_and_back() {
    vpc_lab::inside(|| {
        let mut system = System::boot(Installed::No)?;
        net_utils(&system)?;
        system.run(&["systemctl", "start", "systemd-networkd"])?;
        system.wait(PATIENCE, "the second ENI", |system| system.answers(SECOND))?;
        let narrow = "/etc/systemd/network/80-ec2.network.d/primary.conf";
        let there = gaps(&system, || {
            take_over(&system)?;
            system.write(narrow, &format!("[Match]\nMACAddress={}\n", mac(&system, "ens5")?))?;
            system.run(&["rm", "-r", NET_UTILS, &format!("{NET_UTILS}.d")])?;
            system.run(&["networkctl", "reload"])?;
            ensure_taken_over(&system)
        })?;
        ensure_short(&there, "there")?;

        // As after a reboot: the primary has the package's file alone.
        system.run(&["sh", "-c", "rm -r /run/systemd/network/70-ens5.network*"])?;
        system.run(&["networkctl", "reload"])?;
        let third = system.attach()?;
        system.wait(PATIENCE, "an ENI that comes later", |system| system.answers(&third.address))?;
        let defaults = system.says(&["ip", "route", "show", "default"])?;
        ensure!(defaults.lines().count() == 1 && defaults.contains("dev ens5"), "{defaults}");
        system.detach(&third)?;

        let back = gaps(&system, || {
            system.run(&["rm", narrow])?;
            of_net_utils(&system, "ens6", 513)?;
            system.run(&["networkctl", "reload"])?;
            system.wait(PATIENCE, "its rule", |system| Ok(system.says(&["ip", "rule"])?.contains("lookup 10001")))?;
            system.run(&["systemctl", "disable", "--now", "eniup", "eniup-watch"])?;
            system.run(&["eniup", "release"])
        })?;
        ensure_short(&back, "back")
    });
}

#[test]
fn whoever_comes_from_cloud_init_and_netplan_is_reached_all_the_time() {
    vpc_lab::inside(|| {
        let system = System::boot(Installed::No)?;
        cloud_init(&system)?;
        system.run(&["systemctl", "start", "systemd-networkd"])?;
        system.wait(PATIENCE, "the second ENI", |system| system.answers(SECOND))?;
        let there = gaps(&system, || {
            take_over(&system)?;
            // What `netplan apply` does when an entry is gone.
            system.run(&["rm", NETPLAN])?;
            system.run(&["networkctl", "reload"])?;
            ensure_taken_over(&system)
        })?;
        ensure_short(&there, "there")
    });
}
