//! What the metadata service knows: EC2's truth about one instance rendered into the tree below `/latest/meta-data/`, and
//! how that tree lags behind the truth. It leaves HTTP to `imds`; here nothing is read but the arguments and, in the
//! wrappers without `_at`, the clock.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use ipnet::{Ipv4Net, Ipv6Net};

const MACS: &str = "network/interfaces/macs/";
const DEVICE_NUMBER: &str = "device-number";

/// One instance as EC2's API would describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceView {
    pub instance_id: String,
    pub instance_type: String,
    pub primary_mac: String,
    pub availability_zone: String,
    pub enis: Vec<EniView>,
}

/// One attached ENI. Empty lists and `None` are keys that answer 404.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EniView {
    pub mac: String,
    pub interface_id: String,
    pub device_number: u32,
    /// `None` on machine types with one card, where EC2 has no such key.
    pub network_card: Option<u32>,
    pub owner_id: String,
    pub subnet_id: String,
    pub vpc_id: String,
    /// Primary address first.
    pub local_ipv4s: Vec<Ipv4Addr>,
    pub ipv6s: Vec<Ipv6Addr>,
    pub ipv4_prefixes: Vec<Ipv4Net>,
    pub ipv6_prefixes: Vec<Ipv6Net>,
    pub subnet_ipv4_cidr: Option<Ipv4Net>,
    pub subnet_ipv6_cidrs: Vec<Ipv6Net>,
    pub vpc_ipv4_cidrs: Vec<Ipv4Net>,
    pub vpc_ipv6_cidrs: Vec<Ipv6Net>,
    /// Public address, private address.
    pub associations: Vec<(Ipv4Addr, Ipv4Addr)>,
    /// Name, id.
    pub security_groups: Vec<(String, String)>,
}

/// What a path reads at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Value(String),
    /// The entries of a directory; those that are directories themselves end in `/`.
    Listing(Vec<String>),
    NotFound,
}

/// How far the service lags behind. The default is not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Propagation {
    /// From the change of a key (also its disappearance) until it can be read.
    pub delay: Duration,
    /// Other delays, by key name below the MAC (`device-number`, `ipv4-associations`), by top-level path
    /// (`placement/region`), or by a glob on the whole path (`*/06:00:*/local-ipv4s`). A name wins over a glob.
    pub overrides: BTreeMap<String, Duration>,
    /// From attachment until the MAC is listed; its keys have delays of their own.
    pub listing_entry: Duration,
    /// How long a detached MAC stays listed after its last key went 404.
    pub detach_lag: Duration,
    /// `device-number` of a listed MAC reads `0` until it has propagated (amazon-ec2-net-utils waits for that to pass).
    /// Otherwise it is 404, like any other key.
    pub zero_device_number_first: bool,
}

/// The tree as the service publishes it, some of it still on its way.
#[derive(Clone, Debug, Default)]
pub struct Published {
    leaves: BTreeMap<String, Timeline>,
    /// Which MACs `macs/` lists, by path without the trailing `/`.
    listed_macs: BTreeMap<String, Timeline>,
    /// Listings of a recorded tree, by path with the trailing `/`; they win over what the leaves say.
    fixed_listings: BTreeMap<String, Vec<String>>,
    propagation: Propagation,
    holds: Vec<Hold>,
}

impl Default for Propagation {
    fn default() -> Propagation {
        Propagation {
            delay: Duration::ZERO,
            overrides: BTreeMap::new(),
            listing_entry: Duration::ZERO,
            detach_lag: Duration::ZERO,
            zero_device_number_first: true,
        }
    }
}

impl Propagation {
    fn of(&self, path: &str) -> Duration {
        let by_name = self.overrides.get(key_name(path));
        let by_glob = || self.overrides.iter().find(|(pattern, _)| glob(pattern, path)).map(|(_, delay)| delay);
        by_name.or_else(by_glob).copied().unwrap_or(self.delay)
    }
}

impl Published {
    pub fn new() -> Published {
        Published::default()
    }

    /// A tree that never changes. `leaves` and `listings` have paths below `/latest/meta-data/`; a directory without a
    /// listing of its own lists what is below it.
    pub fn raw(leaves: BTreeMap<String, String>, listings: BTreeMap<String, String>) -> Published {
        let mut published = Published::new();
        for (path, value) in leaves {
            let path = path.trim_matches('/').to_string();
            if let Some(mac_directory) = mac_directory(&path) {
                published.listed_macs.insert(mac_directory.to_string(), Timeline::always(String::new()));
            }
            published.leaves.insert(path, Timeline::always(value));
        }
        for (path, text) in listings {
            let entries = text.lines().filter(|line| !line.is_empty()).map(str::to_string).collect();
            published.fixed_listings.insert(directory(&path), entries);
        }
        published
    }

    /// Applies to what is published from here on; what is on its way keeps its time.
    pub fn set_propagation(&mut self, propagation: Propagation) {
        self.propagation = propagation;
    }

    /// Makes `view` the truth. Each key that differs is to be read after its delay; see [`Propagation`].
    pub fn publish(&mut self, view: &InstanceView) {
        self.publish_at(view, Instant::now());
    }

