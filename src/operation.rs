//! One change of the kernel. It shows itself as the `ip(8)` command of the same effect: what is printed is what is done.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::net::{Address, Family, HasFamily, Mark, Route, RouteKind, Rule};
use crate::policy::{LOCAL_TABLE, MAIN_TABLE};

/// A link as an operation needs it: the index to act on, the name to show (and, for sysctls, to act on).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct LinkRef {
    pub index: u32,
    pub name: String,
}

/// One setting of a link.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkChange {
    /// 0 before the link goes up, or the kernel adds a second IPv6 default route to `main`.
    AcceptRa(i32),
    Mtu(u32),
    Group(u32),
    AddAltname(String),
    DeleteAltname(String),
    Up,
    Down,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Operation {
    SetLink {
        link: LinkRef,
        change: LinkChange,
    },
    /// Unreachable routes have no link.
    AddRoute {
        link: Option<LinkRef>,
        route: Route,
    },
    AddRule {
        rule: Rule,
    },
    DeleteAddress {
        link: LinkRef,
        address: Address,
    },
    DeleteRule {
        rule: Rule,
    },
    AddAddress {
        link: LinkRef,
        address: Address,
    },
    /// Lifetime of an address of ours that is there already.
    ChangeAddress {
        link: LinkRef,
        address: Address,
    },
    DeleteRoute {
        link: Option<LinkRef>,
        route: Route,
    },
    /// A setting put back to what was found before; only after everything that used the link is gone.
    ResetLink {
        link: LinkRef,
        change: LinkChange,
    },
}

impl Operation {
    /// Operations are carried out by ascending phase. The moment the machine answers for an address, its way back is
    /// there: link, routes and rules come before it. The moment a rule goes, the addresses it served are gone. A new
    /// address comes after rules that are no longer wanted, since one of them may cover it by another ENI's prefix. A route in
    /// `main` is everybody's: it is there only while the rules are that keep the primary from it, and an address to talk from.
    pub fn phase(&self) -> u8 {
        let is_mains = |route: &Route| route.table == MAIN_TABLE;
        match self {
            Operation::SetLink { .. } => 0,
            Operation::AddRoute { route, .. } if !is_mains(route) => 1,
            Operation::AddRule { .. } => 2,
            Operation::DeleteRoute { route, .. } if is_mains(route) => 3,
            Operation::DeleteAddress { .. } => 4,
            Operation::DeleteRule { .. } => 5,
            Operation::AddAddress { .. } | Operation::ChangeAddress { .. } => 6,
            Operation::AddRoute { .. } => 7,
            Operation::DeleteRoute { .. } => 8,
            Operation::ResetLink { .. } => 9,
        }
    }

    /// Within its phase, for what has an order. At every moment a packet has to go as it did before or as it will: whoever
    /// adds rules from the first priority on and takes them away from the last on changes a packet's way once. A jump leads
    /// past others' rules to where all has to be ready, the next jump included: jumps come last, the last of them first, and
    /// go the other way round. Rules for bound sockets go last of all: they tell of which link a table was, also to the run
    /// after one that is killed.
    pub fn turn(&self) -> (u8, u32) {
        let last_first = |rule: &Rule| u32::MAX - rule.priority;
        let length = |route: &Route| u32::from(route.destination.prefix_len());
        match self {
            // The longest match is there first and goes last.
            Operation::AddRoute { route, .. } if route.table == MAIN_TABLE => (0, u32::MAX - length(route)),
            Operation::DeleteRoute { route, .. } if route.table == MAIN_TABLE => (0, length(route)),
            Operation::AddRule { rule } if rule.goto.is_some() => (1, last_first(rule)),
            Operation::AddRule { rule } => (0, rule.priority),
            Operation::DeleteRule { rule } if rule.goto.is_some() => (0, rule.priority),
            Operation::DeleteRule { rule } if rule.oif.is_none() => (1, last_first(rule)),
            Operation::DeleteRule { rule } => (2, last_first(rule)),
            Operation::SetLink { .. }
            | Operation::AddRoute { .. }
            | Operation::DeleteAddress { .. }
            | Operation::AddAddress { .. }
            | Operation::ChangeAddress { .. }
            | Operation::DeleteRoute { .. }
            | Operation::ResetLink { .. } => (0, 0),
        }
    }

