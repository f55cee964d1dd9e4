//! What routing does not need of a snapshot: for people, and for selectors of the configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::IpNet;

use super::Reader;
use super::tree::{ASSOCIATIONS, Answer, INSTANCE_TAGS, Tree, lines};
use crate::net::MacAddr;

/// What people want to know of an ENI and routing does not: every value as metadata has it, nothing where it has none.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct Details {
    pub subnet_id: Option<String>,
    pub vpc_id: Option<String>,
    pub vpc_cidrs: Vec<String>,
    pub security_groups: Vec<String>,
    pub security_group_ids: Vec<String>,
    /// Public or elastic address → private address behind it.
    pub associations: BTreeMap<Ipv4Addr, Ipv4Addr>,
}

/// As networks are written elsewhere: metadata often has `2600:1f16:67f:f200:0:0:0:0/56`.
fn shorten(cidr: String) -> String {
    cidr.parse::<IpNet>().map_or(cidr, |net| net.to_string())
}

/// The lines of one key of an ENI; none where metadata does not tell them, or not yet.
pub fn told(tree: &Tree, mac: MacAddr, key: &str) -> Option<BTreeSet<String>> {
    match (Reader { tree, mac }).get(key) {
        Answer::Present(body) => Some(lines(&body).map(String::from).collect()),
        Answer::Absent | Answer::Unknown(_) => None,
    }
}

/// The tags of the instance, each as `KEY=VALUE`; none where not all of them are known.
pub fn instance_tags(tree: &Tree) -> Option<BTreeSet<String>> {
    let Answer::Present(listing) = tree.get(INSTANCE_TAGS) else { return None };
    let tag = |key| match tree.get(&format!("{INSTANCE_TAGS}{key}")) {
        Answer::Present(value) => Some(format!("{key}={}", value.trim_end_matches(['\r', '\n']))),
        Answer::Absent | Answer::Unknown(_) => None,
    };
    lines(&listing).map(tag).collect()
}

/// Whether metadata was asked for tags of the instance and has none.
pub fn lacks_instance_tags(tree: &Tree) -> bool {
    tree.get(INSTANCE_TAGS) == Answer::Absent
}

/// The details of one ENI, as far as they could be read.
pub fn details(tree: &Tree, mac: MacAddr) -> Details {
    let reader = Reader { tree, mac };
    let text = |key: &str| match reader.get(key) {
        Answer::Present(body) => Some(body),
        Answer::Absent | Answer::Unknown(_) => None,
    };
    let one = |key: &str| text(key).map(|body| body.trim().to_string());
    let many = |key: &str| -> Vec<String> {
        text(key).map(|body| lines(&body).map(String::from).collect()).unwrap_or_default()
    };
    let mut associations = BTreeMap::new();
    for name in many(ASSOCIATIONS) {
        let private = one(&format!("{ASSOCIATIONS}{name}")).and_then(|body| body.parse().ok());
        if let (Ok(public), Some(private)) = (name.parse(), private) {
            associations.insert(public, private);
        }
    }
    Details {
        subnet_id: one("subnet-id"),
        vpc_id: one("vpc-id"),
        vpc_cidrs: ["vpc-ipv4-cidr-blocks", "vpc-ipv6-cidr-blocks"].into_iter().flat_map(many).map(shorten).collect(),
        security_groups: many("security-groups"),
        security_group_ids: many("security-group-ids"),
        associations,
    }
}