    /// As [`Self::publish`], everything at once except what is held: an instance at launch finds its metadata ready.
    pub fn publish_without_delay(&mut self, view: &InstanceView) {
        let propagation =
            Propagation { zero_device_number_first: self.propagation.zero_device_number_first, ..Default::default() };
        let propagation = std::mem::replace(&mut self.propagation, propagation);
        self.publish(view);
        self.propagation = propagation;
    }

    pub fn publish_at(&mut self, view: &InstanceView, now: Instant) {
        self.settle(now);
        let truth = render(view);
        let paths: BTreeSet<String> = self.leaves.keys().chain(truth.keys()).cloned().collect();
        for path in paths {
            let due = now + self.propagation.of(&path);
            let is_held = self.is_held(&path);
            let timeline = self.leaves.entry(path.clone()).or_default();
            timeline.head_for(truth.get(&path).cloned(), due, is_held);
        }
        self.publish_listed_macs(view, now);
    }

    fn publish_listed_macs(&mut self, view: &InstanceView, now: Instant) {
        let truth: BTreeSet<String> = view.enis.iter().map(|eni| format!("{MACS}{}", eni.mac.to_lowercase())).collect();
        let paths: BTreeSet<String> = self.listed_macs.keys().chain(truth.iter()).cloned().collect();
        for path in paths {
            let is_attached = truth.contains(&path);
            let last_key_gone = self.below(&directory(&path)).map(|(leaf, _)| self.propagation.of(leaf)).max();
            let delay = if is_attached {
                self.propagation.listing_entry
            } else {
                last_key_gone.unwrap_or_default() + self.propagation.detach_lag
            };
            let is_held = self.is_held(&path);
            let timeline = self.listed_macs.entry(path).or_default();
            timeline.head_for(is_attached.then(String::new), now + delay, is_held);
        }
    }

    /// Keys whose path matches the glob keep what they read now until [`Self::release`]; also what is on its way to them
    /// waits. A new key stays 404, a new `device-number` reads `0`. A MAC's place in the listing has the path
    /// `network/interfaces/macs/<mac>`: `*/<mac>/*` holds its keys alone, `*<mac>*` the listing too.
    pub fn hold(&mut self, pattern: &str) {
        self.hold_at(pattern, Instant::now());
    }

    pub fn hold_at(&mut self, pattern: &str, now: Instant) {
        self.settle(now);
        self.set_hold(pattern, true);
        for (_, timeline) in self.leaves.iter_mut().chain(&mut self.listed_macs).filter(|(path, _)| glob(pattern, path))
        {
            timeline.stop();
        }
    }

    /// What the glob matches is up to date at once, whichever pattern held it; so a directory can be held and its keys
    /// released one by one. `*` releases everything.
    pub fn release(&mut self, pattern: &str) {
        self.release_at(pattern, Instant::now());
    }

    pub fn release_at(&mut self, pattern: &str, now: Instant) {
        self.settle(now);
        self.set_hold(pattern, false);
        for (_, timeline) in self.leaves.iter_mut().chain(&mut self.listed_macs).filter(|(path, _)| glob(pattern, path))
        {
            timeline.go_on(now);
        }
    }

    /// `path` is below `/latest/meta-data/`. A directory answers with and without its trailing `/`; one in which nothing
    /// can be read is `NotFound`, even while its parent lists it.
    pub fn get(&self, path: &str, now: Instant) -> Answer {
        let path = path.strip_prefix('/').unwrap_or(path);
        if let Some(value) = self.leaves.get(path).and_then(|timeline| self.value(path, timeline, now)) {
            return Answer::Value(value.to_string());
        }
        match self.listing(&directory(path), now) {
            entries if entries.is_empty() => Answer::NotFound,
            entries => Answer::Listing(entries),
        }
    }

    fn listing(&self, directory: &str, now: Instant) -> Vec<String> {
        if let Some(entries) = self.fixed_listings.get(directory) {
            return entries.clone();
        }
        // A MAC is listed when its own time has come, whether or not its keys can be read.
        let is_above_macs = MACS.starts_with(directory);
        let keys = self
            .below(directory)
            .filter(|(path, _)| !(is_above_macs && path.starts_with(MACS)))
            .filter(|(path, timeline)| self.value(path, timeline, now).is_some())
            .map(|(path, _)| path.to_string());
        let macs = self.listed_macs.iter().filter(|(_, timeline)| timeline.at(now).is_some());
        let directories = macs.map(|(path, _)| format!("{path}/")).chain(self.fixed_listings.keys().cloned());
        let entries: BTreeSet<String> = keys
            .chain(directories)
            .filter_map(|path| path.strip_prefix(directory).and_then(first_component).map(str::to_string))
            .collect();
        entries.into_iter().collect()
    }

    fn value<'a>(&'a self, path: &str, timeline: &'a Timeline, now: Instant) -> Option<&'a str> {
        timeline.at(now).or_else(|| {
            let mac_directory = mac_directory(path)?;
            let reads_zero = self.propagation.zero_device_number_first
                && key_name(path) == DEVICE_NUMBER
                && timeline.destination().is_some()
                && self.listed_macs.get(mac_directory).is_some_and(|listed| listed.at(now).is_some());
            reads_zero.then_some("0")
        })
    }

