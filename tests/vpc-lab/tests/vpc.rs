//! The judge judged: the VPC carries what EC2 carries, drops what EC2 drops and says why, and leaves nothing behind.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vpc_lab::forward::Reason;
use vpc_lab::kernel::{self, Route};
use vpc_lab::lab::{Distribution, Lab, everything};
use vpc_lab::probe::{Bound, Kind, Outcome, Probe};
use vpc_lab::vpc::{CreateEni, EniId, Port};

const PATIENCE: Duration = Duration::from_millis(700);

/// Two instances, `one` and `two`, each with a dual-stack ENI in a subnet of its own, and an internet.
struct Pair {
    lab: Lab,
    subnets: Vec<String>,
    enis: Vec<EniId>,
}

fn pair() -> Result<Pair> {
    // No binary is judged here.
    let mut lab = Lab::new("/proc/self/exe")?;
    let subnets = lab.fabric.world(|world| -> Result<Vec<String>> {
        let vpc = world.create_vpc(&["10.0.0.0/16".parse()?, "2600:1f16:67f:f200::/56".parse()?]);
        let a = world.create_subnet(&vpc, Some("10.0.0.0/24".parse()?), &["2600:1f16:67f:f200::/64".parse()?])?;
        let b = world.create_subnet(&vpc, Some("10.0.1.0/24".parse()?), &["2600:1f16:67f:f201::/64".parse()?])?;
        Ok(vec![a, b])
    })?;
    let mut enis = Vec::new();
    for (n, name) in ["one", "two"].into_iter().enumerate() {
        let create = CreateEni {
            subnet: subnets[n].clone(),
            ipv4s: vec![Ipv4Addr::new(10, 0, n as u8, 10)],
            ipv6s: vec![format!("2600:1f16:67f:f20{n}::10").parse()?],
            ..CreateEni::default()
        };
        let eni = lab.create_network_interface(create)?;
        lab.run_instance(name, std::slice::from_ref(&eni), "t3.micro", Distribution::Primary)?;
        enis.push(eni);
    }
    lab.add_internet_host("internet", Some([198, 51, 100, 7].into()), Some("2001:db8::7".parse()?))?;
    Ok(Pair { lab, subnets, enis })
}

impl Pair {
    fn ask(&self, from: &str, bound: Bound, to: &str, kind: Kind) -> Result<Outcome> {
        let probe = Probe { from: from.into(), bound, to: to.parse()?, kind };
        Ok(self.lab.probe(&[probe], PATIENCE)?.remove(0))
    }

    /// Every kind of exchange is answered, and the other side sees this address.
    fn assert_answers(&self, from: &str, to: &str, seen: &str) -> Result<()> {
        for kind in Kind::ALL {
            let outcome = self.ask(from, Bound::Nothing, to, kind)?;
            let is_right = outcome.is_answer_of(to.parse()?) && outcome.seen() == Some(seen.parse()?);
            ensure!(is_right, "{kind} {from} → {to}: {outcome}; {:#?}", self.lab.fabric.last_drops());
        }
        Ok(())
    }

    /// Nothing answers, and the VPC counts the packets under this reason at this port.
    fn assert_drops(&self, from: &str, bound: Bound, to: &str, port: Port, reason: Reason) -> Result<()> {
        self.lab.fabric.forget_drops();
        let outcome = self.ask(from, bound, to, Kind::Udp)?;
        ensure!(outcome == Outcome::Silence, "{from} → {to}: {outcome}");
        let drops = self.lab.fabric.drops();
        ensure!(drops.contains_key(&(port.clone(), reason)), "{from} → {to}: {reason} at {port:?} is not in {drops:?}");
        Ok(())
    }

    fn on<T: Send>(&self, name: &str, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.lab.node(name)?.enter(act)
    }
}

#[test]
fn instances_reach_each_other_and_are_seen_as_themselves() {
    vpc_lab::inside(|| {
        let pair = pair()?;
        pair.assert_answers("one", "10.0.1.10", "10.0.0.10")?;
        pair.assert_answers("one", "2600:1f16:67f:f201::10", "2600:1f16:67f:f200::10")?;
        pair.assert_answers("one", "2001:db8::7", "2600:1f16:67f:f200::10")?;
        // Kernels talk to multicast groups by themselves.
        let dropped = pair.lab.fabric.drops().into_keys().filter(|(_, reason)| *reason != Reason::LocalOnly).count();
        ensure!(dropped == 0, "{:?}", pair.lab.fabric.last_drops());
        Ok(())
    });
}

