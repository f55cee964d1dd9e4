//! The built binary in the VPC in a box: the main job, as its users meet it.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vpc_lab::demo;
use vpc_lab::kernel;
use vpc_lab::lab::{Distribution, Lab};
use vpc_lab::metadata::Propagation;
use vpc_lab::probe::{Bound, Kind, Probe};
use vpc_lab::vpc::{CreateEni, EniId};

const ENIUP: &str = env!("CARGO_BIN_EXE_eniup");
const PATIENCE: Duration = Duration::from_millis(700);

#[test]
fn the_demonstration_is_right_from_end_to_end() {
    vpc_lab::inside(|| {
        ensure!(demo::play(ENIUP)?, "a cell of the demonstration is wrong");
        Ok(())
    });
}

/// The judge would notice: without eniup most of the same exchanges fail, and the VPC drops replies.
#[test]
fn without_reconcile_the_demonstration_is_wrong() {
    vpc_lab::inside(|| {
        let demo = demo::build(ENIUP)?;
        ensure!(!demo.look("unconfigured", false)?, "an unconfigured machine passes");
        ensure!(
            demo.scene.lab.fabric.source_drops() > 50,
            "only {} packets dropped",
            demo.scene.lab.fabric.source_drops()
        );
        Ok(())
    });
}

/// An instance whose distribution configures the primary ENI alone, with a second ENI in another subnet; and a client.
struct Small {
    lab: Lab,
    subnets: Vec<String>,
    second: EniId,
}

fn small() -> Result<Small> {
    let mut lab = Lab::new(ENIUP)?;
    let subnets = lab.fabric.world(|world| -> Result<Vec<String>> {
        let vpc = world.create_vpc(&["10.0.0.0/16".parse()?, "2600:1f16:67f:f200::/56".parse()?]);
        (0..3u8)
            .map(|n| {
                let ipv6 = format!("2600:1f16:67f:f20{n}::/64").parse()?;
                world.create_subnet(&vpc, Some(format!("10.0.{n}.0/24").parse()?), &[ipv6])
            })
            .collect()
    })?;
    let eni = |n: usize, host: u8| -> Result<CreateEni> {
        Ok(CreateEni {
            subnet: subnets[n].clone(),
            ipv4s: vec![Ipv4Addr::new(10, 0, n as u8, host)],
            ipv6s: vec![format!("2600:1f16:67f:f20{n}::{host}").parse()?],
            ..CreateEni::default()
        })
    };
    let enis = [lab.create_network_interface(eni(0, 10)?)?, lab.create_network_interface(eni(1, 20)?)?];
    lab.run_instance("web", &enis, "m7i.large", Distribution::Primary)?;
    let client = lab.create_network_interface(eni(2, 30)?)?;
    lab.run_instance("client", &[client], "t3.micro", Distribution::Primary)?;
    let [_, second] = enis;
    Ok(Small { lab, subnets, second })
}

impl Small {
    fn eniup(&self, arguments: &[&str], exit: i32) -> Result<String> {
        let output = self.lab.eniup("web", arguments)?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(exit), "eniup {arguments:?} ({}): {stderr}", output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned() + &stderr)
    }

    fn answers(&self, to: &str) -> Result<bool> {
        let to: IpAddr = to.parse()?;
        let probe = |kind| Probe { from: "client".into(), bound: Bound::Nothing, to, kind };
        let outcomes = self.lab.probe(&Kind::ALL.map(probe), PATIENCE)?;
        Ok(outcomes.iter().all(|outcome| outcome.is_answer_of(to)))
    }

    /// Whether the kernel made a default route of a router advertisement on this link.
    fn took_an_advertisement(&self, link: &str) -> Result<bool> {
        /// `RTF_ADDRCONF`: the kernel's own, from router discovery.
        const ADDRCONF: u32 = 0x0004_0000;
        self.lab.node("web")?.enter(|| {
            let routes = std::fs::read_to_string("/proc/thread-self/net/ipv6_route")?;
            let defaults = routes.lines().filter(|line| line.starts_with("00000000000000000000000000000000 00 "));
            Ok(defaults.map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|fields| {
                let flags = fields.get(8).and_then(|flags| u32::from_str_radix(flags, 16).ok());
                fields.last() == Some(&link) && flags.is_some_and(|flags| flags & ADDRCONF != 0)
            }))
        })
    }
}

#[test]
fn a_second_run_is_silent_and_status_and_release_tell_the_truth() {
    vpc_lab::inside(|| {
        let small = small()?;
        ensure!(!small.answers("10.0.1.20")?, "the second ENI answers before anything was done");
        let first = small.eniup(&["reconcile"], 0)?;
        ensure!(first.contains("ip addr add 10.0.1.20/24 dev ens6"), "{first}");
        ensure!(small.answers("10.0.1.20")? && small.answers("2600:1f16:67f:f201::20")?, "it does not answer");
        let second = small.eniup(&["reconcile"], 0)?;
        ensure!(second.is_empty(), "a second run says: {second}");
        ensure!(small.eniup(&["status"], 0)?.contains("The kernel agrees with metadata."));
        small.eniup(&["release"], 0)?;
        ensure!(!small.answers("10.0.1.20")?, "it answers after release");
        ensure!(small.answers("10.0.0.10")?, "the primary does not answer after release");
        ensure!(small.lab.fabric.source_drops() == 0, "{:?}", small.lab.fabric.last_drops());
        Ok(())
    });
}

