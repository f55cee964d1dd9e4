//! The package on a real Debian with its own systemd and udev, in an instance of the VPC in a box. `tests/system/run` prepares
//! what is needed and calls this.

mod system;

use std::time::Duration;

use anyhow::ensure;
use system::{Installed, System};

/// For what should be done at once, on a busy machine.
const SOON: Duration = Duration::from_secs(15);

#[test]
fn installing_changes_nothing_until_it_is_enabled_and_removing_changes_nothing_either() {
    vpc_lab::inside(|| {
        let mut system = System::boot(Installed::No)?;
        let before = system.network()?;
        system.install()?;
        system.ensure_network(&before)?;
        for unit in ["eniup.service", "eniup-refresh.service"] {
            ensure!(system.says(&["systemctl", "is-enabled", unit])?.trim() == "disabled", "{unit} is enabled");
        }
        let eni = system.attach()?;
        system.run(&["udevadm", "settle"])?;
        ensure!(system.says(&["systemctl", "list-units", "--all", "--plain", "--no-legend", "eniup*"])?.is_empty());
        ensure!(!system.answers(&eni.address)?, "a new ENI was configured by what is not enabled");
        ensure!(system.journal("-p", "warning")?.is_empty(), "{}", system.journal("-p", "warning")?);

        system.run(&["systemctl", "enable", "--now", "eniup"])?;
        ensure!(system.answers(system::SECOND)? && system.answers(&eni.address)?, "an ENI does not answer");
        for unit in ["eniup.service", "eniup-hotplug.path", "eniup-refresh.timer"] {
            ensure!(system.says(&["systemctl", "is-active", unit])?.trim() == "active", "{unit} is not active");
        }
        ensure!(system.says(&["systemctl", "is-system-running"])?.trim() == "running");

        let configured = system.network()?;
        system.run(&["dpkg", "--install", "/root/eniup.deb"])?;
        system.ensure_network(&configured)?;
        for unit in ["eniup.service", "eniup-hotplug.path", "eniup-refresh.timer"] {
            ensure!(system.says(&["systemctl", "is-active", unit])?.trim() == "active", "upgrading has stopped {unit}");
        }
        system.run(&["dpkg", "--remove", "eniup"])?;
        system.ensure_network(&configured)?;
        ensure!(system.says(&["systemctl", "list-units", "--all", "--plain", "--no-legend", "eniup*"])?.is_empty());
        system.attach()?;
        system.run(&["udevadm", "settle"])?;
        system.run(&["dpkg", "--purge", "eniup"])?;
        system.run(&["systemctl", "daemon-reload"])?;
        ensure!(system.says(&["systemctl", "is-system-running"])?.trim() == "running");
        ensure!(system.journal("-p", "warning")?.is_empty(), "{}", system.journal("-p", "warning")?);
        let left = system.says(&["find", "/etc", "/usr", "/var/lib", "-name", "*eniup*", "-not", "-name", "*.d"])?;
        ensure!(left.trim() == "/etc/udev/rules.d/99-eniup-lab.rules", "left: {left}");
        ensure!(system.answers(system::SECOND)?, "removing took the network away");
        Ok(())
    });
}

#[test]
fn a_disabled_package_looks_no_longer() {
    vpc_lab::inside(|| {
        let mut system = System::boot(Installed::Enabled)?;
        system.run(&["systemctl", "disable", "--now", "eniup"])?;
        for unit in ["eniup.service", "eniup-hotplug.path", "eniup-refresh.timer"] {
            ensure!(system.says(&["systemctl", "is-active", unit])?.trim() == "inactive", "{unit} is active");
        }
        let wanted = system.says(&["find", "/etc/systemd/system", "-name", "eniup*", "-path", "*.wants/*"])?;
        ensure!(wanted.is_empty(), "{wanted}");
        let configured = system.network()?;
        let eni = system.attach()?;
        system.run(&["udevadm", "settle"])?;
        ensure!(!system.answers(&eni.address)?);
        let (lost, _) = system.changes(&configured)?;
        ensure!(lost.is_empty(), "lost: {lost}");
        Ok(())
    });
}