    pub fn takes_away(&self) -> bool {
        match self {
            Operation::DeleteAddress { .. }
            | Operation::DeleteRule { .. }
            | Operation::DeleteRoute { .. }
            | Operation::ResetLink { .. } => true,
            Operation::SetLink { .. }
            | Operation::AddAddress { .. }
            | Operation::ChangeAddress { .. }
            | Operation::AddRoute { .. }
            | Operation::AddRule { .. } => false,
        }
    }

    /// The link that it is about, by name.
    pub fn link(&self) -> Option<&str> {
        match self {
            Operation::SetLink { link, .. }
            | Operation::ResetLink { link, .. }
            | Operation::AddAddress { link, .. }
            | Operation::ChangeAddress { link, .. }
            | Operation::DeleteAddress { link, .. } => Some(&link.name),
            Operation::AddRoute { link, .. } | Operation::DeleteRoute { link, .. } => Some(&link.as_ref()?.name),
            Operation::AddRule { rule } | Operation::DeleteRule { rule } => rule.oif.as_deref(),
        }
    }

    /// A word for logs: what is done to which sort of object.
    pub fn action(&self) -> &'static str {
        match self {
            Operation::SetLink { .. } => "set-link",
            Operation::AddRoute { .. } => "add-route",
            Operation::AddRule { .. } => "add-rule",
            Operation::DeleteAddress { .. } => "delete-address",
            Operation::DeleteRule { .. } => "delete-rule",
            Operation::AddAddress { .. } => "add-address",
            Operation::ChangeAddress { .. } => "change-address",
            Operation::DeleteRoute { .. } => "delete-route",
            Operation::ResetLink { .. } => "reset-link",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Operation::SetLink { link, change } | Operation::ResetLink { link, change } => {
                write!(f, "{}", LinkCommand { name: &link.name, change })
            }
            Operation::AddRoute { link, route } => write!(f, "{}", RouteCommand { verb: "add", link, route }),
            Operation::DeleteRoute { link, route } => write!(f, "{}", RouteCommand { verb: "del", link, route }),
            Operation::AddRule { rule } => write!(f, "{}", RuleCommand { verb: "add", rule }),
            Operation::DeleteRule { rule } => write!(f, "{}", RuleCommand { verb: "del", rule }),
            Operation::AddAddress { link, address } => write!(f, "{}", AddressCommand { verb: "add", link, address }),
            Operation::ChangeAddress { link, address } => {
                write!(f, "{}", AddressCommand { verb: "change", link, address })
            }
            Operation::DeleteAddress { link, address } => {
                write!(f, "ip addr del {} dev {}", address.net, quoted(&link.name))
            }
        }
    }
}

struct LinkCommand<'a> {
    name: &'a str,
    change: &'a LinkChange,
}

impl fmt::Display for LinkCommand<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let name = quoted(self.name);
        match self.change {
            // With slashes, since a link's name may hold dots.
            LinkChange::AcceptRa(value) => write!(f, "sysctl -qw net/ipv6/conf/{name}/accept_ra={value}"),
            LinkChange::Mtu(mtu) => write!(f, "ip link set dev {name} mtu {mtu}"),
            LinkChange::Group(group) => write!(f, "ip link set dev {name} group {group}"),
            LinkChange::AddAltname(altname) => write!(f, "ip link property add dev {name} altname {altname}"),
            LinkChange::DeleteAltname(altname) => write!(f, "ip link property del dev {name} altname {altname}"),
            LinkChange::Up => write!(f, "ip link set dev {name} up"),
            LinkChange::Down => write!(f, "ip link set dev {name} down"),
        }
    }
}

struct AddressCommand<'a> {
    verb: &'a str,
    link: &'a LinkRef,
    address: &'a Address,
}

impl fmt::Display for AddressCommand<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Address { net, is_deprecated, has_prefix_route, is_leased: _, protocol } = self.address;
        write!(f, "ip addr {} {net} dev {}", self.verb, quoted(&self.link.name))?;
        if *is_deprecated {
            write!(f, " preferred_lft 0")?;
        }
        if net.family() == Family::V6 {
            write!(f, " nodad")?;
        }
        if !has_prefix_route {
            write!(f, " noprefixroute")?;
        }
        write!(f, " proto {protocol}")
    }
}

