//! Files by which a machine tells who else configures its network, and what the kernel tells in files alone: which are
//! looked at, and what was found. Reading them is for `machine_files`, what they mean for `doctor`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A pattern (`*` is any name) and what is kept of the text: the lines with this word, or only that the file is there.
/// Nothing more is read into a snapshot, since others keep secrets in such files.
pub struct Wanted {
    pub pattern: &'static str,
    pub word: Option<&'static str>,
}

const fn lines(pattern: &'static str, word: &'static str) -> Wanted {
    Wanted { pattern, word: Some(word) }
}

const fn text(pattern: &'static str) -> Wanted {
    lines(pattern, "")
}

const fn presence(pattern: &'static str) -> Wanted {
    Wanted { pattern, word: None }
}

const WANTED: [Wanted; 29] = [
    text("/proc/sys/net/ipv4/ip_forward"),
    text("/proc/sys/net/ipv6/conf/all/forwarding"),
    text("/proc/sys/net/ipv4/conf/*/rp_filter"),
    lines("/proc/self/net/netstat", "TcpExt:"),
    // systemd-networkd: the state of each link by index, and networkd.conf(5) with its drop-ins.
    lines("/run/systemd/netif/links/*", "ADMIN_STATE="),
    lines("/etc/systemd/networkd.conf", "ManageForeign"),
    lines("/usr/lib/systemd/networkd.conf.d/*.conf", "ManageForeign"),
    lines("/usr/local/lib/systemd/networkd.conf.d/*.conf", "ManageForeign"),
    lines("/run/systemd/networkd.conf.d/*.conf", "ManageForeign"),
    lines("/etc/systemd/networkd.conf.d/*.conf", "ManageForeign"),
    // NetworkManager: the state of each link by index.
    lines("/run/NetworkManager/devices/*", "managed="),
    // ifupdown, and ifupdown-ng as Alpine has it: the links that they have brought up.
    text("/run/network/ifstate"),
    text("/run/ifstate"),
    // dhcpcd: of all links, or of one (dhcpcd 9 has a folder, older ones dhcpcd-eth0.pid).
    presence("/run/dhcpcd/pid"),
    presence("/run/dhcpcd.pid"),
    presence("/run/dhcpcd/*.pid"),
    presence("/run/dhcpcd-*.pid"),
    // amazon-ec2-net-utils 2, and 1 as Amazon Linux 2 has it.
    presence("/usr/lib/udev/rules.d/99-vpc-policy-routes.rules"),
    presence("/etc/udev/rules.d/99-vpc-policy-routes.rules"),
    presence("/etc/udev/rules.d/53-ec2-network-interfaces.rules"),
    // nm-cloud-setup: enabled when one of these links is there, and by this variable for EC2.
    presence("/etc/systemd/system/*.wants/nm-cloud-setup.*"),
    presence("/etc/systemd/system/nm-cloud-setup.*"),
    lines("/usr/lib/systemd/system/nm-cloud-setup.service.d/*.conf", "NM_CLOUD_SETUP_EC2"),
    lines("/etc/systemd/system/nm-cloud-setup.service.d/*.conf", "NM_CLOUD_SETUP_EC2"),
    // cloud-init writes its rule when hotplug is enabled, and only then (cloudinit/config/cc_install_hotplug.py); older
    // versions by the first name.
    presence("/etc/udev/rules.d/10-cloud-init-hook-hotplug.rules"),
    presence("/etc/udev/rules.d/90-cloud-init-hook-hotplug.rules"),
    // SUSE's cloud-netconfig.
    presence("/usr/lib/udev/rules.d/51-cloud-netconfig-hotplug.rules"),
    presence("/etc/udev/rules.d/51-cloud-netconfig-hotplug.rules"),
    presence("/etc/systemd/system/*.wants/cloud-netconfig.timer"),
];

/// Of container networks that configure ENIs: by the file that the kubelet reads, which comes when the network is ready; by
/// what is there before that; and ECS by its agent's configuration.
const OF_CONTAINER_NETWORKS: [Wanted; 5] = [
    presence("/etc/cni/net.d/10-aws.conflist"),
    presence("/opt/cni/bin/aws-cni"),
    presence("/etc/eks"),
    presence("/etc/cni/net.d/05-cilium.conflist"),
    presence("/etc/ecs/ecs.config"),
];

/// Those that a run looks at.
pub fn of_container_networks() -> impl Iterator<Item = &'static Wanted> {
    OF_CONTAINER_NETWORKS.iter()
}

/// All.
pub fn wanted() -> impl Iterator<Item = &'static Wanted> {
    WANTED.iter().chain(&OF_CONTAINER_NETWORKS)
}

/// What is at a path.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Found {
    There,
    /// As much of it as is wanted.
    Text(String),
    /// A link to /dev/null: so systemd and udev are told that a file of this name in another folder does not count.
    Masked,
    /// Why not.
    Unreadable(String),
}

/// By path; what is not there is not in it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Files(pub BTreeMap<String, Found>);

impl Files {
    /// Whether it is there and counts.
    pub fn has(&self, path: &str) -> bool {
        matches!(self.0.get(path), Some(Found::There | Found::Text(_)))
    }

    pub fn is_masked(&self, path: &str) -> bool {
        self.0.get(path) == Some(&Found::Masked)
    }

    pub fn text(&self, path: &str) -> Option<&str> {
        match self.0.get(path)? {
            Found::Text(text) => Some(text),
            Found::There | Found::Masked | Found::Unreadable(_) => None,
        }
    }

    /// The number that a file holds.
    pub fn number(&self, path: &str) -> Option<i64> {
        self.text(path)?.trim().parse().ok()
    }

    /// The texts in a folder, by name.
    pub fn texts_in<'a>(&'a self, folder: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.paths_in(folder).filter_map(|(name, found)| match found {
            Found::Text(text) => Some((name, text.as_str())),
            Found::There | Found::Masked | Found::Unreadable(_) => None,
        })
    }

    /// What is in a folder, by name.
    pub fn paths_in<'a>(&'a self, folder: &'a str) -> impl Iterator<Item = (&'a str, &'a Found)> {
        let inside =
            move |path: &'a str| path.strip_prefix(folder)?.strip_prefix('/').filter(|name| !name.contains('/'));
        self.0.iter().filter_map(move |(path, found)| Some((inside(path)?, found)))
    }

    /// The first that is there and counts of those that match a pattern.
    pub fn first(&self, pattern: &str) -> Option<&str> {
        let pattern = glob::Pattern::new(pattern).ok()?;
        let is_it = |path: &&String| pattern.matches(path) && self.has(path);
        self.0.keys().find(is_it).map(String::as_str)
    }

    /// A counter of the kernel's, as `/proc/net/netstat` has them: a line of names and one of numbers for each group.
    pub fn counter(&self, group: &str, name: &str) -> Option<u64> {
        let prefix = format!("{group}:");
        let mut lines = self.text("/proc/self/net/netstat")?.lines().filter_map(|line| line.strip_prefix(&prefix));
        let (names, numbers) = (lines.next()?.split_whitespace(), lines.next()?.split_whitespace());
        names.zip(numbers).find(|(candidate, _)| *candidate == name)?.1.parse().ok()
    }
}
