//! `eniup wait` in a VPC: it ends when the address or the ENI is configured and not before, says what is missing, and is told
//! by the kernel.

use std::io::{BufRead, BufReader, Read};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vpc_lab::imds::{Action, Faults, Occurrences, Rule};
use vpc_lab::lab::{Distribution, Lab};
use vpc_lab::metadata::Propagation;
use vpc_lab::probe::{Bound, Kind, Probe};
use vpc_lab::vpc::{CreateEni, EniId, SubnetId};

/// For what should happen at once, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

struct Web {
    lab: Lab,
    subnets: Vec<SubnetId>,
    primary: EniId,
    second: EniId,
}

/// An instance `web` with two ENIs in two subnets, of which nothing but the primary is configured, and a client in a third.
fn web() -> Result<Web> {
    let mut lab = Lab::new(Path::new(env!("CARGO_BIN_EXE_eniup")))?;
    let subnets = lab.fabric.world(|world| -> Result<Vec<_>> {
        let vpc = world.create_vpc(&["10.0.0.0/16".parse()?]);
        (0..3).map(|n| world.create_subnet(&vpc, Some(format!("10.0.{n}.0/24").parse()?), &[])).collect()
    })?;
    let eni = |n: usize, host: u8| CreateEni {
        subnet: subnets[n].clone(),
        ipv4s: vec![Ipv4Addr::new(10, 0, n as u8, host)],
        ..CreateEni::default()
    };
    let enis = [lab.create_network_interface(eni(0, 10))?, lab.create_network_interface(eni(1, 20))?];
    lab.run_instance("web", &enis, "m7i.large", Distribution::Primary)?;
    let client = lab.create_network_interface(eni(2, 30))?;
    lab.run_instance("client", &[client], "t3.micro", Distribution::Primary)?;
    let [primary, second] = enis;
    Ok(Web { lab, subnets, primary, second })
}

impl Web {
    fn eniup(&self, arguments: &str) -> Result<Output> {
        self.lab.eniup("web", &arguments.split(' ').collect::<Vec<_>>())
    }

    /// Runs it to its end, which has to be this one.
    fn ends(&self, arguments: &str, exit: i32) -> Result<String> {
        let output = self.eniup(arguments)?;
        let said = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat();
        ensure!(output.status.code() == Some(exit), "{arguments}: {} instead of {exit}: {said}", output.status);
        Ok(said)
    }

    fn waits(&self, arguments: &str) -> Result<Waiting> {
        let mut command = self.lab.command("web", env!("CARGO_BIN_EXE_eniup"))?;
        command.arg("wait").args(arguments.split(' ')).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(Waiting { child: command.spawn()? })
    }

    fn ip(&self, arguments: &str) -> Result<()> {
        let output = self.lab.command("web", "ip")?.args(arguments.split_whitespace()).output()?;
        ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn answers(&self, to: &str) -> Result<bool> {
        let to: IpAddr = to.parse()?;
        let probe = Probe { from: "client".into(), bound: Bound::Nothing, to, kind: Kind::Udp };
        let outcomes = self.lab.probe(&[probe], Duration::from_millis(500))?;
        Ok(outcomes.iter().all(|outcome| outcome.is_answer_of(to)))
    }
}

/// A running `eniup wait`, killed when the test is over.
struct Waiting {
    child: Child,
}

impl Waiting {
    fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    fn says_that_it_waits(&mut self) -> Result<()> {
        let mut line = String::new();
        BufReader::new(self.child.stderr.take().context("stderr")?).read_line(&mut line)?;
        ensure!(line.contains("waiting for "), "{line}");
        Ok(())
    }

