//! All that eniup looks at, of one machine at one moment, as one JSON file: for bug reports, and for the commands that only
//! look. Taking, writing and reading one is for `snapshot_file`. A secret is never in it: the metadata token is no part of
//! a tree, and user data is not asked for.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};
use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::File;
use crate::history::Line;
use crate::ledger::Ledger;
use crate::markers::Files;
use crate::metadata::{Fault, SavedTree, Tree, lines};
use crate::net::Observed;
use crate::trial::Notice;

/// Raised when a key changes its meaning or goes away; keys may be added at any time.
const SCHEMA: u32 = 1;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    pub schema: u32,
    /// The version of the eniup that took it.
    pub eniup: String,
    /// The kernel's release, as `uname -r` has it.
    pub kernel: Option<String>,
    /// Seconds since 1970.
    pub taken_at: u64,
    /// Seconds since the machine was started.
    pub uptime: Option<f64>,
    pub is_redacted: bool,
    /// Why there is no metadata at all; nothing when there is.
    pub metadata_error: Option<String>,
    pub metadata_fault: Option<Fault>,
    /// Where metadata was asked for, if not where EC2 has it.
    pub imds_endpoint: Option<String>,
    #[serde(flatten)]
    pub metadata: SavedTree,
    /// As the kernel has it, without what the ledger knows better.
    pub observed: Observed,
    pub configuration: Vec<SavedFile>,
    pub ledger: Ledger,
    /// How the last run on trial stands, while that matters.
    #[serde(default)]
    pub trial: Option<Notice>,
    /// What others left.
    pub files: Files,
    /// What runs have told of late.
    #[serde(default)]
    pub history: Vec<Line>,
}

/// A file, with its text or with why it could not be read.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SavedFile {
    pub name: String,
    pub text: Option<String>,
    pub error: Option<String>,
}

impl From<&File> for SavedFile {
    fn from(file: &File) -> SavedFile {
        let File { name, text } = file;
        SavedFile { name: name.clone(), text: text.clone().ok(), error: text.clone().err() }
    }
}

/// What is read of the machine for a snapshot.
pub struct Taken {
    pub kernel: Option<String>,
    pub taken_at: u64,
    pub uptime: Option<f64>,
    pub tree: Result<Tree, (Fault, String)>,
    pub imds_endpoint: Option<String>,
    pub observed: Observed,
    pub configuration: Vec<File>,
    pub ledger: Ledger,
    pub trial: Option<Notice>,
    pub files: Files,
    pub history: Vec<Line>,
}

/// The machine had no metadata when the snapshot was taken.
#[derive(Debug)]
pub struct NoMetadata(String);

impl fmt::Display for NoMetadata {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "metadata could not be read when the snapshot was taken: {}", self.0)
    }
}

impl std::error::Error for NoMetadata {}

impl Snapshot {
    pub fn new(taken: Taken) -> Snapshot {
        let Taken {
            kernel,
            taken_at,
            uptime,
            tree,
            imds_endpoint,
            observed,
            configuration,
            ledger,
            trial,
            files,
            history,
        } = taken;
        let (metadata, failure) = match tree {
            Ok(tree) => (tree.save(), None),
            Err(failure) => (SavedTree::default(), Some(failure)),
        };
        Snapshot {
            schema: SCHEMA,
            eniup: env!("CARGO_PKG_VERSION").into(),
            kernel,
            taken_at,
            uptime,
            is_redacted: false,
            metadata_fault: failure.as_ref().map(|(fault, _)| *fault),
            metadata_error: failure.map(|(_, why)| why),
            imds_endpoint,
            metadata,
            observed,
            configuration: configuration.iter().map(SavedFile::from).collect(),
            ledger,
            trial,
            files,
            history,
        }
    }

    /// # Errors
    /// Text that is no snapshot, or one of another schema.
    pub fn from_json(text: &str) -> Result<Snapshot> {
        #[derive(Deserialize)]
        struct Version {
            schema: u32,
        }
        let expected = "expected what `eniup snapshot` writes";
        let Version { schema } = serde_json::from_str(text).context(expected)?;
        ensure!(schema == SCHEMA, "it is of schema {schema}, and this eniup reads schema {SCHEMA}");
        serde_json::from_str(text).context(expected)
    }