#[test]
fn a_source_that_is_not_the_enis_is_dropped_and_counted_unless_the_check_is_off() {
    vpc_lab::inside(|| {
        let pair = pair()?;
        pair.on("one", || kernel::add_address("lo", "10.0.0.99/32".parse()?, None))?;
        let (port, bound) = (Port::Eni(pair.enis[0].clone()), Bound::Address(IpAddr::from([10, 0, 0, 99])));
        pair.assert_drops("one", bound.clone(), "10.0.1.10", port, Reason::SourceAddress)?;
        ensure!(pair.lab.fabric.source_drops() == 1);
        pair.lab.fabric.world(|world| world.modify_source_dest_check(&pair.enis[0], false))?;
        pair.lab.fabric.forget_drops();
        // The answer finds no owner of 10.0.0.99, but the question was carried.
        pair.ask("one", bound, "10.0.1.10", Kind::Udp)?;
        ensure!(pair.lab.fabric.source_drops() == 0);
        let drops = pair.lab.fabric.drops();
        ensure!(drops.contains_key(&(Port::Eni(pair.enis[1].clone()), Reason::NoRoute)), "{drops:?}");
        Ok(())
    });
}

#[test]
fn another_station_address_is_dropped() {
    vpc_lab::inside(|| {
        let pair = pair()?;
        pair.on("one", || {
            kernel::set_down("ens5")?;
            kernel::set_mac("ens5", vpc_lab::vpc::Mac([2, 9, 9, 9, 9, 9]))?;
            kernel::set_up("ens5")?;
            let router = Some(IpAddr::from([10, 0, 0, 1]));
            kernel::add_route(&Route::new(everything(IpAddr::from([10, 0, 0, 10])), router, "ens5"))
        })?;
        pair.assert_drops("one", Bound::Nothing, "10.0.1.10", Port::Eni(pair.enis[0].clone()), Reason::SourceMac)
    });
}

#[test]
fn the_internet_is_reached_by_an_elastic_ip_only_and_reaches_nothing_else() {
    vpc_lab::inside(|| {
        let mut pair = pair()?;
        let eni = Port::Eni(pair.enis[0].clone());
        pair.assert_drops("one", Bound::Nothing, "198.51.100.7", eni, Reason::NoPublicAddress)?;
        let public = pair.lab.elastic_ip(&pair.enis[0].clone(), None)?.to_string();
        pair.assert_answers("one", "198.51.100.7", &public)?;
        pair.assert_answers("internet", &public, "198.51.100.7")?;
        // Hosts of the VPC reach it by the elastic IP too, seen by their own.
        let own = pair.lab.elastic_ip(&pair.enis[1].clone(), None)?.to_string();
        pair.assert_answers("two", &public, &own)?;
        pair.lab.disassociate_address(public.parse()?)?;
        pair.assert_drops("internet", Bound::Nothing, &public, Port::Internet("internet".into()), Reason::NoRoute)
    });
}

#[test]
fn an_address_belongs_to_the_eni_that_has_it_at_this_moment() {
    vpc_lab::inside(|| {
        let mut pair = pair()?;
        let create =
            CreateEni { subnet: pair.subnets[0].clone(), ipv4s: vec![[10, 0, 0, 20].into()], ..CreateEni::default() };
        let third = pair.lab.create_network_interface(create)?;
        pair.lab.run_instance("three", std::slice::from_ref(&third), "t3.micro", Distribution::Primary)?;
        for name in ["one", "three"] {
            pair.on(name, || kernel::add_address("ens5", "10.0.0.77/32".parse()?, None))?;
        }
        let moving = IpAddr::from([10, 0, 0, 77]).into();
        pair.lab.assign(&pair.enis[0].clone(), &[moving], false)?;
        pair.assert_answers("two", "10.0.0.77", "10.0.1.10")?;
        let refused = pair.lab.assign(&third, &[moving], false);
        ensure!(refused.is_err_and(|error| error.to_string().contains("in use")), "it may not be taken unasked");
        pair.lab.assign(&third, &[moving], true)?;
        pair.lab.fabric.forget_drops();
        pair.assert_answers("two", "10.0.0.77", "10.0.1.10")?;
        // A neighbour that remembers the old station address reaches the new owner all the same.
        pair.assert_answers("three", "10.0.0.10", "10.0.0.20")?;
        let eni = Port::Eni(pair.enis[0].clone());
        pair.assert_drops("one", Bound::Address(moving.addr()), "10.0.1.10", eni, Reason::OthersAddress)
    });
}

