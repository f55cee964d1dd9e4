//! One snapshot of instance metadata: what was answered for each path, and what follows from that.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::net::MacAddr;

/// The key that names the primary ENI's MAC; there from launch.
pub const PRIMARY_MAC: &str = "mac";
/// The directory with one sub-directory for each attached ENI.
pub const INTERFACES: &str = "network/interfaces/macs/";

/// What routing needs of an ENI. Everything else is for people.
pub const ROUTING_KEYS: [&str; 9] = [
    "device-number",
    "interface-id",
    "ipv4-prefix",
    "ipv6-prefix",
    "ipv6s",
    "local-ipv4s",
    "network-card",
    "subnet-ipv4-cidr-block",
    "subnet-ipv6-cidr-blocks",
];

/// What `status` shows besides.
pub const DETAIL_KEYS: [&str; 8] = [
    "owner-id",
    "public-ipv4s",
    "security-group-ids",
    "security-groups",
    "subnet-id",
    "vpc-id",
    "vpc-ipv4-cidr-blocks",
    "vpc-ipv6-cidr-blocks",
];

/// What selectors of the configuration may ask of an ENI besides.
pub const SELECTOR_KEYS: [&str; 4] = ["security-group-ids", "security-groups", "subnet-id", "vpc-id"];

/// The directory with one key for each tag of the instance. It is not there unless that was switched on (EC2 User Guide,
/// "View tags for your EC2 instances using instance metadata").
pub const INSTANCE_TAGS: &str = "tags/instance/";

/// The directory below an ENI with one key for each public address, naming the private one behind it.
pub const ASSOCIATIONS: &str = "ipv4-associations/";

/// The service's answer for one path: three answers, never two.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    Present(String),
    /// Not found; see [`Tree::get`] for what that means.
    Absent,
    /// It could not be read; says nothing of the value.
    Unknown(String),
}

/// One snapshot: path below `/latest/meta-data/` → answer. Directories are there by their path with the final slash.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tree {
    answers: BTreeMap<String, Answer>,
}

impl Tree {
    pub fn insert(&mut self, path: impl Into<String>, answer: Answer) {
        self.answers.insert(path.into(), answer);
    }

