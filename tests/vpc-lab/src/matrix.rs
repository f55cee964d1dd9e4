//! The reachability matrix: every exchange on every layout, and what the VPC dropped meanwhile.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ipnet::IpNet;

use crate::check::{self, Check, Expected};
use crate::demo::step;
use crate::kernel;
use crate::lab::Lab;
use crate::layouts::{LAYOUTS, Layout, Stage};
use crate::probe::{Bound, Outcome, Probe};
use crate::scene::{BY_ADDRESS, BY_DEVICE, FORWARDED, ITSELF, MASQUERADED, UNBOUND};
use crate::table::{Align, Cell, Style, Table};

const PATIENCE: Duration = Duration::from_millis(700);

/// The columns: who asks the instance, then how the instance asks.
const CLASSES: [&str; 16] = [
    "primary's net",
    "ENI's net",
    "third net",
    "peer",
    "internet",
    "container",
    "pod",
    "routed",
    "tunnel",
    "each other",
    ITSELF,
    UNBOUND,
    BY_ADDRESS,
    BY_DEVICE,
    FORWARDED,
    MASQUERADED,
];

/// By whom the instances are configured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum How {
    Eniup,
    /// By eniup with `rules = "per-address"`.
    PerAddress,
    /// By eniup on a kernel before Linux 5.18, which forgets whose addresses are.
    OldKernel,
    /// By nobody: what the distribution made of the primary ENI is all there is.
    None,
}

/// What one layout came to.
pub struct Tally {
    pub passed: BTreeMap<String, (usize, usize)>,
    pub faults: Vec<String>,
    pub drops: u64,
}

impl Tally {
    pub fn is_right(&self) -> bool {
        self.faults.is_empty() && self.drops == 0
    }
}

/// Plays the matrix and prints it; gives whether every cell was right.
///
/// # Errors
/// A layout that there is not, or that could not be built.
pub fn play(eniup: &Path, how: How, only: &[String]) -> Result<bool> {
    for name in only {
        let names: Vec<&str> = LAYOUTS.iter().map(|layout| layout.name).collect();
        ensure!(names.contains(&name.as_str()), "there is no layout {name}; there are {}", names.join(", "));
    }
    let chosen = LAYOUTS.iter().filter(|layout| only.is_empty() || only.iter().any(|name| name == layout.name));
    let mut results = Vec::new();
    for layout in chosen {
        let result = step(&format!("{} ({})", layout.name, layout.about), || run(layout, eniup, how))?;
        results.push((layout, result));
    }
    let used: Vec<&str> = CLASSES
        .into_iter()
        .filter(|class| results.iter().any(|(_, result)| result.passed.contains_key(*class)))
        .collect();
    let header = std::iter::once("layout").chain(used.iter().copied()).chain(["dropped"]);
    let mut table = Table::new(header.map(Cell::from).collect(), Align::Right);
    for (layout, result) in &results {
        table.push(row(layout, result, &used));
    }
    print!("{table}");
    let all: usize = results.iter().flat_map(|(_, result)| result.passed.values()).map(|(_, all)| all).sum();
    let passed: usize = results.iter().flat_map(|(_, result)| result.passed.values()).map(|(passed, _)| passed).sum();
    let dropped: u64 = results.iter().map(|(_, result)| result.drops).sum();
    println!("{passed} of {all} exchanges right, {dropped} packets dropped by the source check");
    if how != How::None {
        for (layout, result) in &results {
            result.faults.iter().take(5).for_each(|fault| println!("  wrong in {}: {fault}", layout.name));
        }
    }
    Ok(results.iter().all(|(_, result)| result.is_right()))
}

fn row(layout: &Layout, result: &Tally, used: &[&str]) -> Vec<Cell> {
    let cell = |class: &&str| match result.passed.get(*class) {
        None => Cell::styled("·", Style::Faint),
        Some((passed, all)) if passed == all => Cell::styled(format!("{passed}/{all}"), Style::Good),
        Some((passed, all)) => Cell::styled(format!("{passed}/{all}"), Style::Bad),
    };
    let drops = Cell::styled(result.drops.to_string(), if result.drops == 0 { Style::Good } else { Style::Bad });
    std::iter::once(Cell::from(layout.name)).chain(used.iter().map(cell)).chain([drops]).collect()
}