    fn below<'a>(&'a self, directory: &'a str) -> impl Iterator<Item = (&'a str, &'a Timeline)> {
        let from_here = self.leaves.range::<str, _>((std::ops::Bound::Included(directory), std::ops::Bound::Unbounded));
        from_here
            .map(|(path, timeline)| (path.as_str(), timeline))
            .take_while(move |(path, _)| path.starts_with(directory))
    }

    fn is_held(&self, path: &str) -> bool {
        self.holds.iter().rev().find(|hold| glob(&hold.pattern, path)).is_some_and(|hold| hold.is_held)
    }

    fn set_hold(&mut self, pattern: &str, is_held: bool) {
        // Whatever an earlier pattern says about these paths, the later one overrules; a pattern it covers is of no more use.
        self.holds.retain(|hold| !glob(pattern, &hold.pattern));
        self.holds.push(Hold { pattern: pattern.to_string(), is_held });
    }

    fn settle(&mut self, now: Instant) {
        for timelines in [&mut self.leaves, &mut self.listed_macs] {
            timelines.values_mut().for_each(|timeline| timeline.settle(now));
            timelines.retain(|_, timeline| *timeline != Timeline::default());
        }
    }
}

#[derive(Clone, Debug)]
struct Hold {
    pattern: String,
    is_held: bool,
}

/// What one path reads and will read; `None` is 404.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Timeline {
    shown: Option<String>,
    /// In order of time.
    coming: Vec<(Instant, Option<String>)>,
    /// Where a held path would be by now.
    held: Option<Option<String>>,
}

impl Timeline {
    fn always(value: String) -> Timeline {
        Timeline { shown: Some(value), ..Timeline::default() }
    }

    fn at(&self, now: Instant) -> Option<&str> {
        let arrived = self.coming.iter().rev().find(|(due, _)| *due <= now);
        arrived.map_or(self.shown.as_deref(), |(_, value)| value.as_deref())
    }

    fn destination(&self) -> Option<&str> {
        let last_coming = || self.coming.last().map_or(self.shown.as_deref(), |(_, value)| value.as_deref());
        self.held.as_ref().map_or_else(last_coming, |value| value.as_deref())
    }

    fn head_for(&mut self, value: Option<String>, due: Instant, is_held: bool) {
        if self.destination() == value.as_deref() {
            return;
        }
        if is_held {
            self.held = Some(value);
            return;
        }
        // Never may an older truth arrive after a newer one.
        self.coming.retain(|(older, _)| *older < due);
        self.coming.push((due, value));
    }

    fn settle(&mut self, now: Instant) {
        let arrived = self.coming.partition_point(|(due, _)| *due <= now);
        if let Some((_, value)) = self.coming.drain(..arrived).next_back() {
            self.shown = value;
        }
    }

    fn stop(&mut self) {
        if let Some((_, value)) = self.coming.drain(..).next_back() {
            self.held = Some(value);
        }
    }

    fn go_on(&mut self, now: Instant) {
        if let Some(value) = self.held.take() {
            self.coming.push((now, value));
        }
    }
}

/// EC2's truth as paths and values, all of it propagated.
pub fn render(view: &InstanceView) -> BTreeMap<String, String> {
    let InstanceView { instance_id, instance_type, primary_mac, availability_zone, enis } = view;
    let region = region(availability_zone);
    let primary = enis.iter().find(|eni| eni.mac.eq_ignore_ascii_case(primary_mac));
    let hostname = local_hostname(primary, instance_id, region);
    let mut tree = BTreeMap::new();
    let mut put = |path: &str, value: String| {
        if !value.is_empty() {
            tree.insert(path.to_string(), value);
        }
    };

    put("ami-id", "ami-0123456789abcdef0".to_string());
    put("hostname", hostname.clone());
    put("instance-id", instance_id.clone());
    put("instance-type", instance_type.clone());
    put("local-hostname", hostname);
    put("mac", primary_mac.to_lowercase());
    put("placement/availability-zone", availability_zone.clone());
    put("placement/region", region.to_string());
    put("reservation-id", format!("r-{}", instance_id.trim_start_matches("i-")));
    put("services/domain", if region.starts_with("cn-") { "amazonaws.com.cn" } else { "amazonaws.com" }.to_string());
    put("services/partition", partition(region).to_string());
    if let Some(primary) = primary {
        put("ipv6", lines(primary.ipv6s.iter().take(1)));
        put("local-ipv4", lines(primary.local_ipv4s.iter().take(1)));
        put("public-ipv4", lines(public_of_primary_address(primary)));
        put("security-groups", lines(primary.security_groups.iter().map(|(name, _)| name)));
    }
    for eni in enis {
        for (key, value) in render_eni(eni, instance_id, region) {
            put(&format!("{MACS}{}/{key}", eni.mac.to_lowercase()), value);
        }
    }
    tree
}

