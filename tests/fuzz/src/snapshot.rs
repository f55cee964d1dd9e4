//! Snapshots as the metadata service may tell them: ENIs that are whole, with slips of the service here and there.

use arbitrary::Arbitrary;
use eniup::metadata::{Answer, INTERFACES, PRIMARY_MAC, ROUTING_KEYS, Tree, eni_directory};
use eniup::net::MacAddr;

/// The ENI at a place has the same MAC, id and slot in every snapshot.
const PLACES: usize = 6;

#[derive(Arbitrary, Clone, Debug)]
pub struct Snapshot {
    primary: u8,
    has_many_cards: bool,
    enis: [Option<Eni>; PLACES],
    /// A line of the listing that names none of the ENIs.
    stray: Option<String>,
}

#[derive(Arbitrary, Clone, Debug)]
struct Eni {
    subnet: u8,
    ipv4: Option<Sources>,
    ipv6: Option<Sources>,
    slips: Vec<Slip>,
}

/// Of one family: the length of the subnet, by its place in a list; and numbers of hosts and delegated blocks in it.
#[derive(Arbitrary, Clone, Debug)]
struct Sources {
    length: u8,
    hosts: Vec<u8>,
    blocks: Vec<u8>,
}

#[derive(Arbitrary, Clone, Debug)]
struct Slip {
    key: u8,
    what: What,
}

/// What the service says of a key instead of what is true.
#[derive(Arbitrary, Clone, Debug)]
enum What {
    Absent,
    ListedButAbsent,
    Unread,
    /// What it says of the same key of another ENI.
    OfEni(u8),
    Body(String),
}

pub fn mac(place: usize) -> MacAddr {
    MacAddr::from_bytes(&[2, 0, 0, 0, 0, place as u8 + 1]).expect("six bytes are a MAC address")
}

impl Snapshot {
    pub fn tree(&self) -> Tree {
        let mut tree = Tree::default();
        tree.insert(PRIMARY_MAC, Answer::Present(mac(usize::from(self.primary) % PLACES).to_string()));
        let attached: Vec<usize> = (0..PLACES).filter(|place| self.enis[*place].is_some()).collect();
        let listing = attached.iter().map(|place| format!("{}/", mac(*place))).chain(self.stray.clone());
        tree.insert(INTERFACES, Answer::Present(listing.collect::<Vec<_>>().join("\n")));
        for place in attached {
            let directory = eni_directory(mac(place));
            let mut listed = Vec::new();
            for (key, name) in ROUTING_KEYS.into_iter().enumerate() {
                let (answer, is_listed) = self.answer(place, key);
                listed.extend(is_listed.then_some(name));
                tree.insert(format!("{directory}{name}"), answer);
            }
            tree.insert(directory, Answer::Present(listed.join("\n")));
        }
        tree
    }

    /// What the service says of a key, and whether it lists it.
    fn answer(&self, place: usize, key: usize) -> (Answer, bool) {
        let slips = self.enis[place].iter().flat_map(|eni| &eni.slips);
        let slip = slips.rev().find(|slip| usize::from(slip.key) % ROUTING_KEYS.len() == key);
        let present = |body: Option<String>| match body {
            Some(body) => (Answer::Present(body), true),
            None => (Answer::Absent, false),
        };
        match slip.map(|slip| &slip.what) {
            None => present(self.body(place, key)),
            Some(What::Absent) => (Answer::Absent, false),
            Some(What::ListedButAbsent) => (Answer::Absent, true),
            Some(What::Unread) => (Answer::Unknown("500".into()), true),
            Some(What::OfEni(other)) => present(self.body(usize::from(*other) % PLACES, key)),
            Some(What::Body(body)) => present(Some(body.clone())),
        }
    }

    /// What is true of a key; none that is absent.
    fn body(&self, place: usize, key: usize) -> Option<String> {
        let Eni { subnet, ipv4, ipv6, slips: _ } = self.enis[place].as_ref()?;
        let subnet = subnet % 4;
        let list = |lines: Vec<String>| (!lines.is_empty()).then(|| lines.join("\n"));
        let each =
            |numbers: &[u8], line: &dyn Fn(u8) -> String| list(numbers.iter().map(|number| line(*number)).collect());
        match ROUTING_KEYS[key] {
            "device-number" => Some(place.to_string()),
            "network-card" => self.has_many_cards.then(|| (place / 2).to_string()),
            "interface-id" => Some(format!("eni-{place}")),
            "local-ipv4s" => each(&ipv4.as_ref()?.hosts, &|host| format!("10.0.{subnet}.{host}")),
            "ipv6s" => each(&ipv6.as_ref()?.hosts, &|host| format!("2001:db8:0:{subnet}::{host:x}")),
            "ipv4-prefix" => each(&ipv4.as_ref()?.blocks, &|block| format!("10.0.{subnet}.{}/28", block & 0xf0)),
            "ipv6-prefix" => each(&ipv6.as_ref()?.blocks, &|block| format!("2001:db8:0:{subnet}:{:x}::/80", block & 7)),
            "subnet-ipv4-cidr-block" => Some(match ipv4.as_ref()?.length % 8 {
                0 => "10.0.0.0/16".into(),
                1 => format!("10.0.{}.0/23", subnet & 2),
                2 => format!("10.0.{subnet}.0/25"),
                _ => format!("10.0.{subnet}.0/24"),
            }),
            "subnet-ipv6-cidr-blocks" => Some(match ipv6.as_ref()?.length % 4 {
                0 => "2001:db8::/56".into(),
                1 => format!("2001:db8:0:{subnet}::/64\n2001:db8:0:{}::/64", subnet ^ 1),
                _ => format!("2001:db8:0:{subnet}::/64"),
            }),
            other => unreachable!("a key that this does not know: {other}"),
        }
    }
}
