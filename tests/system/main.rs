//! The package on a real Debian with its own systemd and udev, in an instance of the VPC in a box. `tests/system/run` prepares
//! what is needed and calls this.

mod migration;
mod system;

use std::time::Duration;

use anyhow::ensure;
use system::{Installed, SECOND, System};

/// For what should be done at once, on a busy machine.
const SOON: Duration = Duration::from_secs(15);

#[test]
fn installing_changes_nothing_until_it_is_enabled_and_removing_changes_nothing_either() {
    vpc_lab::inside(|| {
        let mut system = System::boot(Installed::No)?;
        let before = system.network()?;
        system.install()?;
        system.ensure_network(&before)?;
        for unit in ["eniup.service", "eniup-refresh.service", "eniup-watch.service"] {
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
        for unit in ["eniup.service", "eniup-hotplug.path", "eniup-refresh.path", "eniup-refresh.timer"] {
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
/// then the one behind what networkd writes down heals.
#[test]
fn a_restart_of_networkd_is_followed_by_a_run() {
    vpc_lab::inside(|| {
        let system = System::boot(Installed::Enabled)?;
        // So it is none of the timer's runs.
        system.run(&["systemctl", "stop", "eniup-refresh.timer"])?;
        system.write("/etc/systemd/network/10-primary.network", "[Match]\nName=ens5\n[Network]\nDHCP=ipv4\n")?;
        let configured = system.network_of_ours()?;
        for verb in ["start", "restart"] {
            let runs = system.runs("refresh")?;
            system.run(&["systemctl", verb, "systemd-networkd"])?;
            system.wait(SOON, "a run behind it", |system| Ok(system.runs("refresh")? > runs))?;
            system.wait(SOON, "networkd", |system| system.is_configured("ens5"))?;
            system.wait(SOON, "all of eniup's", |system| {
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

/// No unit starts that could be followed.
#[test]
fn what_networkd_takes_away_when_it_configures_a_link_anew_is_back_before_the_timer_comes() {
    vpc_lab::inside(|| {
        let system = System::boot(Installed::Enabled)?;
        system.run(&["systemctl", "stop", "eniup-refresh.timer"])?;
        system.write("/etc/systemd/network/10-primary.network", "[Match]\nName=ens5\n[Network]\nDHCP=ipv4\n")?;
        system.write("/etc/systemd/networkd.conf.d/50-eniup.conf", "")?;
        let configured = system.network_of_ours()?;
        let is_whole = |system: &System| Ok(system.is_idle("refresh")? && system.ensure_ours(&configured).is_ok());
        system.run(&["systemctl", "start", "systemd-networkd"])?;
        system.wait(SOON, "networkd", |system| system.is_configured("ens5"))?;
        system.wait(SOON, "all of eniup's", is_whole)?;
        for _ in 0..3 {
            let runs = system.runs("refresh")?;
            system.run(&["networkctl", "reconfigure", "ens5"])?;
            system.wait(SOON, "a run behind it", |system| Ok(system.runs("refresh")? > runs))?;
            system.wait(SOON, "networkd", |system| system.is_configured("ens5"))?;
            system.wait(SOON, "all of eniup's", is_whole)?;
        }
        Ok(())
    });
}

#[test]
fn watch_and_the_runs_replace_each_other() {
    const RUNS: [&str; 4] = ["eniup.service", "eniup-hotplug.path", "eniup-refresh.path", "eniup-refresh.timer"];
    let active = |system: &System| -> anyhow::Result<Vec<&str>> {
        let all = RUNS.into_iter().chain(["eniup-watch.service"]).map(|unit| Ok((unit, system.is_active(unit)?)));
        let all: Vec<(&str, bool)> = all.collect::<anyhow::Result<_>>()?;
        Ok(all.into_iter().filter(|(_, is_active)| *is_active).map(|(unit, _)| unit).collect())
    };
    vpc_lab::inside(|| {
        let system = System::boot(Installed::Enabled)?;
        ensure!(active(&system)? == RUNS, "{:?}", active(&system)?);
        let configured = system.network()?;
        system.run(&["systemctl", "start", "eniup-watch"])?;
        ensure!(active(&system)? == ["eniup-watch.service"], "{:?}", active(&system)?);
        system.ensure_network(&configured)?;
        system.run(&["systemctl", "start", "eniup"])?;
        ensure!(active(&system)? == RUNS, "{:?}", active(&system)?);
        system.ensure_network(&configured)?;
        drop(system);

        let both = System::boot(Installed::WatchedAndEnabled)?;
        let active = active(&both)?;
        ensure!(active == RUNS || active == ["eniup-watch.service"], "{active:?}");
        Ok(())
    });
}

#[test]
fn watch_is_ready_reloads_and_is_stopped() {
    vpc_lab::inside(|| {
        let mut system = System::boot(Installed::Watched)?;
        ensure!(system.of_watch("SubState")? == "running");
        ensure!(
            system.of_watch("StatusText")? == "the kernel agrees with metadata",
            "{}",
            system.of_watch("StatusText")?
        );
        let eni = system.attach()?;
        system.wait(SOON, "an attached ENI", |system| system.answers(&eni.address))?;

        let process = system.of_watch("MainPID")?;
        system.write("/etc/eniup/config.d/50.toml", "rules = \"per-\"\n")?;
        system.run(&["systemctl", "reload", "eniup-watch"])?;
        system.wait(SOON, "a word on a bad configuration", |system| {
            Ok(system.journal("-u", "eniup-watch.service")?.contains("going on with the configuration from before"))
        })?;
        system.write("/etc/eniup/config.d/50.toml", "rules = \"per-address\"\n")?;
        system.run(&["systemctl", "reload", "eniup-watch"])?;
        system.wait(SOON, "a rule for the address", |system| {
            Ok(system.says(&["ip", "rule"])?.contains(&format!("from {SECOND} iif lo")))
        })?;
        system.wait(SOON, "the end of the reload", |system| Ok(system.of_watch("ActiveState")? == "active"))?;
        ensure!(system.of_watch("MainPID")? == process, "it was started anew");

        let configured = system.network()?;
        system.run(&["systemctl", "stop", "eniup-watch"])?;
        ensure!(system.of_watch("Result")? == "success" && system.of_watch("ActiveState")? == "inactive");
        system.ensure_network(&configured)?;
        ensure!(system.says(&["systemctl", "is-system-running"])?.trim() == "running");
        Ok(())
    });
}

#[test]
fn a_watch_that_hangs_or_is_killed_is_started_anew() {
    vpc_lab::inside(|| {
        let system = System::boot(Installed::Watched)?;
        system.write("/etc/systemd/system/eniup-watch.service.d/watchdog.conf", "[Service]\nWatchdogSec=2\n")?;
        system.run(&["systemctl", "daemon-reload"])?;
        system.run(&["systemctl", "restart", "eniup-watch"])?;
        let configured = system.network()?;
        for signal in ["STOP", "KILL"] {
            let before = system.of_watch("MainPID")?;
            system.run(&["systemctl", "kill", &format!("--signal=SIG{signal}"), "eniup-watch"])?;
            system.wait(Duration::from_secs(30), "another one", |system| {
                let process = system.of_watch("MainPID")?;
                Ok(process != before && process != "0" && system.of_watch("ActiveState")? == "active")
            })?;
        }
        ensure!(system.of_watch("NRestarts")? == "2", "{}", system.of_watch("NRestarts")?);
        ensure!(system.journal("-u", "eniup-watch.service")?.contains("Watchdog timeout"));
        system.ensure_network(&configured)?;
        Ok(())
    });
}

/// networkd takes away all rules that it did not write, as it does without the drop-in.
#[test]
fn watch_puts_back_what_networkd_takes_away() {
    vpc_lab::inside(|| {
        let system = System::boot(Installed::Watched)?;
        system.write("/etc/systemd/network/10-primary.network", "[Match]\nName=ens5\n[Network]\nDHCP=ipv4\n")?;
        system.write("/etc/systemd/networkd.conf.d/50-eniup.conf", "")?;
        let configured = system.network_of_ours()?;
        for words in [
            ["systemctl", "start", "systemd-networkd"],
            ["systemctl", "restart", "systemd-networkd"],
            ["networkctl", "reconfigure", "ens5"],
        ] {
            system.run(&words)?;
            system.wait(SOON, "networkd", |system| system.is_configured("ens5"))?;
            system.wait(SOON, "all of eniup's", |system| Ok(system.ensure_ours(&configured).is_ok()))?;
        }
        Ok(())
    });
}

#[test]
fn a_watch_that_cannot_work_fails_once() {
    vpc_lab::inside(|| {
        let system = System::boot(Installed::Watched)?;
        let configured = system.network()?;
        for (what, status) in [("a bad configuration", "78"), ("a package that is half removed", "203")] {
            match status {
                "78" => system.write("/etc/eniup/config.toml", "tineout = 3\n")?,
                _ => system.run(&["rm", "/usr/sbin/eniup"])?,
            }
            ensure!(system.run(&["systemctl", "restart", "eniup-watch"]).is_err(), "it starts with {what}");
            ensure!(system.of_watch("ExecMainStatus")? == status, "{what}: {}", system.of_watch("ExecMainStatus")?);
            ensure!(system.of_watch("ActiveState")? == "failed" && system.of_watch("NRestarts")? == "0", "{what}");
        }
        ensure!(system.journal("-u", "eniup-watch.service")?.contains("tineout"));
        system.ensure_network(&configured)?;
        Ok(())
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
        // journald writes down a little later what it was told.
        system.wait(SOON, "what it said", |system| {
            Ok(system.journal("-u", "eniup-hotplug.service")?.contains("tineout"))
        })?;
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
