//! What several tests share: scenario folders, and a model of a machine to which plans are applied.
//!
//! A scenario is a folder below `tests/scenarios` named for what it shows: `metadata.json` (a snapshot as `eniup plan
//! --metadata` takes it), optionally `before.json` (an earlier snapshot that the machine was brought into agreement
//! with), optionally `machine.json` (how the machine differs from a fresh one), optionally `config.toml` (which was not
//! there before), and `plan.txt`, the expected output.
#![allow(dead_code)] // Each test binary uses its own part.

pub mod machine;
pub mod model;
pub mod moments;
pub mod tools;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use eniup::config::{self, Config};
use eniup::desired::desired;
use eniup::eni::Attached;
use eniup::markers::{Files, Found};
use eniup::metadata::{self, Tree};
use eniup::net::{Address, MacAddr, Observed, Route, RouteKind, Rule};
use eniup::plan::{Plan, fresh_machine, plan};
use eniup::policy;
use eniup::selection::select;
pub use model::apply;
use proptest::prelude::{ProptestConfig, Strategy};
use proptest::test_runner::{TestCaseError, TestRunner};
use serde::Deserialize;

#[derive(Clone)]
pub struct Scenario {
    pub name: String,
    pub folder: PathBuf,
    pub attached: Attached,
    pub before: Option<Attached>,
    pub machine: Machine,
    pub tree: Tree,
    pub config: Config,
}

/// How a machine differs from a fresh one, by the MAC of an ENI.
#[derive(Clone, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Machine {
    pub no_link_for: Vec<MacAddr>,
    pub gone: Vec<MacAddr>,
    pub rename: BTreeMap<MacAddr, String>,
    pub bounce: Vec<MacAddr>,
    pub enslave: Vec<MacAddr>,
    pub twice: Vec<MacAddr>,
    pub macvlan: Vec<MacAddr>,
    pub foreign_address: BTreeMap<MacAddr, Vec<ipnet::IpNet>>,
    pub no_ipv6: Vec<MacAddr>,
    pub group: BTreeMap<MacAddr, u32>,
    pub mtu: BTreeMap<MacAddr, u32>,
    /// Another manager's routes in `main` by the ENI's link.
    pub main: BTreeMap<MacAddr, Vec<ipnet::IpNet>>,
    /// Networks of containers: routes in `main` by a bridge.
    pub bridge: Vec<ipnet::IpNet>,
    pub rules: Vec<Rule>,
    /// Files that are there, by path.
    pub files: Vec<String>,
}

pub fn read_tree(path: &Path) -> Result<Tree> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Tree::from_json(&text).with_context(|| path.display().to_string())
}

pub fn read_attached(path: &Path) -> Result<Attached> {
    Ok(metadata::attached(&read_tree(path)?)?)
}

/// The configuration of a scenario, told by the name that the file has in it.
fn read_config(path: &Path) -> Result<Config> {
    if !path.exists() {
        return Ok(Config::default());
    }
    let file = config::File { name: "config.toml".into(), text: Ok(fs::read_to_string(path)?) };
    Ok(config::read(&[file])?.config)
}

/// All scenarios, by name.
pub fn scenarios() -> Result<Vec<Scenario>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let mut scenarios = Vec::new();
    for entry in fs::read_dir(&root)? {
        let folder = entry?.path();
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let before = folder.join("before.json");
        let machine = folder.join("machine.json");
        scenarios.push(Scenario {
            attached: read_attached(&folder.join("metadata.json"))?,
            tree: read_tree(&folder.join("metadata.json"))?,
            config: read_config(&folder.join("config.toml")).with_context(|| name.clone())?,
            before: before.exists().then(|| read_attached(&before)).transpose()?,
            machine: match machine.exists() {
                true => serde_json::from_str(&fs::read_to_string(&machine)?).with_context(|| name.clone())?,
                false => Machine::default(),
            },
            folder,
            name,
        });
    }
    scenarios.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(scenarios.len() > 20, "the scenario folders are missing");
    Ok(scenarios)
}

impl Scenario {
    /// The text of its configuration, if it has one.
    pub fn configuration(&self) -> Option<String> {
        fs::read_to_string(self.folder.join("config.toml")).ok()
    }

    pub fn plan(&self, observed: &Observed) -> Plan {
        self.plan_of(&self.selected(observed), observed)
    }

    /// The same on the machine that the test runs on, which has none of the scenario's files.
    pub fn plan_without_files(&self, observed: &Observed) -> Plan {
        self.plan_of(&self.selected_without_files(observed), observed)
    }

    pub fn selected_without_files(&self, observed: &Observed) -> Attached {
        select(&self.attached, &self.tree, observed, &Files::default(), &self.config)
    }

    fn plan_of(&self, selected: &Attached, observed: &Observed) -> Plan {
        plan(&desired(selected, &self.config), observed, selected.primary, &self.config)
    }

    /// What others left on the machine.
    fn files(&self) -> Files {
        Files(self.machine.files.iter().map(|path| (path.clone(), Found::There)).collect())
    }

