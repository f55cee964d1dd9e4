//! What commonly goes wrong on a machine with several ENIs, each as a check with an id that people and documents refer
//! to: from a snapshot to findings with their evidence and one thing to do about each.

mod network;
mod others;

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::config::Config;
use crate::desired::desired;
use crate::eni::{Attached, Eni};
use crate::fib::{Doubt, Packet, Way, lookup};
use crate::metadata;
use crate::net::{Link, MacAddr, Observed};
use crate::place::find_link;
use crate::plan::{Plan, plan};
use crate::selection::select;
use crate::snapshot::Snapshot;

/// Raised when a key changes its meaning or goes away; keys may be added at any time.
const SCHEMA: u32 = 1;

/// How a check, or one finding of it, came out; the worst last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Pass,
    /// It cannot be told.
    Skip,
    /// It works, but something may undo it, or it is not as people expect.
    Warn,
    /// Something does not work.
    Fail,
}

#[derive(Serialize, Debug)]
pub struct Diagnosis {
    pub schema: u32,
    pub verdict: Verdict,
    pub checks: Vec<CheckResult>,
}

#[derive(Serialize, Debug)]
pub struct CheckResult {
    pub id: &'static str,
    pub question: &'static str,
    pub verdict: Verdict,
    pub findings: Vec<Finding>,
}

#[derive(Clone, PartialEq, Eq, Serialize, Debug)]
pub struct Finding {
    pub verdict: Verdict,
    pub evidence: String,
    /// What to do: a command, or words where no command can.
    pub fix: Option<String>,
    /// Packets whose way only the kernel knows.
    #[serde(skip)]
    asks: Vec<Packet>,
}

impl Finding {
    fn fail(evidence: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding { verdict: Verdict::Fail, evidence: evidence.into(), fix: Some(fix.into()), asks: Vec::new() }
    }

    fn warn(evidence: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding { verdict: Verdict::Warn, ..Finding::fail(evidence, fix) }
    }

    fn skip(evidence: impl Into<String>) -> Finding {
        Finding { verdict: Verdict::Skip, evidence: evidence.into(), fix: None, asks: Vec::new() }
    }
}

/// The kernel's own word on packets.
pub type Told = BTreeMap<Packet, Way>;

/// What is wrong, or why that cannot be told.
type Findings = Result<Vec<Finding>, String>;

struct Check {
    id: &'static str,
    question: &'static str,
    /// What is so when nothing is found.
    passed: &'static str,
    look: fn(&Facts) -> Findings,
}

const fn check(id: &'static str, question: &'static str, passed: &'static str, look: fn(&Facts) -> Findings) -> Check {
    Check { id, question, passed, look }
}

/// In the order in which trouble builds on trouble.
const CHECKS: [Check; 15] = [
    check("D-IMDS", "Does instance metadata answer?", "metadata answers and can be used", network::imds),
    check("D-HOTPLUG", "Is every attached ENI here, up and known?", "every ENI is", network::hotplug),
    check("D-MISSING-IP", "Is every address on its link?", "every address is", network::missing_ip),
    check("D-ASYM", "Do answers leave by the ENI whose address they have?", "all do", network::asymmetry),
    check("D-SAMESUBNET", "Also where ENIs share a subnet?", "yes, or none do", network::same_subnet),
    check("D-CONTAINER", "Are containers and tunnels reached from ENIs' addresses?", "yes", network::containers),
    check(
        "D-DEFAULT",
        "Is the primary ENI the default way out?",
        "yes, and the only one of the ENIs",
        network::default_route,
    ),
    check(
        "D-SRC",
        "Is it clear which address outgoing traffic has?",
        "each ENI has one that is chosen",
        network::source,
    ),
    check("D-RPF", "Does the reverse path filter let the ENIs' traffic in?", "it does", network::reverse_path),
    check("D-MTU", "Are the ENIs' links equally large?", "they are, or as configured", network::mtu),
    check("D-FORWARD", "Does forwarding fit what is configured?", "it does", network::forwarding),
    check("D-DRIFT", "Does the kernel agree with metadata?", "nothing would be changed", network::drift),
    check("D-MANAGER", "Does another network manager undo what eniup does?", "none is known to", others::manager),
    check("D-RIVAL", "Does another tool do the same job?", "none is active, and none has left rules", others::rival),
    check("D-CNI", "Do ENIs belong to a container network?", "no sign of it, or it is configured", others::cni),
];

/// The ids of all checks.
pub fn ids() -> Vec<&'static str> {
    CHECKS.iter().map(|check| check.id).collect()
}

/// What the checks look at.
struct Facts<'a> {
    snapshot: &'a Snapshot,
    config: &'a Config,
    observed: Observed,
    /// Or why there is none.
    metadata: Result<Metadata, String>,
    told: &'a Told,
}

struct Metadata {
    attached: Attached,
    plan: Plan,
}