fn render_eni(eni: &EniView, instance_id: &str, region: &str) -> Vec<(String, String)> {
    let hostname = local_hostname(Some(eni), instance_id, region);
    let EniView {
        mac,
        interface_id,
        device_number,
        network_card,
        owner_id,
        subnet_id,
        vpc_id,
        local_ipv4s,
        ipv6s,
        ipv4_prefixes,
        ipv6_prefixes,
        subnet_ipv4_cidr,
        subnet_ipv6_cidrs,
        vpc_ipv4_cidrs,
        vpc_ipv6_cidrs,
        associations,
        security_groups,
    } = eni;
    let keys = [
        (DEVICE_NUMBER, device_number.to_string()),
        ("interface-id", interface_id.clone()),
        ("ipv4-prefix", lines(ipv4_prefixes)),
        ("ipv6-prefix", lines(ipv6_prefixes)),
        ("ipv6s", lines(ipv6s)),
        ("local-hostname", hostname),
        ("local-ipv4s", lines(local_ipv4s)),
        ("mac", mac.to_lowercase()),
        ("network-card", lines(network_card)),
        ("owner-id", owner_id.clone()),
        ("public-ipv4s", lines(associations.iter().map(|(public, _)| public))),
        ("security-group-ids", lines(security_groups.iter().map(|(_, id)| id))),
        ("security-groups", lines(security_groups.iter().map(|(name, _)| name))),
        ("subnet-id", subnet_id.clone()),
        ("subnet-ipv4-cidr-block", lines(subnet_ipv4_cidr)),
        ("subnet-ipv6-cidr-blocks", lines(subnet_ipv6_cidrs.iter().map(uncompressed))),
        ("vpc-id", vpc_id.clone()),
        ("vpc-ipv4-cidr-block", lines(vpc_ipv4_cidrs.iter().take(1))),
        ("vpc-ipv4-cidr-blocks", lines(vpc_ipv4_cidrs)),
        ("vpc-ipv6-cidr-blocks", lines(vpc_ipv6_cidrs.iter().map(uncompressed))),
    ];
    let associations =
        associations.iter().map(|(public, private)| (format!("ipv4-associations/{public}"), private.to_string()));
    keys.into_iter().map(|(key, value)| (key.to_string(), value)).chain(associations).collect()
}

fn lines<T: ToString>(values: impl IntoIterator<Item = T>) -> String {
    values.into_iter().map(|value| value.to_string()).collect::<Vec<_>>().join("\n")
}

/// EC2 writes the blocks of a subnet and VPC with every group, `2600:1f16:67f:f201:0:0:0:0/64`.
fn uncompressed(cidr: &Ipv6Net) -> String {
    let groups = cidr.addr().segments().map(|group| format!("{group:x}"));
    format!("{}/{}", groups.join(":"), cidr.prefix_len())
}

fn public_of_primary_address(eni: &EniView) -> Option<&Ipv4Addr> {
    let primary_address = eni.local_ipv4s.first()?;
    eni.associations.iter().find(|(_, private)| private == primary_address).map(|(public, _)| public)
}

/// An ENI without an IPv4 address has no address to be named after; EC2 names by resource then.
fn local_hostname(eni: Option<&EniView>, instance_id: &str, region: &str) -> String {
    let domain = if region == "us-east-1" { "ec2.internal".to_string() } else { format!("{region}.compute.internal") };
    let address = eni.and_then(|eni| eni.local_ipv4s.first());
    let name = address.map_or(instance_id.to_string(), |ipv4| format!("ip-{}", ipv4.to_string().replace('.', "-")));
    format!("{name}.{domain}")
}

/// `us-east-2` of `us-east-2c`, and `us-west-2` of the local zone `us-west-2-lax-1a`: all up to the first number.
fn region(availability_zone: &str) -> &str {
    let Some(number) = availability_zone.find(|character: char| character.is_ascii_digit()) else {
        return availability_zone;
    };
    let after = &availability_zone[number..];
    let length = after.find(|character: char| !character.is_ascii_digit()).unwrap_or(after.len());
    &availability_zone[..number + length]
}

fn partition(region: &str) -> &'static str {
    match region {
        region if region.starts_with("cn-") => "aws-cn",
        region if region.starts_with("us-gov-") => "aws-us-gov",
        _ => "aws",
    }
}

/// The path of a directory as listings write it: no `/` before, one behind, nothing at all for the top.
fn directory(path: &str) -> String {
    let path = path.trim_matches('/');
    if path.is_empty() { String::new() } else { format!("{path}/") }
}

/// `network/interfaces/macs/<mac>` of a path below it.
fn mac_directory(path: &str) -> Option<&str> {
    let length = path.strip_prefix(MACS)?.find('/')?;
    Some(&path[..MACS.len() + length])
}

/// The key below the MAC, or the whole path of what is not below one.
fn key_name(path: &str) -> &str {
    let Some(mac_directory) = mac_directory(path) else { return path };
    let below = &path[mac_directory.len() + 1..];
    below.split_once('/').map_or(below, |(directory, _)| directory)
}

/// `a` of `a`, `a/` of `a/b/c`.
fn first_component(path: &str) -> Option<&str> {
    let component = path.find('/').map_or(path, |slash| &path[..=slash]);
    (!component.is_empty()).then_some(component)
}