    pub fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// # Errors
    /// [`NoMetadata`].
    pub fn tree(&self) -> Result<Tree, NoMetadata> {
        match &self.metadata_error {
            Some(why) => Err(NoMetadata(why.clone())),
            None => Ok(self.metadata.tree()),
        }
    }

    /// What the kernel has, as eniup takes it on the machine itself.
    pub fn observed(&self, mark: u8) -> Observed {
        self.ledger.clone().of_machine(&self.observed).recall(self.observed.clone(), mark)
    }

    /// The configuration's.
    pub fn configuration_files(&self) -> Vec<File> {
        let file = |saved: &SavedFile| {
            let SavedFile { name, text, error } = saved;
            File { name: name.clone(), text: text.clone().ok_or_else(|| error.clone().unwrap_or_default()) }
        };
        self.configuration.iter().map(file).collect()
    }

    /// The same with other public addresses and account numbers. What was one address is one address, what lay in one IPv6
    /// network lies in one, and nothing that routing depends on is changed. Public IPv4 networks in routes stay.
    ///
    /// # Errors
    /// None that is known: what was written as JSON can be read.
    pub fn redacted(&self) -> Result<Snapshot> {
        let mut value = serde_json::to_value(self)?;
        let mut pseudonyms = Pseudonyms::new(self.private_nets(), shortest_ipv6_block(&value));
        pseudonyms.replace(&mut value);
        let snapshot: Snapshot = serde_json::from_value(value)?;
        Ok(Snapshot { is_redacted: true, ..snapshot })
    }

    /// A VPC may have any addresses; what is in one is private.
    fn private_nets(&self) -> Vec<Ipv4Net> {
        let keys = ["subnet-ipv4-cidr-block", "vpc-ipv4-cidr-block", "vpc-ipv4-cidr-blocks"];
        let is_net = |path: &&String| keys.iter().any(|key| path.ends_with(&format!("/{key}")));
        let leaves = &self.metadata.leaves;
        let bodies = leaves.keys().filter(is_net).map(|path| &leaves[path]);
        bodies.flat_map(|body| lines(body)).filter_map(|line| line.parse().ok()).collect()
    }
}

/// For documentation: RFC 5737; and for more than 768 addresses those for measurements, RFC 2544.
const IPV4_PLACEHOLDERS: [(Ipv4Addr, u32); 4] = [
    (Ipv4Addr::new(192, 0, 2, 0), 256),
    (Ipv4Addr::new(198, 51, 100, 0), 256),
    (Ipv4Addr::new(203, 0, 113, 0), 256),
    (Ipv4Addr::new(198, 18, 0, 0), 1 << 17),
];

/// For documentation: RFC 9637, a /20.
const IPV6_PLACEHOLDERS: Ipv6Addr = Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0);

/// The lengths of IPv6 networks that are replaced as a whole: a longer one keeps its place in such a network. No VPC has a
/// shorter one, and shorter ones say nothing of anybody.
const IPV6_BLOCKS: std::ops::RangeInclusive<u8> = 32..=48;

/// What stands for what. The n-th that is met gets the n-th placeholder.
struct Pseudonyms {
    private: Vec<Ipv4Net>,
    /// Bits of an IPv6 address that are replaced.
    block: u8,
    ipv4s: BTreeMap<Ipv4Addr, Ipv4Addr>,
    ipv6_blocks: BTreeMap<u128, u128>,
    accounts: BTreeMap<String, String>,
}

impl Pseudonyms {
    fn new(private: Vec<Ipv4Net>, block: u8) -> Pseudonyms {
        let (ipv4s, ipv6_blocks, accounts) = Default::default();
        Pseudonyms { private, block, ipv4s, ipv6_blocks, accounts }
    }