/// Builds a layout, configures it, and makes every exchange.
///
/// # Errors
/// It cannot be built, or eniup fails on it.
pub fn run(layout: &Layout, eniup: &Path, how: How) -> Result<Tally> {
    let mut stage = (layout.build)(eniup).with_context(|| format!("building {}", layout.name))?;
    let checks = expected(&stage)?;
    stage.scene.lab.is_kernel_old = how == How::OldKernel;
    let lab = &stage.scene.lab;
    if how != How::None {
        lab.fabric.forget_drops();
        for instance in &stage.scene.instances {
            if how == How::PerAddress {
                choose_per_address(lab, instance)?;
            }
            reconcile(lab, instance)?;
        }
        ensure!(lab.fabric.source_drops() == 0, "dropped during reconcile: {:?}", lab.fabric.last_drops());
    }
    lab.fabric.forget_drops();
    let faults = check::run(lab, &checks, PATIENCE)?;
    let mut passed: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for (check, fault) in checks.iter().zip(&faults) {
        ensure!(CLASSES.contains(&check.column.as_str()), "the table has no column {}", check.column);
        let (passed, all) = passed.entry(check.column.clone()).or_default();
        *passed += usize::from(fault.is_none());
        *all += 1;
    }
    let drops = lab.fabric.source_drops();
    Ok(Tally { passed, faults: faults.into_iter().flatten().collect(), drops })
}

/// The exchanges of a stage. Where something else governs the primary's and unbound traffic, that has to stay as it is
/// before eniup comes: what is answered stays answered, and is seen as before; what is led astray stays so, but for the
/// primary's exchanges with another ENI's subnet, which have to be right.
fn expected(stage: &Stage) -> Result<Vec<Check>> {
    let Stage { scene, is_governed_by_others, extra } = stage;
    let checks: Vec<Check> = scene.ingress().into_iter().chain(scene.egress()).chain(extra.iter().cloned()).collect();
    if !is_governed_by_others {
        return Ok(checks);
    }
    let (primaries, publics) = primary_addresses(&scene.lab)?;
    let is_theirs = |check: &Check| {
        let is_primarys = match &check.probe.bound {
            Bound::Address(address) => primaries.contains(address),
            Bound::Device(link) => link == "ens5",
            Bound::Nothing => primaries.contains(&check.probe.to) || publics.contains(&check.probe.to),
        };
        is_primarys || [UNBOUND, MASQUERADED].contains(&check.column.as_str())
    };
    let (theirs, mut ours): (Vec<Check>, Vec<Check>) = checks.into_iter().partition(is_theirs);
    let probes: Vec<Probe> = theirs.iter().map(|check| check.probe.clone()).collect();
    let before = as_before(&scene.lab, &primaries, &probes)?;
    let nets = secondary_subnets(&scene.lab)?;
    ours.extend(theirs.into_iter().zip(before).map(|(check, outcome)| match outcome {
        Outcome::Answer { by, seen, .. } if by == check.probe.to => {
            Check { expected: Expected::Answer { seen: seen.into_iter().collect() }, ..check }
        }
        // The narrow rules of the primary are there for these, whatever `main` says.
        _ if is_between_primary_and(&nets, &check) => check,
        Outcome::Answer { .. } | Outcome::Failed(_) | Outcome::Silence => {
            Check { expected: Expected::Silence, ..check }
        }
    }));
    Ok(ours)
}

/// Whether an address of the primary, by name, talks with a client in one of these nets.
fn is_between_primary_and(nets: &[IpNet], check: &Check) -> bool {
    let Check { row: _, column: _, probe, expected } = check;
    let client = match (&probe.bound, expected) {
        (Bound::Address(_), _) if probe.from == "web" => Some(probe.to),
        (_, Expected::Answer { seen }) if probe.from != "web" => seen.first().copied(),
        _ => None,
    };
    client.is_some_and(|client| nets.iter().any(|net| net.contains(&client)))
}

