//! Which ENIs an entry of the configuration means.

use std::collections::{BTreeMap, BTreeSet};

use glob::Pattern;
use toml::de::DeValue;

use super::Origin;
use super::table::{Table, Wrong, list, number, text};
use crate::net::MacAddr;

/// What ENIs can be told apart by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Attribute {
    Mac,
    Id,
    /// The link's name and its alternative names.
    Link,
    NetworkCard,
    DeviceNumber,
    SubnetId,
    VpcId,
    /// Name or id.
    SecurityGroup,
    /// `KEY=VALUE`: of the instance, since metadata has none of ENIs.
    InstanceTag,
}

impl Attribute {
    pub const ALL: [Attribute; 9] = [
        Attribute::Mac,
        Attribute::Id,
        Attribute::Link,
        Attribute::NetworkCard,
        Attribute::DeviceNumber,
        Attribute::SubnetId,
        Attribute::VpcId,
        Attribute::SecurityGroup,
        Attribute::InstanceTag,
    ];

    pub fn key(self) -> &'static str {
        match self {
            Attribute::Mac => "mac",
            Attribute::Id => "id",
            Attribute::Link => "link",
            Attribute::NetworkCard => "network_card",
            Attribute::DeviceNumber => "device_number",
            Attribute::SubnetId => "subnet_id",
            Attribute::VpcId => "vpc_id",
            Attribute::SecurityGroup => "security_group",
            Attribute::InstanceTag => "instance_tag",
        }
    }

    /// Whether metadata has to be asked for more than routing needs.
    pub fn is_detail(self) -> bool {
        matches!(self, Attribute::SubnetId | Attribute::VpcId | Attribute::SecurityGroup)
    }

    /// How EC2's ids of this sort begin.
    fn prefix(self) -> Option<&'static str> {
        match self {
            Attribute::Id => Some("eni-"),
            Attribute::SubnetId => Some("subnet-"),
            Attribute::VpcId => Some("vpc-"),
            Attribute::Mac
            | Attribute::Link
            | Attribute::NetworkCard
            | Attribute::DeviceNumber
            | Attribute::SecurityGroup
            | Attribute::InstanceTag => None,
        }
    }
}

/// What is known of an ENI; an attribute that is not there is not known.
pub type Facts = BTreeMap<Attribute, BTreeSet<String>>;

/// Means the ENIs that have all of these attributes, each by one of its patterns at least.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Selector {
    pub wanted: BTreeMap<Attribute, Vec<Pattern>>,
    pub origin: Origin,
}

impl Selector {
    /// Whether this ENI is meant; none when that cannot be told from what is known.
    pub fn selects(&self, facts: &Facts) -> Option<bool> {
        let has = |(attribute, patterns): (&Attribute, &Vec<Pattern>)| {
            let values = facts.get(attribute)?;
            Some(values.iter().any(|value| patterns.iter().any(|pattern| pattern.matches(value))))
        };
        let answers: Vec<Option<bool>> = self.wanted.iter().map(has).collect();
        match answers.contains(&Some(false)) {
            true => Some(false),
            false => answers.into_iter().collect::<Option<Vec<bool>>>().map(|_| true),
        }
    }

    /// Reads a table's attributes; none when it has none that is good.
    pub fn read(table: &mut Table, origin: Origin) -> Option<Selector> {
        let mut wanted = BTreeMap::new();
        for attribute in Attribute::ALL {
            let patterns = table.value(attribute.key(), |value| list(value, |value| pattern(attribute, value)));
            wanted.extend(patterns.map(|patterns| (attribute, patterns.value)));
        }
        (!wanted.is_empty()).then_some(Selector { wanted, origin })
    }
}