    /// What it prints, once it has ended well.
    fn succeeds(mut self) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        while !self.has_ended()? {
            ensure!(Instant::now() < deadline, "it goes on waiting");
            std::thread::sleep(Duration::from_millis(2));
        }
        let (mut stdout, mut stderr) = (String::new(), String::new());
        self.child.stdout.take().map(|mut pipe| pipe.read_to_string(&mut stdout)).transpose()?;
        self.child.stderr.take().map(|mut pipe| pipe.read_to_string(&mut stderr)).transpose()?;
        ensure!(self.child.wait()?.success(), "{stdout}{stderr}");
        Ok(stdout)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_address_that_comes_ends_the_wait_when_it_answers() {
    vpc_lab::inside(|| {
        let mut web = web()?;
        let mut waiting = web.waits("--ip 10.0.1.77")?;
        web.ends("reconcile", 0)?;
        ensure!(!waiting.has_ended()?, "it did not wait for the address");
        web.lab.assign(&web.second.clone(), &["10.0.1.77/32".parse()?], false)?;
        web.ends("reconcile", 0)?;
        let said = waiting.succeeds()?;
        ensure!(said == "10.0.1.77 is configured: on ens6, by which it also sends\n", "{said}");
        ensure!(web.answers("10.0.1.77")?, "it does not answer");
        ensure!(web.ends("wait --ip 10.0.0.10 --timeout 0s", 0)?.contains("on ens5"), "the primary's address");
        Ok(())
    });
}

/// With the time for looking again without an event much longer than that, it has to be the kernel that tells.
#[test]
fn an_address_is_not_configured_before_its_answers_leave_by_its_link() {
    vpc_lab::inside(|| {
        let web = web()?;
        let said = web.ends("wait --ip 10.0.1.20 --timeout 200ms", 3)?;
        ensure!(said.contains("10.0.1.20 is not configured after 0.2 s: no link here has it"), "{said}");
        web.ip("addr add 10.0.1.20/24 dev ens6")?;
        let said = web.ends("wait --ip 10.0.1.20 --timeout 0s", 3)?;
        ensure!(said.contains("its link ens6 is down"), "{said}");
        web.ip("link set ens6 up")?;
        let said = web.ends("wait --ip 10.0.1.20 --timeout 0s", 3)?;
        ensure!(said.contains("it is on ens6, but sends by ens5"), "{said}");
        let mut waiting = web.waits("--ip 10.0.1.20")?;
        ensure!(!waiting.has_ended()?);
        web.ip("route add default via 10.0.1.1 dev ens6 table 7")?;
        web.ip("rule add from 10.0.1.20 lookup 7")?;
        waiting.succeeds()?;
        Ok(())
    });
}

/// Without events it would look again after a second.
#[test]
fn the_kernel_tells_when_an_address_comes() {
    vpc_lab::inside(|| {
        let web = web()?;
        web.ends("reconcile", 0)?;
        let mut least = PATIENCE;
        for address in ["10.0.1.101", "10.0.1.102", "10.0.1.103"] {
            let mut waiting = web.waits(&format!("--ip {address}"))?;
            waiting.says_that_it_waits()?;
            let added = Instant::now();
            web.ip(&format!("addr add {address}/32 dev ens6"))?;
            waiting.succeeds()?;
            least = least.min(added.elapsed());
        }
        ensure!(least < Duration::from_millis(500), "{least:?} at least");
        Ok(())
    });
}

#[test]
fn it_needs_no_privilege() {
    vpc_lab::inside(|| {
        let web = web()?;
        web.ends("reconcile", 0)?;
        for target in ["--ip 10.0.1.20".to_string(), format!("--eni {}", web.second)] {
            let mut command = web.lab.command("web", env!("CARGO_BIN_EXE_eniup"))?;
            command.arg("wait").args(target.split(' '));
            // SAFETY: prctl is async-signal-safe. Without the bounding set, exec leaves even root without capabilities.
            unsafe {
                command.pre_exec(|| {
                    (0..64).for_each(|capability| _ = libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0));
                    Ok(())
                })
            };
            let output = command.output()?;
            ensure!(output.status.success(), "{target}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    });
}

#[test]
fn the_kernel_is_enough_for_an_address_and_metadata_is_needed_for_an_eni() {
    vpc_lab::inside(|| {
        let web = web()?;
        web.ends("reconcile", 0)?;
        let hang = Rule::new("*", Occurrences::Always, Action::Hang);
        web.lab.service("web")?.set_faults(Faults { rules: vec![hang], ..Faults::default() });
        web.ends("wait --ip 10.0.1.20 --timeout 5s", 0)?;
        let said = web.ends("wait --ip 10.0.1.77 --timeout 300ms", 3)?;
        ensure!(said.contains("no link here has it"), "{said}");
        let said = web.ends(&format!("wait --eni {} --timeout 300ms", web.second), 69)?;
        ensure!(said.contains("no answer from instance metadata"), "{said}");
        Ok(())
    });
}

#[test]
fn an_eni_is_configured_when_all_that_belongs_to_it_is_there() {
    vpc_lab::inside(|| {
        let mut web = web()?;
        let waiting = web.waits(&format!("--eni {}", web.second))?;
        web.ends("reconcile", 0)?;
        let said = waiting.succeeds()?;
        ensure!(said == format!("{} is configured: on ens6 with 10.0.1.20\n", web.second), "{said}");
        ensure!(web.ends(&format!("wait --eni {}", web.primary), 0)?.contains("on ens5 with 10.0.0.10"));
        web.ip("rule del priority 24001")?;
        let said = web.ends(&format!("wait --eni {} --timeout 300ms", web.second), 3)?;
        ensure!(said.contains("not done yet: ip -4 rule add priority 24001 from 10.0.1.0/24"), "{said}");

        // One that metadata comes to tell of.
        web.lab.set_propagation(
            "web",
            Propagation { listing_entry: Duration::from_millis(500), ..Propagation::default() },
        )?;
        let create = CreateEni { subnet: web.subnets[2].clone(), ..CreateEni::default() };
        let third = web.lab.create_network_interface(create)?;
        let waiting = web.waits(&format!("--eni {third}"))?;
        web.lab.attach_network_interface(&third, "web", 0, 2)?;
        web.ends("reconcile --hotplug", 0)?;
        waiting.succeeds()?;
        Ok(())
    });
}

#[test]
fn what_never_comes_is_told_at_once() {
    vpc_lab::inside(|| {
        let mut web = web()?;
        for typo in
            ["--eni eni-123", "--eni i-0123456789abcdef0", "--eni eni-0123456789ABCDEF0", "--ip 10.0.1", "--ip ::1"]
        {
            web.ends(&format!("wait {typo}"), 64)?;
        }
        web.ends("wait", 64)?;
        web.ends(&format!("wait --ip 10.0.1.20 --eni {}", web.second), 64)?;
        let public = web.lab.elastic_ip(&web.second.clone(), None)?;
        let said = web.ends(&format!("wait --ip {public} --timeout 1h"), 1)?;
        ensure!(said.contains("wait for 10.0.1.20, the private one behind it"), "{said}");
        let folder = web.lab.node("web")?.run_directory().join("eniup/config.d");
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("50.toml"), format!("[[ignore]]\nid = \"{}\"\n", web.second))?;
        let said = web.ends(&format!("wait --eni {} --timeout 1h", web.second), 1)?;
        ensure!(said.contains("eniup leaves it alone: [[ignore]] at"), "{said}");
        // What may come is not refused, but said.
        let said = web.ends("wait --eni eni-0123456789abcdef0 --timeout 500ms", 3)?;
        ensure!(said.contains("waiting for eni-0123456789abcdef0: metadata has no such ENI; it has"), "{said}");
        let said = web.ends("wait --ip 10.0.1.77 --timeout 500ms", 3)?;
        ensure!(said.contains("waiting for 10.0.1.77: no link here has it; metadata gives it to no ENI"), "{said}");
        Ok(())
    });
}