#[test]
fn an_eni_whose_keys_come_one_by_one_is_waited_for() {
    vpc_lab::inside(|| {
        let mut small = small()?;
        small.eniup(&["reconcile"], 0)?;
        let create = CreateEni { subnet: small.subnets[2].clone(), ..CreateEni::default() };
        let eni = small.lab.create_network_interface(create)?;
        let address = small.lab.world().eni(&eni)?.ipv4s[0].to_string();
        let delay = Duration::from_millis(600);
        let overrides = ["interface-id", "subnet-ipv4-cidr-block", "device-number"]
            .into_iter()
            .zip(1..)
            .map(|(key, n)| (key.to_string(), Duration::from_millis(150 * n)))
            .collect();
        small.lab.set_propagation("web", Propagation { delay, overrides, ..Propagation::default() })?;
        small.lab.attach_network_interface(&eni, "web", 0, 2)?;
        let impatient = small.eniup(&["reconcile", "--timeout", "100ms"], 3)?;
        ensure!(impatient.contains("pending"), "{impatient}");
        small.eniup(&["reconcile"], 0)?;
        ensure!(small.answers(&address)?, "{address} does not answer");
        Ok(())
    });
}

#[test]
fn a_link_that_metadata_lists_only_later_is_waited_for_after_a_hotplug() {
    vpc_lab::inside(|| {
        let mut small = small()?;
        small.eniup(&["reconcile"], 0)?;
        let create = CreateEni { subnet: small.subnets[2].clone(), ..CreateEni::default() };
        let eni = small.lab.create_network_interface(create)?;
        let address = small.lab.world().eni(&eni)?.ipv4s[0].to_string();
        let propagation =
            |seconds| Propagation { listing_entry: Duration::from_secs(seconds), ..Propagation::default() };
        small.lab.set_propagation("web", propagation(3))?;
        small.lab.attach_network_interface(&eni, "web", 0, 2)?;
        // Judge first: the link is here and metadata does not list it.
        ensure!(small.eniup(&["reconcile"], 0)?.is_empty(), "metadata lists the ENI already");
        let impatient = small.eniup(&["reconcile", "--automatic", "--hotplug", "--timeout", "100ms"], 3)?;
        ensure!(impatient.contains("link ens7 is pending: metadata does not list its MAC"), "{impatient}");
        small.eniup(&["reconcile", "--automatic", "--hotplug"], 0)?;
        ensure!(small.answers(&address)?, "{address} does not answer");

        let unlisted = |eni: &str| format!("link {eni} is pending: metadata does not list its MAC");
        let never = small
            .lab
            .create_network_interface(CreateEni { subnet: small.subnets[2].clone(), ..CreateEni::default() })?;
        small.lab.set_propagation("web", propagation(3600))?;
        small.lab.attach_network_interface(&never, "web", 0, 3)?;
        let hotplug = ["reconcile", "--hotplug", "--timeout", "100ms"];
        ensure!(small.eniup(&hotplug, 3)?.contains(&unlisted("ens8")), "an ENI that is never listed is not told of");
        // A container's, which somebody uses, and one that the configuration leaves alone are not waited for.
        let ip = |words: &str| -> Result<bool> {
            Ok(small.lab.command("web", "ip")?.args(words.split(' ')).status()?.success())
        };
        ensure!(ip("link set ens8 up")?);
        small.eniup(&hotplug, 0)?;
        ensure!(ip("link set ens8 down")?);
        let config = tempfile::NamedTempFile::new()?;
        std::fs::write(config.path(), "[[ignore]]\nlink = \"ens8\"\n")?;
        let path = config.path().to_str().context("its path")?;
        small.eniup(&[&hotplug[..], &["--config", path]].concat(), 0)?;
        Ok(())
    });
}

#[test]
fn router_advertisements_on_a_secondary_link_do_not_reach_main() {
    vpc_lab::inside(|| {
        // The judge first: a link that only goes up takes the router's advertisement.
        let bare = small()?;
        bare.lab.node("web")?.enter(|| kernel::set_up("ens6"))?;
        bare.lab.advertise_router(&bare.second)?;
        ensure!(bare.took_an_advertisement("ens6")?, "no advertisement was taken");
        let small = small()?;
        small.eniup(&["reconcile"], 0)?;
        small.lab.advertise_router(&small.second)?;
        ensure!(small.answers("10.0.1.20")?, "a frame behind the advertisement was answered before it");
        ensure!(!small.took_an_advertisement("ens6")?, "an advertisement came through");
        Ok(())
    });
}

