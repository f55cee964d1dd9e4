//! The same things done to two machines, one with eniup and one with Debian's amazon-ec2-net-utils: how long each takes, and what
//! it costs.

use std::net::IpAddr;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;

use crate::ground::{Attached, Ground};

/// Longer than either of them ever needed, also for ten ENIs at once on a machine with other things to do.
const PATIENCE: Duration = Duration::from_secs(900);

/// As much of a quiet machine is looked at as the peer's timer needs for one turn.
const QUIET: Duration = Duration::from_secs(90);

/// So many times in a row what is there is looked at again, as one time alone is less than counting can tell.
const REFRESHES: u32 = 3;

/// What the machine has spent so far, or what something has cost.
#[derive(Clone, Copy)]
struct Spent {
    forks: u64,
    /// Hundredths of a second of both processors.
    cpu: u64,
    requests: u64,
}

impl Spent {
    fn since(self, earlier: Spent) -> Spent {
        let of = |value: fn(Spent) -> u64| value(self).saturating_sub(value(earlier));
        Spent { forks: of(|spent| spent.forks), cpu: of(|spent| spent.cpu), requests: of(|spent| spent.requests) }
    }

    fn times(self, n: u64) -> Spent {
        Spent { forks: n * self.forks, cpu: n * self.cpu, requests: n * self.requests }
    }
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
    ground.settle().map(|_| ())
}

/// Secondary ENIs are attached until they are one, four and fourteen; what is there is looked at again with each number of them.
pub fn measure(ground: &mut Ground, _: &[Attached]) -> Result<()> {
    let one = cost(ground, "attach → first answer", |ground| {
        let one = ground.attach(1)?;
        let took = ground.until_answer(&[one.ipv4], PATIENCE)?;
        Ok((took, one))
    })?;
    cost(ground, "nothing happens for 90 s, 1 secondary ENI", |_| {
        std::thread::sleep(QUIET);
        Ok((QUIET, ()))
    })?;
    refresh(ground, 1)?;
    let new = IpAddr::from([10, 0, 1, 77]);
    cost(ground, "assign → first answer", |ground| {
        ground.lab.assign(&one.eni, &[IpNet::from(new)], false)?;
        Ok((ground.until_answer(&[new], PATIENCE)?, ()))
    })?;
    attach_at_once(ground, 2..5)?;
    refresh(ground, 4)?;
    attach_at_once(ground, 5..15)?;
    refresh(ground, 14)
}

fn attach_at_once(ground: &mut Ground, devices: Range<u32>) -> Result<()> {
    let what = format!("attach {} at once → all answer", devices.len());
    cost(ground, &what, |ground| {
        let begun = Instant::now();
        let attached = devices.map(|device| ground.attach(device)).collect::<Result<Vec<_>>>()?;
        ground.until_answer(&attached.iter().map(|one| one.ipv4).collect::<Vec<_>>(), PATIENCE)?;
        Ok((begun.elapsed(), ()))
    })
}

/// All ENIs are looked at again, as the timers do, which are quiet meanwhile.
fn refresh(ground: &mut Ground, secondaries: u32) -> Result<()> {
    let (timers, service) = match ground.scenario.as_str() {
        "beside-amazon-ec2-net-utils" => ("refresh-policy-routes@$link.timer", "refresh-policy-routes@$link.service"),
        "beside-eniup" => ("eniup-refresh.timer", "eniup-refresh.service"),
        // It has asked again before one could tell it to.
        _ => return Ok(()),
    };
    let of_links = |name: &str| match name.contains("$link") {
        true => format!("$(cd /sys/class/net; for link in ens*; do echo {name}; done)"),
        false => name.to_string(),
    };
    ground.run(&format!("systemctl stop {}", of_links(timers)))?;
    let start = format!("systemctl start {}", of_links(service));
    cost(ground, &format!("refreshed {REFRESHES} times, {secondaries} secondary ENIs"), |ground| {
        let begun = Instant::now();
        for _ in 0..REFRESHES {
            ground.run(&start)?;
        }
        Ok((begun.elapsed(), ()))
    })?;
    ground.run(&format!("systemctl start {}", of_links(timers))).map(|_| ())
}

/// Does something, waits until nothing is under way, and notes what it took until its answer and cost altogether.
fn cost<T>(ground: &mut Ground, what: &str, act: impl FnOnce(&mut Ground) -> Result<(Duration, T)>) -> Result<T> {
    ground.settle()?;
    // Counting and looking cost something themselves.
    let idle = [spent(ground)?, spent(ground)?];
    let counting = idle[1].since(idle[0]);
    ground.settle()?;
    let before = spent(ground)?;
    let looking = before.since(idle[1]).since(counting);
    let (took, result) = act(ground).with_context(|| what.to_string())?;
    let looks = ground.settle()?;
    let after = spent(ground)?;
    ensure!(after.forks >= before.forks, "it has rebooted");
    let cost = after.since(before).since(counting).since(looking.times(looks));
    let note = format!(
        "{:.2} s, {} forks, {} requests, {:.2} CPU s",
        took.as_secs_f64(),
        cost.forks,
        cost.requests,
        cost.cpu as f64 / 100.0
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