#[test]
fn hotplugged_enis_are_configured_and_gone_ones_are_cleared_away() {
    vpc_lab::inside(|| {
        let mut system = System::boot(Installed::Enabled)?;
        system.list_after(Duration::from_secs(1))?;
        let runs = system.runs("hotplug")?;
        let attached = std::time::Instant::now();
        let eni = system.attach()?;
        system.wait(SOON, "the new ENI", |system| system.answers(&eni.address))?;
        println!(
            "metadata listed the ENI after 1 s; it answered {:.1} s after it was attached",
            attached.elapsed().as_secs_f64()
        );
        ensure!(system.runs("hotplug")? == runs + 1, "{} runs", system.runs("hotplug")? - runs);
        system.detach(&eni)?;
        system.wait(SOON, "the rules' end", |system| {
            Ok(!system.network()?.contains(&eni.address) && system.is_idle("hotplug")?)
        })?;
        ensure!(system.says(&["systemctl", "is-system-running"])?.trim() == "running");
        ensure!(
            system.journal("-u", "eniup-hotplug.service")?.contains("ip addr add"),
            "what was changed is not in the journal"
        );
        Ok(())
    });
}

/// The first event starts a run, which dead metadata holds up; those that come meanwhile cause one more.
#[test]
fn events_during_a_run_cause_exactly_one_more() {
    vpc_lab::inside(|| {
        let system = System::boot(Installed::Enabled)?;
        let runs = system.runs("hotplug")?;
        system.kill_metadata()?;
        system.event()?;
        system.wait(SOON, "a run", |system| Ok(system.runs("hotplug")? == runs + 1))?;
        for _ in 0..20 {
            system.event()?;
        }
        ensure!(system.runs("hotplug")? == runs + 1 && !system.is_idle("hotplug")?, "the run had ended by then");
        system.revive_metadata()?;
        system.wait(Duration::from_secs(60), "the runs' end", |system| system.is_idle("hotplug"))?;
        ensure!(system.runs("hotplug")? == runs + 2, "{} runs", system.runs("hotplug")? - runs);
        system.event()?;
        system.wait(Duration::from_secs(60), "the run's end", |system| {
            Ok(system.runs("hotplug")? == runs + 3 && system.is_idle("hotplug")?)
        })?;
        Ok(())
    });
}

/// The run behind the start may come before networkd has taken the primary's address over, with which the kernel removes routes;
/// then the timer's is the one that heals.
#[test]
fn a_restart_of_networkd_is_followed_by_a_run() {
    const TIMER: Duration = Duration::from_secs(45);
    vpc_lab::inside(|| {
        let system = System::boot(Installed::Enabled)?;
        system.write("/etc/systemd/network/10-primary.network", "[Match]\nName=ens5\n[Network]\nDHCP=ipv4\n")?;
        let configured = system.network_of_ours()?;
        for verb in ["start", "restart"] {
            let runs = system.runs("refresh")?;
            system.run(&["systemctl", verb, "systemd-networkd"])?;
            // Sooner than the timer, which comes 26 s after a run at the earliest.
            system.wait(SOON, "a run behind it", |system| Ok(system.runs("refresh")? > runs))?;
            system.wait(SOON, "networkd", |system| system.is_configured("ens5"))?;
            system.wait(TIMER, "all of eniup's", |system| {
                Ok(system.is_idle("refresh")? && system.ensure_ours(&configured).is_ok())
            })?;
        }
        // A restart while a run is under way: that one begins anew.
        system.kill_metadata()?;
        let runs = system.runs("refresh")?;
        system.run(&["systemctl", "start", "--no-block", "eniup-refresh.service"])?;
        system.wait(SOON, "a run", |system| Ok(system.runs("refresh")? == runs + 1))?;
        system.run(&["systemctl", "restart", "systemd-networkd"])?;
        system.wait(SOON, "its second beginning", |system| Ok(system.runs("refresh")? == runs + 2))?;
        Ok(())
    });
}