/// What comes of these probes before eniup has been there. Those that need an address which the distribution leaves out find it
/// put there by hand.
fn as_before(lab: &Lab, primaries: &[IpAddr], probes: &[Probe]) -> Result<Vec<Outcome>> {
    let web = lab.node("web")?;
    let there = web.enter(kernel::addresses)?;
    let missing: Vec<IpAddr> = primaries.iter().copied().filter(|address| !there.contains(address)).collect();
    let untouched = probe_twice(lab, probes)?;
    web.enter(|| {
        missing.iter().try_for_each(|address| kernel::add_address("ens5", (*address).into(), None))?;
        missing.iter().try_for_each(|address| kernel::await_local(*address))
    })?;
    let by_hand = probe_twice(lab, probes)?;
    web.enter(|| missing.iter().try_for_each(|address| kernel::delete_address("ens5", (*address).into())))?;
    let needs = |probe: &Probe| {
        missing.contains(&probe.to) || matches!(probe.bound, Bound::Address(own) if missing.contains(&own))
    };
    let both = probes.iter().zip(untouched).zip(by_hand);
    Ok(both.map(|((probe, untouched), by_hand)| if needs(probe) { by_hand } else { untouched }).collect())
}

/// What is silent twice is led astray; once it may only have been asked before its links were ready.
fn probe_twice(lab: &Lab, probes: &[Probe]) -> Result<Vec<Outcome>> {
    let first = lab.probe(probes, PATIENCE)?;
    let is_answered = |outcome: &Outcome| matches!(outcome, Outcome::Answer { .. });
    let silent = probes.iter().zip(&first).filter(|(_, outcome)| !is_answered(outcome));
    let silent: Vec<Probe> = silent.map(|(probe, _)| probe.clone()).collect();
    let mut again = lab.probe(&silent, PATIENCE)?.into_iter();
    Ok(first.into_iter().map(|first| if is_answered(&first) { first } else { again.next().unwrap_or(first) }).collect())
}

/// The subnets of `web`'s secondary ENIs.
fn secondary_subnets(lab: &Lab) -> Result<Vec<IpNet>> {
    let world = lab.world();
    let (_, id) = lab.instances().find(|(name, _)| *name == "web").context("every layout has an instance web")?;
    let mut nets = Vec::new();
    for eni in world.enis_of(id).into_iter().skip(1) {
        let subnet = world.subnet(&eni.subnet)?;
        nets.extend(subnet.ipv4.map(IpNet::from));
        nets.extend(subnet.ipv6s.iter().copied().map(IpNet::from));
    }
    Ok(nets)
}

/// The addresses of `web`'s primary ENI, private and public.
fn primary_addresses(lab: &Lab) -> Result<(Vec<IpAddr>, Vec<IpAddr>)> {
    let world = lab.world();
    let (_, id) = lab.instances().find(|(name, _)| *name == "web").context("every layout has an instance web")?;
    let primary = world.eni(&world.instance(id)?.primary)?;
    let publics = world.associations_of(&primary.id).into_iter().map(|(public, _)| IpAddr::from(public));
    Ok((primary.addresses(), publics.collect()))
}

/// Drops the choice in where an administrator would for this boot.
fn choose_per_address(lab: &Lab, instance: &str) -> Result<()> {
    let folder = lab.node(instance)?.run_directory().join("eniup/config.d");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    fs::write(folder.join("50-rules.toml"), "rules = \"per-address\"\n").context("writing the drop-in")
}

fn reconcile(lab: &Lab, instance: &str) -> Result<()> {
    let output = lab.eniup(instance, &["reconcile"])?;
    if !output.status.success() {
        bail!("eniup reconcile on {instance} ({}):\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    let again = lab.eniup(instance, &["reconcile"])?;
    let said = String::from_utf8_lossy(&again.stderr);
    let changes = said.lines().any(|line| line.contains("  # "));
    ensure!(again.status.success() && !changes, "a second run on {instance} ({}):\n{said}", again.status);
    Ok(())
}