    /// Every path that was asked for.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.answers.keys().map(String::as_str)
    }

    /// Forgets one answer, so that it can be asked for anew.
    pub fn forget(&mut self, path: &str) {
        self.answers.remove(path);
    }

    /// Forgets a directory and everything below it.
    pub fn forget_below(&mut self, directory: &str) {
        self.answers.retain(|path, _| !path.starts_with(directory));
    }

    /// Whether something could not be read that an earlier tree knows.
    pub fn lacks_what_is_known_in(&self, earlier: &Tree) -> bool {
        self.lacks_what_is_known_below("", earlier)
    }

    /// The same, with everything below a directory as an earlier tree has it.
    pub fn with_directory_of(mut self, earlier: &Tree, directory: &str) -> Tree {
        self.forget_below(directory);
        let below = earlier.answers.iter().filter(|(path, _)| path.starts_with(directory));
        self.answers.extend(below.map(|(path, answer)| (path.clone(), answer.clone())));
        self
    }

    /// A key below a directory that could not be read, and why not.
    pub fn unknown_below(&self, directory: &str) -> Option<(&str, &str)> {
        self.answers.iter().find_map(|(path, answer)| match answer {
            Answer::Unknown(why) => Some((path.strip_prefix(directory)?, why.as_str())),
            Answer::Present(_) | Answer::Absent => None,
        })
    }

    /// Whether something below a directory could not be read that an earlier tree knows.
    pub fn lacks_what_is_known_below(&self, directory: &str, earlier: &Tree) -> bool {
        let is_unknown = |answer: Option<&Answer>| matches!(answer, Some(Answer::Unknown(_)));
        let known = earlier.answers.iter().filter(|(_, answer)| !is_unknown(Some(*answer)));
        let mut known = known.filter(|(path, _)| path.starts_with(directory));
        known.any(|(path, _)| is_unknown(self.answers.get(path)))
    }

    /// Whether all that was asked for below a directory was there.
    pub fn is_whole_below(&self, directory: &str) -> bool {
        let mut below = self.answers.iter().filter(|(path, _)| path.starts_with(directory));
        below.all(|(_, answer)| matches!(answer, Answer::Present(_)))
    }

    /// Forgets what was read of ENIs that the list of interfaces does not name.
    pub fn forget_unlisted(&mut self) {
        let Some(Answer::Present(listing)) = self.answers.get(INTERFACES) else { return };
        let directories: BTreeSet<String> = listed_macs(listing).0.into_iter().map(eni_directory).collect();
        let of_eni =
            |path: &str| Some(format!("{INTERFACES}{}", path.strip_prefix(INTERFACES)?.split_inclusive('/').next()?));
        self.answers.retain(|path, _| of_eni(path).is_none_or(|directory| directories.contains(&directory)));
    }

    /// What is not found counts as absent only when the listing of its directory was read and does not name it: the service
    /// lists keys before it has them. So does a path never asked for.
    pub fn get(&self, path: &str) -> Answer {
        let (directory, name) = split(path);
        match (self.answers.get(path), self.answers.get(directory)) {
            (Some(answer @ (Answer::Present(_) | Answer::Unknown(_))), _) => answer.clone(),
            // Nothing is above the top.
            (Some(Answer::Absent), None) => Answer::Absent,
            (_, Some(Answer::Present(listing))) if !lines(listing).any(|line| line == name) => Answer::Absent,
            (_, Some(Answer::Absent)) if self.has_something_below(directory) => {
                Answer::Unknown("its directory is not found, and other keys of it are".into())
            }
            (_, Some(Answer::Absent)) => Answer::Absent,
            (Some(Answer::Absent), Some(Answer::Present(_))) => {
                Answer::Unknown("it is listed but not there yet".into())
            }
            (None, Some(Answer::Present(_))) => Answer::Unknown("it is listed but was not read".into()),
            (_, Some(Answer::Unknown(why))) => Answer::Unknown(why.clone()),
            (None, None) => Answer::Unknown("it was not asked for".into()),
        }
    }

    fn has_something_below(&self, directory: &str) -> bool {
        self.present_below(directory).next().is_some()
    }

    fn present_below(&self, directory: &str) -> impl Iterator<Item = &str> {
        let below = self.answers.range::<str, _>((Bound::Excluded(directory), Bound::Unbounded));
        let below = below.take_while(move |(path, _)| path.starts_with(directory));
        below.filter(|(_, answer)| matches!(answer, Answer::Present(_))).map(|(path, _)| path.as_str())
    }

    /// A key that is there, though the listing that was read of its directory does not name it: such a listing is not whole.
    pub(super) fn unlisted(&self, directory: &str) -> Option<&str> {
        let Some(Answer::Present(listing)) = self.answers.get(directory) else { return None };
        let listed: Vec<&str> = lines(listing).collect();
        let keys = self.present_below(directory).filter_map(|path| path.strip_prefix(directory));
        let mut keys = keys.filter(|key| !key.trim_end_matches('/').contains('/'));
        keys.find(|key| !listed.contains(key))
    }

    /// A saved snapshot: a JSON object with the keys of [`SavedTree`], others being ignored.
    ///
    /// # Errors
    /// Text that is not JSON, or not of that shape, with line and column.
    pub fn from_json(text: &str) -> Result<Tree> {
        let saved: SavedTree = serde_json::from_str(text)
            .context("expected a JSON object whose `leaves` maps metadata paths to their text")?;
        if saved.leaves.is_empty() {
            bail!("`leaves` is empty: a snapshot has at least `{PRIMARY_MAC}` and the keys of one network interface");
        }
        Ok(saved.tree())
    }

    /// Every answer, so that [`SavedTree::tree`] is the same tree again.
    pub fn save(&self) -> SavedTree {
        let mut saved = SavedTree::default();
        let absent = saved.absent.get_or_insert_default();
        for (path, answer) in &self.answers {
            let path = path.clone();
            match answer {
                Answer::Present(listing) if path.ends_with('/') => _ = saved.listings.insert(path, listing.clone()),
                Answer::Present(body) => _ = saved.leaves.insert(path, body.clone()),
                Answer::Absent => _ = absent.insert(path),
                Answer::Unknown(why) => _ = saved.unreadable.insert(path, why.clone()),
            }
        }
        saved
    }

    /// The listings that follow from the paths.
    fn from_leaves(leaves: BTreeMap<String, String>) -> Tree {
        let mut listings: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for path in leaves.keys() {
            let mut path = path.as_str();
            while !path.is_empty() {
                let (directory, name) = split(path);
                listings.entry(directory.to_string()).or_default().insert(name.to_string());
                path = directory;
            }
        }
        let mut tree = Tree::default();
        // A snapshot is all there is: what it does not have was not there.
        tree.insert(INTERFACES, Answer::Absent);
        tree.insert(INSTANCE_TAGS, Answer::Absent);
        for (directory, names) in listings {
            tree.insert(directory, Answer::Present(Vec::from_iter(names).join("\n")));
        }
        for (path, body) in leaves {
            tree.insert(path, Answer::Present(body));
        }
        tree
    }

    /// What the service listed counts for more than what follows from the paths: what is listed and not there was not found.
    fn list(&mut self, directory: &str, listing: &str) {
        self.insert(directory, Answer::Present(listing.into()));
        for name in lines(listing) {
            // The real service ends an interface with a slash; some imitations do not.
            let name = if directory == INTERFACES { format!("{}/", name.trim_end_matches('/')) } else { name.into() };
            self.answers.entry(format!("{directory}{name}")).or_insert(Answer::Absent);
        }
    }

    /// Some imitations of the service spell MAC addresses in upper case; paths are looked up in lower case.
    fn with_lower_case_macs(bodies: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let lower = |path: &String| match path.strip_prefix(INTERFACES).and_then(|rest| rest.split_once('/')) {
            Some((mac, key)) => format!("{INTERFACES}{}/{key}", mac.to_ascii_lowercase()),
            None => path.clone(),
        };
        bodies.iter().map(|(path, body)| (lower(path), body.clone())).collect()
    }
}