/// Whether `text` is like `pattern`, in which `*` stands for any characters, `/` among them.
pub fn glob(pattern: &str, text: &str) -> bool {
    let Some((before, behind)) = pattern.split_once('*') else { return pattern == text };
    let Some(rest) = text.strip_prefix(before) else { return false };
    let mut ends = rest.char_indices().map(|(index, _)| index).chain([rest.len()]);
    ends.any(|index| glob(behind, &rest[index..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eni_renders_every_key_of_the_table() {
        let tree = render(&dual_stack());
        let below: BTreeMap<&str, &str> = tree
            .iter()
            .filter_map(|(path, value)| {
                Some((path.strip_prefix("network/interfaces/macs/06:00:00:00:00:01/")?, value.as_str()))
            })
            .collect();
        let expected = BTreeMap::from([
            ("device-number", "0"),
            ("interface-id", "eni-1"),
            ("ipv4-associations/18.0.0.1", "10.0.0.5"),
            ("ipv4-associations/18.0.0.2", "10.0.0.6"),
            ("ipv4-prefix", "10.0.1.0/28\n10.0.1.16/28"),
            ("ipv6-prefix", "2600:1f16:67f:f201:1::/80"),
            ("ipv6s", "2600:1f16:67f:f201::5"),
            ("local-hostname", "ip-10-0-0-5.us-east-2.compute.internal"),
            ("local-ipv4s", "10.0.0.5\n10.0.0.6"),
            ("mac", "06:00:00:00:00:01"),
            ("network-card", "1"),
            ("owner-id", "123456789012"),
            ("public-ipv4s", "18.0.0.1\n18.0.0.2"),
            ("security-group-ids", "sg-1\nsg-2"),
            ("security-groups", "web and more\ndefault"),
            ("subnet-id", "subnet-1"),
            ("subnet-ipv4-cidr-block", "10.0.0.0/24"),
            ("subnet-ipv6-cidr-blocks", "2600:1f16:67f:f201:0:0:0:0/64"),
            ("vpc-id", "vpc-1"),
            ("vpc-ipv4-cidr-block", "10.0.0.0/16"),
            ("vpc-ipv4-cidr-blocks", "10.0.0.0/16\n10.1.0.0/16"),
            ("vpc-ipv6-cidr-blocks", "2600:1f16:67f:f200:0:0:0:0/56"),
        ]);
        assert_eq!(below, expected);
    }

    #[test]
    fn the_top_level_speaks_of_the_primary_eni() {
        let mut view = dual_stack();
        view.enis.insert(0, eni(2, 1));
        let tree = render(&view);
        let top: BTreeMap<&str, &str> = tree
            .iter()
            .filter(|(path, _)| !path.starts_with(MACS))
            .map(|(path, value)| (path.as_str(), value.as_str()))
            .collect();
        let expected = BTreeMap::from([
            ("ami-id", "ami-0123456789abcdef0"),
            ("hostname", "ip-10-0-0-5.us-east-2.compute.internal"),
            ("instance-id", "i-0abc"),
            ("instance-type", "m7i.large"),
            ("ipv6", "2600:1f16:67f:f201::5"),
            ("local-hostname", "ip-10-0-0-5.us-east-2.compute.internal"),
            ("local-ipv4", "10.0.0.5"),
            ("mac", "06:00:00:00:00:01"),
            ("placement/availability-zone", "us-east-2c"),
            ("placement/region", "us-east-2"),
            ("public-ipv4", "18.0.0.1"),
            ("reservation-id", "r-0abc"),
            ("security-groups", "web and more\ndefault"),
            ("services/domain", "amazonaws.com"),
            ("services/partition", "aws"),
        ]);
        assert_eq!(top, expected);
    }

    #[test]
    fn an_efa_only_eni_has_a_subnet_and_no_address() {
        let mut view = launched();
        view.enis.push(EniView { local_ipv4s: Vec::new(), ..eni(2, 1) });
        let published = published(&view);
        let now = Instant::now();
        assert_eq!(read(&published, "2/local-ipv4s", now), None);
        assert_eq!(read(&published, "2/ipv6s", now), None);
        assert_eq!(read(&published, "2/subnet-ipv4-cidr-block", now).as_deref(), Some("10.0.0.0/24"));
    }

    #[test]
    fn empty_lists_and_missing_cards_are_not_found() {
        let published = published(&launched());
        for key in [
            "ipv6s",
            "ipv4-prefix",
            "ipv6-prefix",
            "subnet-ipv6-cidr-blocks",
            "public-ipv4s",
            "ipv4-associations/",
            "network-card",
        ] {
            assert_eq!(read(&published, &format!("1/{key}"), Instant::now()), None, "{key}");
        }
    }

    #[test]
    fn listings_name_what_exists_and_mark_directories() {
        let published = published(&dual_stack());
        let now = Instant::now();
        let listing = |path: &str| match published.get(path, now) {
            Answer::Listing(entries) => entries.join(" "),
            answer => panic!("{path}: {answer:?}"),
        };
        assert_eq!(listing("network"), "interfaces/");
        assert_eq!(listing("network/interfaces/"), "macs/");
        assert_eq!(listing("network/interfaces/macs"), "06:00:00:00:00:01/");
        assert_eq!(listing("placement/"), "availability-zone region");
        assert_eq!(listing("network/interfaces/macs/06:00:00:00:00:01/ipv4-associations"), "18.0.0.1 18.0.0.2");
        let eni = listing("network/interfaces/macs/06:00:00:00:00:01");
        assert!(eni.starts_with("device-number interface-id ipv4-associations/ ipv4-prefix"), "{eni}");
        assert!(listing("").starts_with("ami-id hostname instance-id"));
        assert!(listing("").contains("network/ placement/ public-ipv4"));
        for path in ["mac/", "net", "network/interface", "06:00:00:00:00:01"] {
            assert_eq!(published.get(path, now), Answer::NotFound, "{path}");
        }
    }

    #[test]
    fn keys_of_an_attached_eni_come_one_by_one_after_the_listing() {
        let (mut published, start) = (published(&launched()), Instant::now());
        published.set_propagation(Propagation {
            delay: seconds(10),
            overrides: [("device-number", 20), ("*:02/interface-id", 5), ("network-card", 30)]
                .map(|(key, delay)| (key.to_string(), seconds(delay)))
                .into(),
            listing_entry: seconds(2),
            ..Propagation::default()
        });
        let mut view = launched();
        view.enis.push(EniView { network_card: Some(1), ..eni(2, 1) });
        published.publish_at(&view, start);

        let keys = ["", "interface-id", "local-ipv4s", "device-number", "network-card"];
        let at = |time: u64| {
            let now = start + seconds(time);
            let values = keys.map(|key| match key {
                "" => macs(&published, now).len().to_string(),
                key => read(&published, &format!("2/{key}"), now).unwrap_or("-".to_string()),
            });
            values.join(" ")
        };
        assert_eq!(at(0), "1 - - - -");
        assert_eq!(at(2), "2 - - 0 -");
        assert_eq!(at(5), "2 eni-2 - 0 -");
        assert_eq!(at(9), "2 eni-2 - 0 -");
        assert_eq!(at(10), "2 eni-2 10.0.0.2 0 -");
        assert_eq!(at(20), "2 eni-2 10.0.0.2 1 -");
        assert_eq!(at(30), "2 eni-2 10.0.0.2 1 1");
        let listing = published.get(&path("2/"), start + seconds(5));
        assert_eq!(listing, Answer::Listing(vec!["device-number".to_string(), "interface-id".to_string()]));
    }

    #[test]
    fn a_mac_can_be_listed_while_all_its_keys_are_not_found() {
        let (mut published, start) = (published(&launched()), Instant::now());
        published.set_propagation(Propagation {
            delay: seconds(10),
            zero_device_number_first: false,
            ..Propagation::default()
        });
        let mut view = launched();
        view.enis.push(eni(2, 1));
        published.publish_at(&view, start);
        assert_eq!(macs(&published, start), ["06:00:00:00:00:01/", "06:00:00:00:00:02/"]);
        assert_eq!(published.get(&path("2/"), start), Answer::NotFound);
        assert_eq!(published.get(&path("2/device-number"), start), Answer::NotFound);
    }

    #[test]
    fn an_unchanged_key_never_flickers() {
        let (mut published, start) = (published(&dual_stack()), Instant::now());
        let delay = Propagation { delay: seconds(10), listing_entry: seconds(10), ..Propagation::default() };
        published.set_propagation(delay);
        let before: Vec<Answer> = render(&dual_stack()).keys().map(|path| published.get(path, start)).collect();
        let mut view = dual_stack();
        view.enis[0].local_ipv4s.push([10, 0, 0, 7].into());
        published.publish_at(&view, start);
        published.publish_at(&view, start + seconds(9));
        let after: Vec<Answer> =
            render(&dual_stack()).keys().map(|path| published.get(path, start + seconds(9))).collect();
        assert_eq!(before, after);
        let addresses = read(&published, "1/local-ipv4s", start + seconds(10));
        assert_eq!(
            addresses.as_deref(),
            Some("10.0.0.5\n10.0.0.6\n10.0.0.7"),
            "publishing again does not start the delay again"
        );
    }

    #[test]
    fn an_older_truth_never_arrives_after_a_newer_one() {
        let (mut published, start) = (published(&launched()), Instant::now());
        let mut view = launched();
        for (seconds_from_start, delay, address) in [(0, 30, 7), (1, 5, 8)] {
            published.set_propagation(Propagation { delay: seconds(delay), ..Propagation::default() });
            view.enis[0].local_ipv4s = vec![[10, 0, 0, address].into()];
            published.publish_at(&view, start + seconds(seconds_from_start));
        }
        let at = |time| read(&published, "1/local-ipv4s", start + seconds(time)).unwrap();
        assert_eq!([at(5), at(6), at(30), at(90)], ["10.0.0.1", "10.0.0.8", "10.0.0.8", "10.0.0.8"]);
    }

    #[test]
    fn a_detached_mac_stays_listed_while_its_keys_are_gone() {
        let mut view = launched();
        view.enis.push(eni(2, 1));
        let (mut published, start) = (published(&view), Instant::now());
        published.set_propagation(Propagation {
            delay: seconds(3),
            detach_lag: seconds(300),
            ..Propagation::default()
        });
        published.publish_at(&launched(), start);
        let at = |time| {
            let now = start + seconds(time);
            (
                macs(&published, now).len(),
                read(&published, "2/device-number", now),
                published.get(&path("2/"), now) != Answer::NotFound,
            )
        };
        assert_eq!(at(2), (2, Some("1".to_string()), true));
        assert_eq!(at(3), (2, None, false));
        assert_eq!(at(302), (2, None, false));
        assert_eq!(at(303), (1, None, false));
    }

    #[test]
    fn an_eni_attached_again_elsewhere_reads_zero_in_between() {
        let mut view = launched();
        view.enis.push(eni(2, 1));
        let (mut published, start) = (published(&view), Instant::now());
        published.set_propagation(Propagation {
            delay: seconds(10),
            detach_lag: seconds(60),
            ..Propagation::default()
        });
        published.publish_at(&launched(), start);
        view.enis[1].device_number = 2;
        published.publish_at(&view, start + seconds(5));
        let at = |time| read(&published, "2/device-number", start + seconds(time)).unwrap();
        assert_eq!([at(9), at(10), at(14), at(15)], ["1", "0", "0", "2"]);
        assert_eq!(macs(&published, start + seconds(500)).len(), 2, "the old departure is off");
    }

    #[test]
    fn held_keys_wait_for_their_release() {
        let (mut published, start) = (published(&launched()), Instant::now());
        published.hold_at("*/06:00:00:00:00:02/*", start);
        let mut view = launched();
        view.enis.push(eni(2, 1));
        published.publish_at(&view, start);
        let much_later = start + seconds(3600);
        assert_eq!(macs(&published, start).len(), 2, "the listing was not held");
        assert_eq!(read(&published, "2/device-number", much_later).as_deref(), Some("0"));
        assert_eq!(read(&published, "2/local-ipv4s", much_later), None);

        published.release_at("*/06:00:00:00:00:02/local-ipv4s", much_later);
        assert_eq!(read(&published, "2/local-ipv4s", much_later).as_deref(), Some("10.0.0.2"));
        assert_eq!(read(&published, "2/subnet-id", much_later), None);
        published.release_at("*", much_later);
        assert_eq!(read(&published, "2/device-number", much_later).as_deref(), Some("1"));
        assert_eq!(read(&published, "2/subnet-id", much_later).as_deref(), Some("subnet-1"));
    }

    #[test]
    fn a_hold_keeps_the_value_that_reads_and_stops_what_is_on_its_way() {
        let (mut published, start) = (published(&launched()), Instant::now());
        published.set_propagation(Propagation { delay: seconds(10), ..Propagation::default() });
        let mut view = launched();
        view.enis[0].local_ipv4s.push([10, 0, 0, 7].into());
        published.publish_at(&view, start);
        published.hold_at("*/local-ipv4s", start + seconds(5));
        let at = |published: &Published, time| read(published, "1/local-ipv4s", start + seconds(time)).unwrap();
        assert_eq!(at(&published, 60), "10.0.0.1");
        view.enis[0].local_ipv4s.push([10, 0, 0, 8].into());
        published.publish_at(&view, start + seconds(60));
        assert_eq!(at(&published, 90), "10.0.0.1");
        published.release_at("*/local-ipv4s", start + seconds(90));
        assert_eq!(at(&published, 90), "10.0.0.1\n10.0.0.7\n10.0.0.8");
    }

    #[test]
    fn a_held_mac_is_not_listed_and_its_device_number_not_found() {
        let (mut published, start) = (published(&launched()), Instant::now());
        published.hold_at("*06:00:00:00:00:02*", start);
        let mut view = launched();
        view.enis.push(eni(2, 1));
        published.publish_at(&view, start);
        assert_eq!(macs(&published, start + seconds(60)), ["06:00:00:00:00:01/"]);
        assert_eq!(read(&published, "2/device-number", start + seconds(60)), None);
        published.release_at("*06:00:00:00:00:02", start + seconds(60));
        assert_eq!(macs(&published, start + seconds(60)).len(), 2);
        assert_eq!(read(&published, "2/device-number", start + seconds(60)).as_deref(), Some("0"));
    }

    #[test]
    fn a_launch_is_published_without_delay_and_later_changes_with() {
        let mut published = Published::new();
        published.set_propagation(Propagation {
            delay: seconds(3600),
            listing_entry: seconds(3600),
            ..Propagation::default()
        });
        published.publish_without_delay(&launched());
        assert_eq!(read(&published, "1/local-ipv4s", Instant::now()).as_deref(), Some("10.0.0.1"));
        assert_eq!(macs(&published, Instant::now()).len(), 1);
        let mut view = launched();
        view.enis.push(eni(2, 1));
        published.publish(&view);
        assert_eq!(macs(&published, Instant::now()).len(), 1);
    }

    #[test]
    fn a_recorded_tree_is_served_as_recorded() {
        let leaves = [("mac", "06:00:00:00:00:01"), ("network/interfaces/macs/06:00:00:00:00:01/device-number", "0")];
        let listings = [
            ("network/interfaces/macs/", "06:00:00:00:00:01\n06:00:00:00:00:02/"),
            ("network/interfaces/macs/06:00:00:00:00:03", "device-number\nmac"),
        ];
        let map =
            |entries: [(&str, &str); 2]| entries.map(|(path, value)| (path.to_string(), value.to_string())).into();
        let published = Published::raw(map(leaves), map(listings));
        let now = Instant::now();
        assert_eq!(macs(&published, now), ["06:00:00:00:00:01", "06:00:00:00:00:02/"]);
        assert_eq!(published.get("/mac", now), Answer::Value("06:00:00:00:00:01".to_string()));
        assert_eq!(published.get(&path("1"), now), Answer::Listing(vec!["device-number".to_string()]));
        assert_eq!(published.get(&path("2"), now), Answer::NotFound);
        assert_eq!(
            published.get(&path("3/"), now),
            Answer::Listing(vec!["device-number".to_string(), "mac".to_string()])
        );
        assert_eq!(published.get("", now), Answer::Listing(vec!["mac".to_string(), "network/".to_string()]));

        let published = Published::raw(map(leaves), BTreeMap::new());
        assert_eq!(macs(&published, now), ["06:00:00:00:00:01/"], "without a listing, what there is");
    }

    #[test]
    fn zones_name_their_region() {
        for (zone, expected) in [
            ("us-east-2c", "us-east-2"),
            ("us-gov-west-1a", "us-gov-west-1"),
            ("us-west-2-lax-1a", "us-west-2"),
            ("lab", "lab"),
        ] {
            assert_eq!(region(zone), expected);
        }
    }

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, text) in
            [("*", ""), ("*", "a/b"), ("a*c", "abc"), ("a*c", "ac"), ("*/b*", "a/b"), ("*b*b*", "abcb"), ("a", "a")]
        {
            assert!(glob(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [("", "a"), ("a*c", "ab"), ("*/b", "a/bc"), ("b", "ab"), ("*b*b", "ab")] {
            assert!(!glob(pattern, text), "{pattern} {text}");
        }
    }

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    /// `2/ipv6s` is the key of the ENI that `eni(2, _)` makes.
    fn path(short: &str) -> String {
        format!("{MACS}06:00:00:00:00:0{short}")
    }

    fn read(published: &Published, short: &str, now: Instant) -> Option<String> {
        match published.get(&path(short), now) {
            Answer::Value(value) => Some(value),
            Answer::NotFound => None,
            Answer::Listing(entries) => panic!("{short} lists {entries:?}"),
        }
    }

    fn macs(published: &Published, now: Instant) -> Vec<String> {
        match published.get(MACS, now) {
            Answer::Listing(entries) => entries,
            answer => panic!("{answer:?}"),
        }
    }

    fn published(view: &InstanceView) -> Published {
        let mut published = Published::new();
        published.publish(view);
        published
    }

    fn launched() -> InstanceView {
        InstanceView {
            instance_id: "i-0abc".to_string(),
            instance_type: "m7i.large".to_string(),
            primary_mac: "06:00:00:00:00:01".to_string(),
            availability_zone: "us-east-2c".to_string(),
            enis: vec![eni(1, 0)],
        }
    }

    fn eni(number: u8, device_number: u32) -> EniView {
        EniView {
            mac: format!("06:00:00:00:00:0{number}"),
            interface_id: format!("eni-{number}"),
            device_number,
            network_card: None,
            owner_id: "123456789012".to_string(),
            subnet_id: "subnet-1".to_string(),
            vpc_id: "vpc-1".to_string(),
            local_ipv4s: vec![[10, 0, 0, number].into()],
            ipv6s: Vec::new(),
            ipv4_prefixes: Vec::new(),
            ipv6_prefixes: Vec::new(),
            subnet_ipv4_cidr: Some("10.0.0.0/24".parse().unwrap()),
            subnet_ipv6_cidrs: Vec::new(),
            vpc_ipv4_cidrs: vec!["10.0.0.0/16".parse().unwrap()],
            vpc_ipv6_cidrs: Vec::new(),
            associations: Vec::new(),
            security_groups: vec![("default".to_string(), "sg-2".to_string())],
        }
    }

    fn dual_stack() -> InstanceView {
        let eni = EniView {
            network_card: Some(1),
            local_ipv4s: vec![[10, 0, 0, 5].into(), [10, 0, 0, 6].into()],
            ipv6s: vec!["2600:1f16:67f:f201::5".parse().unwrap()],
            ipv4_prefixes: vec!["10.0.1.0/28".parse().unwrap(), "10.0.1.16/28".parse().unwrap()],
            ipv6_prefixes: vec!["2600:1f16:67f:f201:1::/80".parse().unwrap()],
            subnet_ipv6_cidrs: vec!["2600:1f16:67f:f201::/64".parse().unwrap()],
            vpc_ipv4_cidrs: vec!["10.0.0.0/16".parse().unwrap(), "10.1.0.0/16".parse().unwrap()],
            vpc_ipv6_cidrs: vec!["2600:1f16:67f:f200::/56".parse().unwrap()],
            associations: vec![
                ([18, 0, 0, 1].into(), [10, 0, 0, 5].into()),
                ([18, 0, 0, 2].into(), [10, 0, 0, 6].into()),
            ],
            security_groups: vec![
                ("web and more".to_string(), "sg-1".to_string()),
                ("default".to_string(), "sg-2".to_string()),
            ],
            ..eni(1, 0)
        };
        InstanceView { enis: vec![eni], ..launched() }
    }
}
