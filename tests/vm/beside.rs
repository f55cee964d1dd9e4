//! The same things done to two machines, one with eniup and one with Debian's amazon-ec2-net-utils: how long each takes, and what
//! it costs.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;

use crate::ground::{Attached, Ground};

/// Longer than either of them ever needed.
const PATIENCE: Duration = Duration::from_secs(240);

/// As much of a quiet machine is looked at as the peer's timer needs for one turn.
const QUIET: Duration = Duration::from_secs(90);

/// What the machine has spent so far.
#[derive(Clone, Copy)]
struct Spent {
    forks: u64,
    /// Hundredths of a second of both processors.
    cpu: u64,
    requests: u64,
}

/// Debian's package, with the lab's driver in its rule and its `.network`, and nothing else changed.
pub fn install_peer(ground: &mut Ground) -> Result<()> {
    ground.run(
        "dpkg --install /root/packages/amazon-ec2-net-utils_*.deb
        sed -i 's/vif|ena|ixgbevf/vif|ena|ixgbevf|virtio_net/' /usr/lib/udev/rules.d/99-vpc-policy-routes.rules
        sed -i 's/^Driver=.*/& virtio_net/' /usr/lib/systemd/network/80-ec2.network
        rm /etc/systemd/network/10-primary.network
        udevadm control --reload
        systemctl restart systemd-networkd
        udevadm trigger --action=add --settle /sys/class/net/ens5
        systemctl is-enabled policy-routes@ens5.service",
    )?;
    ground.settle()
}

/// An ENI is attached, gets an address, loses it, and is detached; then nothing happens for a while.
pub fn measure(ground: &mut Ground, _: &[Attached]) -> Result<()> {
    let one = cost(ground, "attach → first answer", |ground| {
        let one = ground.attach(1)?;
        let took = ground.until_answer(&[one.ipv4], PATIENCE)?;
        Ok((took, one))
    })?;
    cost(ground, "nothing happens, with two ENIs", |_| {
        std::thread::sleep(QUIET);
        Ok((QUIET, ()))
    })?;
    let new = IpAddr::from([10, 0, 1, 77]);
    cost(ground, "assign → first answer", |ground| {
        ground.lab.assign(&one.eni, &[IpNet::from(new)], false)?;
        Ok((ground.until_answer(&[new], PATIENCE)?, ()))
    })?;
    cost(ground, "attach three at once → all answer", |ground| {
        let begun = Instant::now();
        let three = (2..5).map(|device| ground.attach(device)).collect::<Result<Vec<_>>>()?;
        ground.until_answer(&three.iter().map(|one| one.ipv4).collect::<Vec<_>>(), PATIENCE)?;
        Ok((begun.elapsed(), ()))
    })
}

/// Does something, waits until nothing is under way, and notes what it took until its answer and cost altogether.
fn cost<T>(ground: &mut Ground, what: &str, act: impl FnOnce(&mut Ground) -> Result<(Duration, T)>) -> Result<T> {
    ground.settle()?;
    // Looking costs something itself.
    let first = spent(ground)?;
    let before = spent(ground)?;
    let (took, result) = act(ground).with_context(|| what.to_string())?;
    ground.settle()?;
    let after = spent(ground)?;
    let of = |value: fn(Spent) -> u64| (value(after) - value(before)).saturating_sub(value(before) - value(first));
    ensure!(after.forks >= before.forks, "it has rebooted");
    let note = format!(
        "{:.2} s, {} forks, {} requests, {:.2} CPU s",
        took.as_secs_f64(),
        of(|spent| spent.forks),
        of(|spent| spent.requests),
        of(|spent| spent.cpu) as f64 / 100.0
    );
    ground.note(what, note);
    Ok(result)
}

fn spent(ground: &mut Ground) -> Result<Spent> {
    // user, nice, system, irq and softirq; idle, iowait and steal are nobody's.
    let text = ground.run("awk '/^cpu / {print $2 + $3 + $4 + $7 + $8} /^processes/ {print $2}' /proc/stat")?;
    let mut words = text.split_whitespace().map(str::parse);
    let mut next = || anyhow::Ok(words.next().context("two numbers")??);
    let (cpu, forks) = (next()?, next()?);
    let counters = ground.lab.service("web")?.requests();
    let requests = counters.tokens + counters.gets_by_status.values().sum::<u64>();
    Ok(Spent { forks, cpu, requests })
}