    /// In every text, names of keys included.
    fn replace(&mut self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.text(text),
            Value::Array(values) => values.iter_mut().for_each(|value| self.replace(value)),
            Value::Object(map) => {
                let replaced = std::mem::take(map).into_iter().map(|(key, mut value)| {
                    self.replace(&mut value);
                    (self.text(&key), value)
                });
                *map = replaced.collect();
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    fn text(&mut self, text: &str) -> String {
        words(text).map(|word| if word.is_name { self.word(&word) } else { word.text.into() }).collect()
    }

    fn word(&mut self, word: &Word) -> String {
        let Word { text, length, .. } = *word;
        if let Ok(address) = text.parse() {
            return self.address(address, length).unwrap_or_else(|| text.into());
        }
        // The end of a sentence, a port behind an address, or fields of an ARN.
        match (text.strip_suffix(['.', ':']), text.chars().last()) {
            (Some(text), Some(end)) => format!("{}{end}", self.word(&Word { text, ..*word })),
            _ => text.split(':').map(|part| self.part(part, length)).collect::<Vec<_>>().join(":"),
        }
    }

    fn part(&mut self, text: &str, length: Option<u8>) -> String {
        let is_account = text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_digit());
        match text.parse::<Ipv4Addr>() {
            Ok(address) => self.address(address.into(), length).unwrap_or_else(|| text.into()),
            Err(_) if is_account => {
                let next = format!("{:012}", self.accounts.len() + 1);
                self.accounts.entry(text.into()).or_insert(next).clone()
            }
            Err(_) => text.into(),
        }
    }

    /// None: it stays.
    fn address(&mut self, address: IpAddr, length: Option<u8>) -> Option<String> {
        if let IpAddr::V6(address) = address
            && let Some(mapped) = address.to_ipv4_mapped()
        {
            return Some(format!("::ffff:{}", self.address(mapped.into(), None)?));
        }
        match address {
            IpAddr::V4(address) if self.is_public(address) => {
                let is_network = |length| Ipv4Net::new(address, length).is_ok_and(|net| net.network() == address);
                if length.is_some_and(|length| length < 32 && is_network(length)) {
                    return None;
                }
                let next = nth_ipv4(self.ipv4s.len());
                Some(self.ipv4s.entry(address).or_insert(next).to_string())
            }
            IpAddr::V6(address) if is_public_ipv6(address) && length.is_none_or(|length| length >= self.block) => {
                let shift = 128 - u32::from(self.block);
                let block = u128::from(address) >> shift;
                let next = u128::from(IPV6_PLACEHOLDERS) >> shift | self.ipv6_blocks.len() as u128;
                let placeholder = *self.ipv6_blocks.entry(block).or_insert(next) << shift;
                let rest = u128::from(address) & !(u128::MAX << shift);
                Some(Ipv6Addr::from(placeholder | rest).to_string())
            }
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        }
    }

    fn is_public(&self, address: Ipv4Addr) -> bool {
        let [first, second, ..] = address.octets();
        let is_shared = first == 100 && second & 0xc0 == 64;
        let is_special = first == 0 || first >= 224 || address.is_loopback() || address.is_link_local();
        let is_inside = self.private.iter().any(|net| net.contains(&address));
        !(address.is_private() || is_shared || is_special || is_inside)
    }
}

/// Global unicast.
fn is_public_ipv6(address: Ipv6Addr) -> bool {
    address.segments()[0] & 0xe000 == 0x2000
}

fn nth_ipv4(n: usize) -> Ipv4Addr {
    let mut n = u32::try_from(n).unwrap_or(u32::MAX);
    for (first, count) in IPV4_PLACEHOLDERS {
        if n < count {
            return Ipv4Addr::from(u32::from(first) + n);
        }
        n -= count;
    }
    // More than anybody has: these share one.
    IPV4_PLACEHOLDERS[0].0
}

/// The length of the shortest public IPv6 network that is mentioned, within [`IPV6_BLOCKS`].
fn shortest_ipv6_block(value: &Value) -> u8 {
    let longest = *IPV6_BLOCKS.end();
    let of_all = |values: &mut dyn Iterator<Item = &Value>| values.map(shortest_ipv6_block).min().unwrap_or(longest);
    match value {
        Value::String(text) => {
            let nets = words(text).filter_map(|word| IpNet::new(word.text.parse().ok()?, word.length?).ok());
            let is_public = |net: &IpNet| matches!(net.addr(), IpAddr::V6(address) if is_public_ipv6(address));
            let lengths = nets.filter(is_public).map(|net| net.prefix_len());
            lengths.filter(|length| IPV6_BLOCKS.contains(length)).min().unwrap_or(longest)
        }
        Value::Array(values) => of_all(&mut values.iter()),
        Value::Object(map) => of_all(&mut map.values()),
        Value::Null | Value::Bool(_) | Value::Number(_) => longest,
    }
}

/// A piece of a text: something that can be an address or a number, or what is between.
struct Word<'a> {
    text: &'a str,
    is_name: bool,
    /// Of the network that it is of, where `/24` or the like follows.
    length: Option<u8>,
}