/// A tree as files have it. `leaves` alone will do: then the listings follow from the paths.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SavedTree {
    /// Path below `/latest/meta-data/` → body.
    pub leaves: BTreeMap<String, String>,
    /// Directory, with its final slash → what the service listed in it.
    #[serde(default)]
    pub listings: BTreeMap<String, String>,
    /// What was asked for and not found. Where the key is there, the file has every answer that was given, and nothing has
    /// to be inferred.
    #[serde(default)]
    pub absent: Option<BTreeSet<String>>,
    /// What could not be read, and why.
    #[serde(default)]
    pub unreadable: BTreeMap<String, String>,
}

impl SavedTree {
    pub fn tree(&self) -> Tree {
        let leaves = Tree::with_lower_case_macs(&self.leaves);
        let listings = Tree::with_lower_case_macs(&self.listings);
        let mut tree = match &self.absent {
            None => {
                let mut tree = Tree::from_leaves(leaves);
                listings.iter().for_each(|(directory, listing)| tree.list(directory, listing));
                tree
            }
            Some(absent) => {
                let present = leaves.into_iter().chain(listings).map(|(path, body)| (path, Answer::Present(body)));
                let absent = absent.iter().map(|path| (path.clone(), Answer::Absent));
                Tree { answers: present.chain(absent).collect() }
            }
        };
        let unreadable = self.unreadable.iter().map(|(path, why)| (path.clone(), Answer::Unknown(why.clone())));
        tree.answers.extend(unreadable);
        tree
    }
}

/// `a/b/c` → `a/b/`, `c`; `a/b/` → `a/`, `b/`.
fn split(path: &str) -> (&str, &str) {
    let end = path.strip_suffix('/').unwrap_or(path).rfind('/').map_or(0, |slash| slash + 1);
    path.split_at(end)
}

/// The lines of a list, without the blank ones and without blanks around them. Values may hold spaces, so nothing else
/// separates them.
pub fn lines(body: &str) -> impl Iterator<Item = &str> {
    body.lines().map(str::trim).filter(|line| !line.is_empty())
}

/// The directory of an ENI, with its final slash. Metadata spells MAC addresses in lower case.
pub fn eni_directory(mac: MacAddr) -> String {
    format!("{INTERFACES}{mac}/")
}

/// The MAC addresses of a listing of [`INTERFACES`], and what is wrong with the lines that are none.
/// The real service ends each with a slash; some imitations do not.
pub fn listed_macs(listing: &str) -> (BTreeSet<MacAddr>, Vec<String>) {
    let mut macs = BTreeSet::new();
    let mut malformed = Vec::new();
    for line in lines(listing) {
        match eni_mac(line.trim_end_matches('/')) {
            Ok(mac) => _ = macs.insert(mac),
            Err(why) => {
                malformed.push(format!("`{INTERFACES}` lists an interface by a name that cannot be used: {why}"))
            }
        }
    }
    (macs, malformed)
}