#[test]
fn a_stopped_instance_is_silent_and_starts_again_with_an_empty_kernel() {
    vpc_lab::inside(|| {
        let mut pair = pair()?;
        pair.on("one", || kernel::add_address("ens5", "10.0.0.77/32".parse()?, None))?;
        std::fs::write(pair.lab.node("one")?.run_directory().join("kept"), "")?;
        pair.lab.stop_instance("one")?;
        let two = Port::Eni(pair.enis[1].clone());
        pair.assert_drops("two", Bound::Nothing, "10.0.0.10", two, Reason::NotAttached)?;
        pair.lab.start_instance("one")?;
        pair.assert_answers("two", "10.0.0.10", "10.0.1.10")?;
        ensure!(!pair.lab.node("one")?.run_directory().join("kept").exists(), "/run outlived the machine");
        pair.lab.assign(&pair.enis[0].clone(), &[IpAddr::from([10, 0, 0, 77]).into()], false)?;
        let outcome = pair.ask("two", Bound::Nothing, "10.0.0.77", Kind::Udp)?;
        ensure!(outcome == Outcome::Silence, "an address outlived the machine: {outcome}");
        Ok(())
    });
}

/// A DHCP message of this type from a client that has no address.
fn dhcp_message(mac: [u8; 6], kind: u8) -> Vec<u8> {
    let mut message = vec![0; 236];
    message[..4].copy_from_slice(&[1, 1, 6, 0]);
    message[4..8].copy_from_slice(&[7, 7, 7, 7]);
    message[10] = 0x80;
    message[28..34].copy_from_slice(&mac);
    message.extend([99, 130, 83, 99, 53, 1, kind, 255]);
    message
}

fn option(message: &[u8], code: u8) -> Option<Vec<u8>> {
    let mut options = message.get(240..)?;
    while let [found, length, rest @ ..] = options {
        let value = rest.get(..usize::from(*length))?;
        if *found == code {
            return Some(value.to_vec());
        }
        options = &rest[value.len()..];
    }
    None
}

#[test]
fn dhcp_leases_the_primary_address_with_router_and_mtu() {
    vpc_lab::inside(|| {
        let mut pair = pair()?;
        let create = CreateEni {
            subnet: pair.subnets[0].clone(),
            ipv4s: vec![[10, 0, 0, 30].into(), [10, 0, 0, 31].into()],
            ..CreateEni::default()
        };
        let eni = pair.lab.create_network_interface(create)?;
        pair.lab.run_instance("bare", std::slice::from_ref(&eni), "t3.micro", Distribution::Nothing)?;
        let mac = pair.lab.world().eni(&eni)?.mac.0;
        pair.on("bare", || {
            kernel::set_up("ens5")?;
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 68))?;
            socket.set_broadcast(true)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket2::SockRef::from(&socket).bind_device(Some(b"ens5"))?;
            for (kind, answer) in [(1, 2), (3, 5)] {
                socket.send_to(&dhcp_message(mac, kind), SocketAddrV4::new(Ipv4Addr::BROADCAST, 67))?;
                let mut buffer = [0; 1500];
                let (length, _) = socket.recv_from(&mut buffer).context("waiting for the DHCP server")?;
                let message = &buffer[..length];
                ensure!(message[16..20] == [10, 0, 0, 30], "leased {:?}", &message[16..20]);
                for (code, expected) in [
                    (53, vec![answer]),
                    (1, vec![255, 255, 255, 0]),
                    (3, vec![10, 0, 0, 1]),
                    (26, 9001u16.to_be_bytes().to_vec()),
                    (51, 3600u32.to_be_bytes().to_vec()),
                ] {
                    ensure!(option(message, code) == Some(expected), "option {code}: {:?}", option(message, code));
                }
            }
            Ok(())
        })
    });
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so()? {
        ensure!(Instant::now() < deadline, "{what} did not come about");
        std::thread::yield_now();
    }
    Ok(())
}

#[test]
fn router_advertisements_give_a_default_route_to_a_link_that_listens() {
    vpc_lab::inside(|| {
        let mut pair = pair()?;
        let create = CreateEni { subnet: pair.subnets[0].clone(), ..CreateEni::default() };
        let eni = pair.lab.create_network_interface(create)?;
        pair.lab.run_instance("bare", &[eni], "t3.micro", Distribution::Nothing)?;
        pair.on("bare", || {
            kernel::set_up("ens5")?;
            wait_for("a default route by router advertisement", || {
                let routes = std::fs::read_to_string("/proc/thread-self/net/ipv6_route")?;
                let (default, router) = ("00000000000000000000000000000000 00 ", "fe800ec2000000000000000000000001");
                Ok(routes.lines().any(|line| line.starts_with(default) && line.contains(router)))
            })
        })
    });
}