    /// What is attached, as the scenario's configuration takes it.
    pub fn selected(&self, observed: &Observed) -> Attached {
        select(&self.attached, &self.tree, observed, &self.files(), &self.config)
    }

    /// The machine as the scenario finds it.
    pub fn observed(&self) -> Observed {
        let first = self.before.as_ref().unwrap_or(&self.attached);
        let mut observed = fresh_machine(first);
        for (mac, mtu) in &self.machine.mtu {
            link(&mut observed, *mac).mtu = *mtu;
        }
        if let Some(before) = &self.before {
            let plan = plan_for(before, &observed);
            apply(&mut observed, &plan);
            plug(&mut observed, fresh_machine(&self.attached));
        }
        self.change(&mut observed);
        observed
    }

    fn change(&self, observed: &mut Observed) {
        let machine = &self.machine;
        for mac in machine.gone.iter().chain(&machine.no_link_for) {
            let found = observed.links.values().find(|link| link.mac == Some(*mac)).map(|link| link.index);
            if let Some(index) = found {
                observed.links.remove(&index);
                observed.addresses.retain(|(on, _)| *on != index);
                observed.routes.retain(|(on, _)| *on != Some(index));
            }
        }
        for (mac, name) in &machine.rename {
            link(observed, *mac).name.clone_from(name);
        }
        for mac in &machine.bounce {
            // The kernel drops the link's routes and IPv6 addresses when it goes down; they do not come back.
            let index = link(observed, *mac).index;
            observed.routes.retain(|(on, _)| *on != Some(index));
            observed.addresses.retain(|(on, address)| *on != index || address.net.addr().is_ipv4());
        }
        for mac in &machine.enslave {
            let mut bridge = link(observed, *mac).clone();
            bridge.index = 90;
            bridge.name = "br0".into();
            bridge.kind = Some("bridge".into());
            observed.links.insert(90, bridge);
            link(observed, *mac).controller = Some(90);
        }
        for (macs, kind) in [(&machine.twice, None), (&machine.macvlan, Some("macvlan"))] {
            for mac in macs {
                let mut other = link(observed, *mac).clone();
                other.index = 91;
                other.name = "other0".into();
                other.kind = kind.map(String::from);
                other.altnames.clear();
                observed.links.insert(91, other);
            }
        }
        for (mac, nets) in &machine.foreign_address {
            let index = link(observed, *mac).index;
            for net in nets {
                let address =
                    Address { net: *net, is_deprecated: false, has_prefix_route: true, is_leased: false, protocol: 0 };
                observed.addresses.insert((index, address));
            }
        }
        for mac in &machine.no_ipv6 {
            if let Some(ipv6) = &mut link(observed, *mac).ipv6 {
                ipv6.is_disabled = true;
            }
        }
        for (mac, group) in &machine.group {
            link(observed, *mac).group = *group;
        }
        for (mac, nets) in &machine.main {
            let index = link(observed, *mac).index;
            observed.routes.extend(nets.iter().map(|net| (Some(index), foreign_route(*net))));
        }
        observed.rules.extend(machine.rules.iter().cloned());
        observed.routes.extend(machine.bridge.iter().map(|net| (Some(95), foreign_route(*net))));
    }
}

fn foreign_route(destination: ipnet::IpNet) -> Route {
    Route {
        destination,
        kind: RouteKind::Unicast,
        gateway: None,
        is_onlink: false,
        table: policy::MAIN_TABLE,
        metric: 100,
        protocol: policy::KERNEL_PROTOCOL,
    }
}

/// What was attached since comes as links of its own.
fn plug(observed: &mut Observed, fresh: Observed) {
    let is_new = |link: &eniup::net::Link| observed.links.values().all(|known| known.mac != link.mac);
    let new: Vec<eniup::net::Link> = fresh.links.into_values().filter(is_new).collect();
    for link in new {
        let index = observed.links.keys().max().map_or(2, |last| last + 1);
        let name = format!("eth{}", index - 2);
        observed.links.insert(index, eniup::net::Link { index, name, ..link });
    }
}

fn link(observed: &mut Observed, mac: MacAddr) -> &mut eniup::net::Link {
    observed.links.values_mut().find(|link| link.mac == Some(mac)).expect("the scenario names a MAC that it has not")
}

pub fn plan_for(attached: &Attached, observed: &Observed) -> Plan {
    let config = Config::default();
    plan(&desired(attached, &config), observed, attached.primary, &config)
}

/// Runs a property on generated values; `PROPTEST_CASES` overrides how many.
pub fn check<T: std::fmt::Debug>(
    cases: u32,
    values: impl Strategy<Value = T>,
    mut property: impl FnMut(&T) -> Result<()>,
) -> Result<()> {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(cases);
    let config = ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 100, ..Default::default() };
    let property = std::cell::RefCell::new(&mut property);
    let run = |value: T| property.borrow_mut()(&value).map_err(|error| TestCaseError::fail(format!("{error:?}")));
    TestRunner::new(config).run(&values, run).map_err(|error| anyhow::anyhow!("{error}"))
}