/// All zeros is the loopback link's address, and a group address is no device's.
pub(super) fn eni_mac(text: &str) -> Result<MacAddr, String> {
    let mac: MacAddr = text.parse()?;
    if mac.is_device() { Ok(mac) } else { Err(format!("{mac} cannot be the MAC address of an ENI")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_that_is_saved_is_the_same_tree_again() {
        let mut tree = Tree::default();
        tree.insert("a/", Answer::Present("key\nother\nnever-asked".into()));
        tree.insert("a/key", Answer::Present("value".into()));
        tree.insert("a/other", Answer::Absent);
        tree.insert("b/", Answer::Absent);
        tree.insert("c/", Answer::Unknown("500".into()));
        let text = serde_json::to_string(&tree.save()).unwrap();
        assert_eq!(Tree::from_json(&text).unwrap(), tree);
    }

    #[test]
    fn not_found_is_absent_only_below_a_listing_that_does_not_name_it() {
        let answer = |listing: Option<Answer>| {
            let mut tree = Tree::default();
            tree.insert("a/key", Answer::Absent);
            listing.into_iter().for_each(|listing| tree.insert("a/", listing));
            tree.get("a/key")
        };
        assert_eq!(answer(Some(Answer::Present("other\nkey/".into()))), Answer::Absent);
        assert_eq!(answer(Some(Answer::Absent)), Answer::Absent);
        assert!(matches!(answer(Some(Answer::Present("other\nkey".into()))), Answer::Unknown(_)));
        assert_eq!(answer(Some(Answer::Unknown("500".into()))), Answer::Unknown("500".into()));
        assert_eq!(answer(None), Answer::Absent);
    }

    #[test]
    fn a_directory_that_is_not_found_proves_nothing_while_a_key_below_it_is() {
        let mut tree = Tree::default();
        tree.insert("a/", Answer::Absent);
        tree.insert("a/never", Answer::Absent);
        tree.insert("b/there", Answer::Present("1".into()));
        assert_eq!(tree.get("a/never"), Answer::Absent);
        assert_eq!(tree.get("a/not-asked-for"), Answer::Absent);
        tree.insert("a/there", Answer::Present("1".into()));
        assert!(matches!(tree.get("a/never"), Answer::Unknown(_)));
        assert!(matches!(tree.get("a/not-asked-for"), Answer::Unknown(_)));
        assert_eq!(tree.get("a/there"), Answer::Present("1".into()));
    }

    #[test]
    fn a_path_never_asked_for_is_absent_only_below_a_listing_that_does_not_name_it() {
        let mut tree = Tree::default();
        assert!(matches!(tree.get("a/key"), Answer::Unknown(_)));
        tree.insert("a/", Answer::Present("key".into()));
        assert!(matches!(tree.get("a/key"), Answer::Unknown(_)));
        assert_eq!(tree.get("a/other"), Answer::Absent);
    }

    #[test]
    fn what_is_not_listed_is_forgotten_and_nothing_else() {
        let mac = |n: u8| MacAddr::from_bytes(&[2, 0, 0, 0, 0, n]).unwrap();
        let mut tree = Tree::default();
        let paths = |tree: &Tree| tree.paths().map(String::from).collect::<Vec<_>>();
        tree.insert(PRIMARY_MAC, Answer::Present(mac(1).to_string()));
        for n in 1..=2 {
            tree.insert(eni_directory(mac(n)), Answer::Present("ipv6s".into()));
            tree.insert(format!("{}ipv6s", eni_directory(mac(n))), Answer::Absent);
        }
        let all = paths(&tree);
        tree.forget_unlisted();
        assert_eq!(paths(&tree), all, "without a list nothing is known to be gone");
        // Some imitations leave out the slash.
        tree.insert(INTERFACES, Answer::Present(mac(1).to_string()));
        tree.forget_unlisted();
        let expected =
            [PRIMARY_MAC.into(), INTERFACES.into(), eni_directory(mac(1)), format!("{}ipv6s", eni_directory(mac(1)))];
        assert_eq!(paths(&tree), expected);
    }
}