/// The lab's command with a line of input, held open, until it has printed a line that holds `until`.
fn started(lines: &str, until: &str) -> Result<Child> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vpc-lab"));
    command.args(["shell", "--eniup", "/bin/true"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn()?;
    child.stdin.as_mut().context("its input")?.write_all(lines.as_bytes())?;
    let mut output = BufReader::new(child.stdout.take().context("its output")?);
    let mut line = String::new();
    while !line.contains(until) {
        line.clear();
        ensure!(output.read_line(&mut line)? > 0, "the lab ended early");
    }
    Ok(child)
}

/// Processes whose environment holds this mark, and which still run.
fn processes_with(mark: &str) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let of_number = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let has_mark = |process: &u32| {
        let environment = std::fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    };
    of_number.filter(has_mark).collect()
}

/// Waits until a process with this mark is seen: while it executes another program, the kernel shows no environment.
fn wait_for_a_process_with(mark: &str) {
    wait_for("a process with the mark", || Ok(!processes_with(mark).is_empty())).unwrap();
}

#[test]
fn nothing_is_left_when_a_lab_is_killed_in_the_middle() {
    let mark = format!("LAB_TEST_MARK={}-{:?}", std::process::id(), std::thread::current().id());
    let lines = format!("run web env {mark} sh -c 'echo started; exec sleep 600'\n");
    let mut child = started(&lines, "started").unwrap();
    wait_for_a_process_with(&mark);
    let inside = children_of(child.id());
    assert_eq!(inside.len(), 1);
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for("the end of all its processes", || {
        let is_gone = |process: &u32| !std::path::Path::new(&format!("/proc/{process}/ns")).join("net").exists();
        Ok(processes_with(&mark).is_empty() && inside.iter().all(is_gone))
    })
    .unwrap();
}

#[test]
fn what_a_program_leaves_behind_ends_with_the_lab() {
    let mark = format!("LAB_TEST_MARK={}-{:?}", std::process::id(), std::thread::current().id());
    let lines = format!("run web env {mark} sh -c 'sleep 600 >/dev/null 2>&1 </dev/null &'\nrun web echo started\n");
    let mut child = started(&lines, "started").unwrap();
    wait_for_a_process_with(&mark);
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    wait_for("the end of all its processes", || Ok(processes_with(&mark).is_empty())).unwrap();
}

#[test]
fn an_interrupt_ends_the_demonstration() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vpc-lab"));
    command.args(["demo", "--eniup", "/bin/true"]).stdout(Stdio::piped());
    // A group of its own, as a terminal's foreground job is.
    let mut child = std::os::unix::process::CommandExt::process_group(&mut command, 0).spawn().unwrap();
    let mut line = String::new();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    output.read_line(&mut line).unwrap();
    // SAFETY: a signal to the group that was made for this child.
    assert_eq!(unsafe { libc::kill(-(child.id() as i32), libc::SIGINT) }, 0);
    let started = Instant::now();
    assert_eq!(child.wait().unwrap().code(), None, "it was not ended by the signal");
    // All its processes are gone when nobody holds the other end any more.
    while output.read_line(&mut line).unwrap() > 0 {}
    assert!(started.elapsed() < Duration::from_secs(2), "it went on for {:?}", started.elapsed());
}

fn children_of(process: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|child| child.parse().ok()).collect()
}

#[test]
fn many_labs_run_side_by_side() {
    let labs: Vec<Child> =
        (0..4).map(|_| started("probe subnet-a 10.0.3.100\nrun web echo done\n", "done").unwrap()).collect();
    for mut lab in labs {
        drop(lab.stdin.take());
        assert!(lab.wait().unwrap().success());
    }
}

#[test]
fn lines_that_fail_end_a_script_with_an_error() {
    for (line, exit, words) in [
        ("probe subnet-a 10.0.3.100", 0, ""),
        ("probe subnet-a 10.0.3.99", 1, "did not answer"),
        ("attach-network-interface eni-1 web 5", 1, "InvalidNetworkInterfaceID.NotFound"),
        ("detach-network-interface web/ens5", 1, "primary network interface cannot be detached"),
        ("assign-private-ip-addresses web/ens6 10.0.9.9", 1, "does not fall within"),
        ("no-such-verb", 1, "unrecognized subcommand"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vpc-lab"));
        command.args(["shell", "--eniup", "/bin/true"]).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        writeln!(child.stdin.take().unwrap(), "{line}").unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{line}: {stderr}");
        assert!(stderr.contains(words), "{line}: {stderr}");
    }
}