/// With nothing that would put back what networkd takes away. Of the primary's link the kernel itself takes the routes while it
/// has no address, as between two leases.
#[test]
fn the_drop_in_keeps_networkd_from_removing_what_is_ours() {
    vpc_lab::inside(|| {
        let system = System::boot(Installed::Enabled)?;
        system.write("/etc/systemd/network/10-primary.network", "[Match]\nName=ens5\n[Network]\nDHCP=ipv4\n")?;
        system.run(&["systemctl", "mask", "--runtime", "eniup-refresh.service"])?;
        let mut configured = system.network_of_ours()?;
        configured.retain(|line| !line.contains("dev ens5"));
        system.run(&["systemctl", "start", "systemd-networkd"])?;
        system.wait(SOON, "networkd", |system| system.is_configured("ens5"))?;
        system.ensure_ours(&configured)?;
        system.write("/etc/systemd/networkd.conf.d/50-eniup.conf", "")?;
        system.run(&["systemctl", "restart", "systemd-networkd"])?;
        system.wait(SOON, "the loss of rules", |system| Ok(!system.says(&["ip", "rule"])?.contains("proto eniup")))
    });
}

#[test]
fn a_boot_with_dead_metadata_goes_on_and_the_timer_heals_it() {
    vpc_lab::inside(|| {
        let system = System::boot(Installed::EnabledAndDeadMetadata)?;
        system.wait(Duration::from_secs(25), "the end of the boot", |system| {
            Ok(["running", "degraded"].contains(&system.says(&["systemctl", "is-system-running"])?.trim()))
        })?;
        let result = system.says(&["systemctl", "show", "-P", "ExecMainStatus", "eniup.service"])?;
        ensure!(result.trim() == "69", "exit {result}");
        let unit = system.journal("-u", "eniup.service")?;
        ensure!(unit.contains("metadata"), "{unit}");
        system.revive_metadata()?;
        system.wait(Duration::from_secs(60), "the timer's run", |system| system.answers(system::SECOND))?;
        Ok(())
    });
}

#[test]
fn an_eni_that_stays_pending_is_no_failure_and_the_timer_is_silent() {
    vpc_lab::inside(|| {
        let mut system = System::boot(Installed::Enabled)?;
        let quiet = system.journal("-u", "eniup-refresh.service")?;
        system.run(&["systemctl", "start", "eniup-refresh.service"])?;
        ensure!(system.journal("-u", "eniup-refresh.service")? == quiet, "a run without changes is in the journal");
        // Its run would wait for the ENI, and the timer's for its lock.
        system.run(&["systemctl", "stop", "eniup-hotplug.path"])?;
        system.withhold("device-number")?;
        system.attach()?;
        system.run(&["systemctl", "start", "eniup-refresh.service"])?;
        ensure!(system.says(&["systemctl", "show", "-P", "ExecMainStatus", "eniup-refresh.service"])?.trim() == "3");
        ensure!(system.says(&["systemctl", "is-failed", "eniup-refresh.service"])?.trim() != "failed");
        ensure!(system.journal("-u", "eniup-refresh.service")?.contains("is pending"));
        let next = system.says(&["systemctl", "show", "-P", "AccuracyUSec", "eniup-refresh.timer"])?;
        ensure!(next.trim() == "100ms", "{next}");
        Ok(())
    });
}

#[test]
fn nonsense_is_told_once() {
    vpc_lab::inside(|| {
        let system = System::boot(Installed::Enabled)?;
        let configured = system.network()?;
        let runs = system.runs("hotplug")?;
        system.write("/etc/eniup/config.toml", "tineout = 3\n")?;
        system.event()?;
        system.wait(SOON, "the run", |system| Ok(system.runs("hotplug")? == runs + 1 && system.is_idle("hotplug")?))?;
        let status = system.says(&["systemctl", "show", "-P", "ExecMainStatus", "eniup-hotplug.service"])?;
        ensure!(status.trim() == "78", "exit {status}");
        ensure!(system.journal("-u", "eniup-hotplug.service")?.contains("tineout"));
        // A package that is half removed: its binary is gone, its units are there.
        system.run(&["rm", "/usr/sbin/eniup"])?;
        system.event()?;
        system.wait(SOON, "the run", |system| Ok(system.runs("hotplug")? == runs + 2 && system.is_idle("hotplug")?))?;
        let status = system.says(&["systemctl", "show", "-P", "ExecMainStatus", "eniup-hotplug.service"])?;
        ensure!(status.trim() == "203", "exit {status}");
        ensure!(system.says(&["systemctl", "is-active", "eniup-hotplug.path"])?.trim() == "active");
        system.ensure_network(&configured)?;
        Ok(())
    });
}