fn pattern(attribute: Attribute, value: &DeValue) -> Result<Pattern, Wrong> {
    if let Attribute::NetworkCard | Attribute::DeviceNumber = attribute {
        return Ok(literal(&number::<u32>(value, 0..=99)?.to_string()));
    }
    let text = text(value)?;
    if text.is_empty() {
        return Err(
            Wrong::new("an empty text means no ENI").hint("`*` is any text; leave the key out if it does not matter")
        );
    }
    let is_literal = !text.contains(['*', '?', '[']);
    match attribute {
        Attribute::InstanceTag if !text.trim_start_matches('=').contains('=') => {
            let wrong = Wrong::new(format!("\"{text}\" is no tag with a value"));
            return Err(wrong.hint("write it as \"KEY=VALUE\", or as \"KEY=*\" for any value"));
        }
        Attribute::Mac if is_literal => {
            return text.parse::<MacAddr>().map(|mac| literal(&mac.to_string())).map_err(Wrong::new);
        }
        attribute if is_literal => {
            if let Some(prefix) = attribute.prefix().filter(|prefix| !text.starts_with(prefix)) {
                let wrong = Wrong::new(format!("\"{text}\" does not begin with \"{prefix}\""));
                return Err(wrong.hint(format!("\"{prefix}*\" means all, \"{prefix}0123*\" those that begin so")));
            }
        }
        _ => {}
    }
    let text = if attribute == Attribute::Mac { text.to_lowercase() } else { text.into() };
    let pattern = Pattern::new(&text).map_err(|error| {
        let wrong = Wrong::new(format!("\"{text}\" is no pattern: {}", error.msg));
        wrong.hint("`*` is any text, `?` any character, `[ab]` one of these")
    })?;
    match attribute.shape().filter(|shape| !shape.can_match(&text)) {
        Some(Shape { what, example, .. }) => {
            Err(Wrong::new(format!("\"{text}\" can mean none: {what}")).hint(format!("write it as in {example}")))
        }
        None => Ok(pattern),
    }
}

/// What all values of an attribute look like.
struct Shape {
    what: &'static str,
    example: String,
    /// The characters that can be in each place.
    places: Vec<&'static str>,
    /// Whether any text may follow, and some has to.
    is_open: bool,
}

impl Attribute {
    /// None: it may be any text.
    fn shape(self) -> Option<Shape> {
        const HEX: &str = "0123456789abcdef";
        match self {
            Attribute::Mac => Some(Shape {
                what: "a MAC address has six pairs of hexadecimal digits with colons between",
                example: "\"02:*\"".into(),
                places: (0..17).map(|n| if n % 3 == 2 { ":" } else { HEX }).collect(),
                is_open: false,
            }),
            Attribute::Id | Attribute::SubnetId | Attribute::VpcId => {
                let prefix = self.prefix()?;
                Some(Shape {
                    what: "ids of this sort are written otherwise",
                    example: format!("\"{prefix}*\""),
                    places: (0..prefix.len()).map(|n| &prefix[n..=n]).collect(),
                    is_open: true,
                })
            }
            Attribute::Link
            | Attribute::NetworkCard
            | Attribute::DeviceNumber
            | Attribute::SecurityGroup
            | Attribute::InstanceTag => None,
        }
    }
}

impl Shape {
    /// Whether a good pattern matches any text of this shape: the places up to which its tokens can have come, one after the
    /// other.
    fn can_match(&self, pattern: &str) -> bool {
        let last = self.places.len() + usize::from(self.is_open);
        let mut reached = BTreeSet::from([0]);
        let mut rest = pattern;
        while let Some(first) = rest.chars().next() {
            // The shortest beginning that is a pattern: `[!ab]` as a whole, since `[` alone is none.
            let ends = rest.char_indices().map(|(at, c)| at + c.len_utf8());
            let Some(token) = ends.map(|end| &rest[..end]).find(|token| Pattern::new(token).is_ok()) else {
                return false;
            };
            rest = &rest[token.len()..];
            if first == '*' {
                reached = reached.first().map_or_else(BTreeSet::new, |earliest| (*earliest..=last).collect());
                continue;
            }
            let is_taken = |place: usize| match self.places.get(place) {
                Some(characters) => Pattern::new(token)
                    .is_ok_and(|token| characters.chars().any(|c| token.matches(c.encode_utf8(&mut [0; 4])))),
                None => self.is_open,
            };
            reached = reached.into_iter().filter(|place| is_taken(*place)).map(|place| (place + 1).min(last)).collect();
        }
        reached.contains(&last)
    }
}

fn literal(text: &str) -> Pattern {
    Pattern::new(&Pattern::escape(text)).expect("an escaped text is a pattern")
}