struct RouteCommand<'a> {
    verb: &'a str,
    link: &'a Option<LinkRef>,
    route: &'a Route,
}

impl fmt::Display for RouteCommand<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Route { destination, kind, gateway, is_onlink, table, metric, protocol } = self.route;
        write!(f, "ip {} route {} ", family_option(destination.family()), self.verb)?;
        match kind {
            RouteKind::Unicast => {}
            RouteKind::Unreachable => write!(f, "unreachable ")?,
            RouteKind::Other(number) => write!(f, "type {number} ")?,
        }
        match destination.prefix_len() {
            0 => write!(f, "default")?,
            _ => write!(f, "{destination}")?,
        }
        if let Some(gateway) = gateway {
            write!(f, " via {gateway}")?;
        }
        if let Some(link) = self.link {
            write!(f, " dev {}", quoted(&link.name))?;
        }
        if *is_onlink {
            write!(f, " onlink")?;
        }
        write!(f, " table {} proto {protocol}", table_name(*table))?;
        if *metric != 0 {
            write!(f, " metric {metric}")?;
        }
        Ok(())
    }
}

struct RuleCommand<'a> {
    verb: &'a str,
    rule: &'a Rule,
}

impl fmt::Display for RuleCommand<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let rule = self.rule;
        write!(f, "ip {} rule {} priority {}", family_option(rule.family), self.verb, rule.priority)?;
        write!(f, "{} protocol {}", Selectors { rule }, rule.protocol)
    }
}

/// A rule as people read it, without its protocol.
pub struct RuleText<'a> {
    pub rule: &'a Rule,
}

impl fmt::Display for RuleText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{:>5}:{}", self.rule.priority, Selectors { rule: self.rule })
    }
}

/// What a rule matches and does.
struct Selectors<'a> {
    rule: &'a Rule,
}

impl fmt::Display for Selectors<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Rule {
            priority: _,
            family: _,
            from,
            to,
            iif,
            oif,
            mark,
            is_inverted,
            table,
            goto,
            suppress_prefix_length,
            suppress_group,
            protocol: _,
            has_more,
        } = self.rule;
        if *is_inverted {
            write!(f, " not")?;
        }
        match from {
            Some(from) => write!(f, " from {from}")?,
            None => write!(f, " from all")?,
        }
        if let Some(to) = to {
            write!(f, " to {to}")?;
        }
        if let Some(iif) = iif {
            write!(f, " iif {}", quoted(iif))?;
        }
        if let Some(oif) = oif {
            write!(f, " oif {}", quoted(oif))?;
        }
        if let Some(Mark { value, mask }) = mark {
            write!(f, " fwmark {value:#x}/{mask:#x}")?;
        }
        // A `goto` of somebody else has none.
        if *table != 0 || goto.is_none() {
            write!(f, " lookup {}", table_name(*table))?;
        }
        if let Some(priority) = goto {
            write!(f, " goto {priority}")?;
        }
        if let Some(length) = suppress_prefix_length {
            write!(f, " suppress_prefixlength {length}")?;
        }
        if let Some(group) = suppress_group {
            write!(f, " suppress_ifgroup {group}")?;
        }
        if *has_more {
            write!(f, " (and more)")?;
        }
        Ok(())
    }
}

fn family_option(family: Family) -> &'static str {
    match family {
        Family::V4 => "-4",
        Family::V6 => "-6",
    }
}

fn table_name(table: u32) -> String {
    match table {
        MAIN_TABLE => "main".into(),
        LOCAL_TABLE => "local".into(),
        _ => table.to_string(),
    }
}

/// A link's name as a shell takes it: the kernel allows `$`, `;` and quotes in names, and people paste what we print.
fn quoted(name: &str) -> String {
    let is_plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-@:+".contains(&byte));
    if is_plain && !name.is_empty() { name.into() } else { format!("'{}'", name.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_link_name_cannot_leave_its_quotes() {
        let link = LinkRef { index: 7, name: "a';reboot;'".into() };
        let shown = Operation::SetLink { link, change: LinkChange::Up }.to_string();
        assert_eq!(shown, r"ip link set dev 'a'\'';reboot;'\''' up");
    }
}
