//! What the administrator may choose, from the texts of the configuration files. Nothing needs to be configured: the
//! defaults come from `policy`. Which files there are, and reading them, is for `config_files`.

pub mod choices;
mod problem;
mod reading;
pub mod selector;
mod show;
mod table;

// A length of time, no clock.
use core::time::Duration;
use std::collections::BTreeMap;
use std::fmt;

use crate::policy;
use choices::Choices;
pub use problem::{Place, Problem, Problems};
pub use reading::read;
use selector::{Attribute, Selector};

/// The numbers by which eniup marks and orders what it puts into the kernel, and what else can be chosen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Protocol number on every address, route and rule of ours, 1..=255.
    pub mark: u8,
    /// Table of the ENI in slot 0/0; the others follow at 100 a card and 1 a device.
    pub table_base: u32,
    /// Priority of the guard rule; below every source rule's.
    pub guard_priority: u32,
    /// Added to an ENI's table number for the priority of a rule that covers its whole subnet; and to table and priority
    /// for its last resort.
    pub subnet_rule_offset: u32,
    /// Link group of attached ENIs.
    pub link_group: u32,
    pub rules: Rules,
    /// When a run gives up waiting: for another run, for metadata, for pending ENIs.
    pub timeout: Duration,
    /// Between two readings of metadata by `watch`; none is as often as it costs next to nothing.
    pub interval: Option<Duration>,
    /// If there is any, only the ENIs that one of them means are managed.
    pub manage: Vec<Selector>,
    /// The ENIs that one of these means are left alone, also if they are meant to be managed.
    pub ignore: Vec<Selector>,
    /// What is chosen for the ENIs that each of these means, later ones overriding earlier ones.
    pub enis: Vec<(Selector, Choices)>,
}

/// The form of the rules that send an ENI's traffic by that ENI. Both forms send every address the same way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Rules {
    /// As few as can be, since every rule that does not match costs each look-up 10 ns.
    #[default]
    Aggregated,
    /// One for each address, for those who want to read them.
    PerAddress,
}

impl Config {
    /// Whether ENIs are told apart by what routing does not need to know of them.
    pub fn needs_details(&self) -> bool {
        self.attributes().any(|attribute| attribute.is_detail())
    }

    /// Whether ENIs are told apart by the tags of the instance.
    pub fn needs_tags(&self) -> bool {
        self.attributes().any(|attribute| attribute == Attribute::InstanceTag)
    }

    /// What ENIs are told apart by, in any entry.
    fn attributes(&self) -> impl Iterator<Item = Attribute> {
        let of_enis = self.enis.iter().map(|(selector, _)| selector);
        let selectors = self.manage.iter().chain(&self.ignore).chain(of_enis);
        selectors.flat_map(|selector| selector.wanted.keys()).copied()
    }
}

impl Default for Config {
    fn default() -> Config {
        Config {
            mark: policy::MARK,
            table_base: policy::TABLE_BASE,
            guard_priority: policy::GUARD_PRIORITY,
            subnet_rule_offset: policy::SUBNET_RULE_OFFSET,
            link_group: policy::LINK_GROUP,
            rules: Rules::default(),
            timeout: policy::TIMEOUT,
            interval: None,
            manage: Vec::new(),
            ignore: Vec::new(),
            enis: Vec::new(),
        }
    }
}

/// One file, by the name under which people find it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct File {
    pub name: String,
    /// What it says, or why it cannot be read.
    pub text: Result<String, String>,
}

/// Where a value was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Origin {
    pub file: String,
    /// From 1.
    pub line: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// What is in effect, and where each value that is no default was written.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Settings {
    pub config: Config,
    /// By key, as in `numbers.mark`.
    pub origins: BTreeMap<&'static str, Origin>,
}