#[test]
fn after_a_restart_of_the_instance_one_run_is_enough_and_nothing_stale_is_left() {
    vpc_lab::inside(|| {
        let mut small = small()?;
        small.eniup(&["reconcile"], 0)?;
        small.lab.stop_instance("web")?;
        small.lab.detach_network_interface(&small.second)?;
        small.lab.start_instance("web")?;
        ensure!(small.eniup(&["plan", "--detailed-exitcode"], 0)?.is_empty(), "something is planned for one ENI");
        small.lab.attach_network_interface(&small.second, "web", 0, 3)?;
        small.eniup(&["reconcile"], 0)?;
        ensure!(small.answers("10.0.1.20")?, "it does not answer after the restart");
        Ok(())
    });
}

#[test]
fn a_detached_eni_leaves_nothing_and_its_move_needs_one_run_on_either_side() {
    vpc_lab::inside(|| {
        let mut small = small()?;
        small.eniup(&["reconcile"], 0)?;
        small.lab.move_network_interface(&small.second, "client", 0, 1)?;
        let gone = small.eniup(&["reconcile"], 0)?;
        ensure!(gone.contains("ip -4 rule del") && gone.contains("ip -6 rule del"), "{gone}");
        let left = small.eniup(&["release", "--dry-run"], 0)?;
        let is_object = |line: &&str| [" rule ", " route ", " addr "].iter().any(|word| line.contains(word));
        ensure!(left.lines().filter(is_object).count() == 0, "left behind: {left}");
        ensure!(small.lab.eniup("client", &["reconcile"])?.status.success(), "the other side");
        let to: IpAddr = "10.0.1.20".parse()?;
        let probe = Probe { from: "web".into(), bound: Bound::Nothing, to, kind: Kind::Tcp };
        ensure!(small.lab.probe(&[probe], PATIENCE)?[0].is_answer_of(to), "it does not answer on the other side");
        Ok(())
    });
}

/// A VPC with the same CIDRs as another one, with a subnet and a client in it.
fn vpc_with_a_client(lab: &mut Lab, subnet: &str, client: &str, address: &str) -> Result<String> {
    let subnet = lab.fabric.world(|world| {
        let vpc = world.create_vpc(&["10.0.0.0/16".parse()?]);
        world.create_subnet(&vpc, Some(subnet.parse()?), &[])
    })?;
    let eni = eni_in(lab, &subnet, address)?;
    lab.run_instance(client, &[eni], "t3.micro", Distribution::Primary)?;
    Ok(subnet)
}

fn eni_in(lab: &mut Lab, subnet: &str, address: &str) -> Result<EniId> {
    let create = CreateEni { subnet: subnet.into(), ipv4s: vec![address.parse()?], ..CreateEni::default() };
    lab.create_network_interface(create)
}

#[test]
fn an_isolated_eni_of_another_vpc_with_the_same_addresses_works_beside_the_primary() {
    vpc_lab::inside(|| {
        let mut lab = Lab::new(ENIUP)?;
        let ours = vpc_with_a_client(&mut lab, "10.0.0.0/24", "neighbour", "10.0.0.30")?;
        let theirs = vpc_with_a_client(&mut lab, "10.0.0.0/24", "stranger", "10.0.0.40")?;
        let enis = [eni_in(&mut lab, &ours, "10.0.0.10")?, eni_in(&mut lab, &theirs, "10.0.0.20")?];
        lab.run_instance("web", &enis, "m7i.large", Distribution::Primary)?;
        let config = tempfile::NamedTempFile::new()?;
        std::fs::write(config.path(), "[[eni]]\ndevice_number = 1\nisolate = true\n")?;
        let path = config.path().to_str().context("its path")?;
        let run = lab.eniup("web", &["reconcile", "--config", path])?;
        ensure!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let link = Bound::Device("ens6".into());
        for (from, bound, to) in [
            ("neighbour", Bound::Nothing, "10.0.0.10"),
            ("stranger", Bound::Nothing, "10.0.0.20"),
            ("web", Bound::Nothing, "10.0.0.30"),
            ("web", Bound::Address("10.0.0.10".parse()?), "10.0.0.30"),
            ("web", Bound::Address("10.0.0.20".parse()?), "10.0.0.40"),
            ("web", link, "10.0.0.40"),
        ] {
            let to: IpAddr = to.parse()?;
            let probe = |kind| Probe { from: from.into(), bound: bound.clone(), to, kind };
            let outcomes = lab.probe(&Kind::ALL.map(probe), PATIENCE)?;
            ensure!(
                outcomes.iter().all(|outcome| outcome.is_answer_of(to)),
                "{from} to {to} ({bound:?}): {outcomes:?}"
            );
        }
        ensure!(lab.fabric.source_drops() == 0, "{:?}", lab.fabric.last_drops());
        Ok(())
    });
}