/// Goes through all checks, with what the kernel told before of what an earlier diagnosis asked.
pub fn examine(snapshot: &Snapshot, config: &Config, told: &Told) -> Diagnosis {
    let observed = snapshot.observed(config.mark);
    let metadata = snapshot.tree().map_err(|error| error.to_string()).and_then(|tree| {
        let attached = metadata::attached_here(&tree, &observed.links).map_err(|error| error.what().to_string())?;
        let attached = select(&attached, &tree, &observed, &snapshot.files, config);
        let plan = plan(&desired(&attached, config), &observed, attached.primary, config);
        Ok(Metadata { attached, plan })
    });
    let facts = Facts { snapshot, config, observed, metadata, told };
    let checks: Vec<CheckResult> = CHECKS.iter().map(|check| result(check, &facts)).collect();
    let verdict = checks.iter().map(|check| check.verdict).max().unwrap_or(Verdict::Pass);
    Diagnosis { schema: SCHEMA, verdict, checks }
}

fn result(check: &Check, facts: &Facts) -> CheckResult {
    let Check { id, question, passed, look } = check;
    let mut findings = look(facts).unwrap_or_else(|why| vec![Finding::skip(format!("it cannot be told: {why}"))]);
    if findings.is_empty() {
        findings.push(Finding { verdict: Verdict::Pass, ..Finding::skip(*passed) });
    }
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.verdict));
    CheckResult { id, question, verdict: findings[0].verdict, findings }
}

/// A ready ENI that is not to be left alone, and its link.
#[derive(Clone, Copy)]
struct Placed<'a> {
    mac: MacAddr,
    eni: &'a Eni,
    link: &'a Link,
}

impl Diagnosis {
    /// Packets of which the checks could tell more if the kernel were asked.
    pub fn asks(&self) -> impl Iterator<Item = &Packet> {
        self.checks.iter().flat_map(|check| &check.findings).flat_map(|finding| &finding.asks)
    }
}

impl Facts<'_> {
    /// The model's, or the kernel's where only that knows which of two was there first.
    fn way(&self, packet: &Packet) -> Way {
        match lookup(&self.observed, packet).way {
            way @ Way::Unknown(Doubt::EqualRoutes | Doubt::OrderOfRules { .. }) => {
                self.told.get(packet).copied().unwrap_or(way)
            }
            way => way,
        }
    }

    fn metadata(&self) -> Result<&Metadata, String> {
        self.metadata.as_ref().map_err(|_| "there is no metadata (D-IMDS)".into())
    }

    /// The primary is among them.
    fn placed(&self) -> Result<Vec<Placed<'_>>, String> {
        let ready = self.metadata()?.attached.ready.iter();
        let placed = ready.filter_map(|(mac, eni)| {
            let link = find_link(*mac, &self.observed).ok().flatten()?;
            Some(Placed { mac: *mac, eni, link })
        });
        Ok(placed.collect())
    }

    fn secondaries(&self) -> Result<Vec<Placed<'_>>, String> {
        let primary = self.metadata()?.attached.primary;
        Ok(self.placed()?.into_iter().filter(|placed| placed.mac != primary).collect())
    }

    fn primary(&self) -> Result<Option<Placed<'_>>, String> {
        let primary = self.metadata()?.attached.primary;
        Ok(self.placed()?.into_iter().find(|placed| placed.mac == primary))
    }

    fn link_name(&self, index: u32) -> String {
        self.observed.links.get(&index).map_or_else(|| format!("link {index}"), |link| link.name.clone())
    }

    /// What eniup would do is the thing to do, if it would do something; else something else is.
    fn reconcile_or(&self, other: impl Into<String>) -> String {
        let has_steps = self.metadata.as_ref().is_ok_and(|metadata| !metadata.plan.steps.is_empty());
        if has_steps { "sudo eniup reconcile".into() } else { other.into() }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            Verdict::Pass => "PASS",
            Verdict::Skip => "SKIP",
            Verdict::Warn => "WARN",
            Verdict::Fail => "FAIL",
        })
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for CheckResult { id, question, verdict, findings } in &self.checks {
            writeln!(f, "{verdict}  {id:12}  {question}")?;
            for Finding { evidence, fix, .. } in findings {
                writeln!(f, "      {}", plain(evidence))?;
                for (n, line) in fix.iter().flat_map(|fix| fix.lines()).enumerate() {
                    writeln!(f, "      {}{}", if n == 0 { "fix: " } else { "     " }, plain(line))?;
                }
            }
        }
        let count = |verdict| self.checks.iter().filter(|check| check.verdict == verdict).count();
        let [fail, warn, skip] = [Verdict::Fail, Verdict::Warn, Verdict::Skip].map(count);
        writeln!(f, "{fail} failed, {warn} with a warning, {skip} that cannot be told, of {}", self.checks.len())
    }
}

/// Metadata and files hold names that people chose; none of them may speak to the terminal.
fn plain(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}