/// The whole text in pieces.
fn words(text: &str) -> impl Iterator<Item = Word<'_>> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == ':';
    let mut rest = text;
    std::iter::from_fn(move || {
        let is_name = rest.chars().next().map(is_part)?;
        let end = rest.find(|c| is_part(c) != is_name).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        rest = after;
        let digits = after.strip_prefix('/').map(|after| after.split(|c: char| !c.is_ascii_digit()).next());
        Some(Word { text: word, is_name, length: digits.flatten().and_then(|digits| digits.parse().ok()) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redact(text: &str) -> String {
        let private = vec!["11.0.0.0/16".parse().unwrap()];
        Pseudonyms::new(private, shortest_ipv6_block(&Value::String(text.into()))).text(text)
    }

    #[test]
    fn public_addresses_and_accounts_have_one_placeholder_each() {
        for (text, expected) in [
            ("54.1.2.3", "192.0.2.0"),
            ("54.1.2.3 and 54.1.2.4, not 54.1.2.3.", "192.0.2.0 and 192.0.2.1, not 192.0.2.0."),
            ("ipv4-associations/54.1.2.3", "ipv4-associations/192.0.2.0"),
            (
                "54.1.2.3/32 54.1.2.3/24 54.1.2.3:80 dev=54.1.2.3",
                "192.0.2.0/32 192.0.2.0/24 192.0.2.0:80 dev=192.0.2.0",
            ),
            ("arn:aws:iam::123456789012:role/a 123456789012", "arn:aws:iam::000000000001:role/a 000000000001"),
            ("2600:1f16:67f:f201::14/128", "3fff:0:0:f201::14/128"),
            ("2600:1f16:67f:f201:0:0:0:0/64 2600:1f16:67f:f201::14", "3fff:0:0:f201::/64 3fff:0:0:f201::14"),
            ("2600:1f16:67f::1 2a05:d018:1:2::1", "3fff::1 3fff:0:1:2::1"),
            ("2600:1f10::/44 2600:1f10:f::1 2600:1f11::1", "3fff::/44 3fff:0:f::1 3fff:0:10::1"),
            ("http://[2600:1f16:67f::1]:80/", "http://[3fff::1]:80/"),
            ("::ffff:54.1.2.3 54.1.2.3", "::ffff:192.0.2.0 192.0.2.0"),
        ] {
            assert_eq!(redact(text), expected);
        }
    }

    #[test]
    fn all_else_stays() {
        for text in [
            "10.0.1.20 172.31.0.1/16 192.168.0.1 100.64.0.1 169.254.169.254 127.0.0.1 0.0.0.0/0 255.255.255.255 11.0.3.4",
            "0.0.0.0/1 128.0.0.0/1 52.94.0.0/22 224.0.0.0/4",
            "fe80:ec2::1 fd00:ec2::254 ::1 ::/0 ::ffff:10.0.1.20 2000::/3 ff02::1 02:00:00:00:00:01 02:00:00:ff:fe:00:00:01",
            "eni-00123456789012abc 1234567890123 ens5: 12:30:45 1.2.3 6.18.5-amd64 a..b :: . :",
            "",
        ] {
            assert_eq!(redact(text), text);
        }
    }

    #[test]
    fn no_two_addresses_share_a_placeholder() {
        let all: std::collections::BTreeSet<Ipv4Addr> = (0..100_000).map(nth_ipv4).collect();
        assert_eq!(all.len(), 100_000);
    }
}
