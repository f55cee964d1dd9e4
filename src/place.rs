//! Which link is an ENI's own: MAC meets link here.

use std::fmt;

use crate::desired::DesiredEni;
use crate::net::{Link, MacAddr, Observed};
use crate::policy;

/// Why an ENI cannot be brought about on this machine as it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trouble {
    /// The ENI's id.
    pub eni: String,
    pub kind: TroubleKind,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TroubleKind {
    NoLink { mac: MacAddr },
    NoAddress { link: String },
    LinkTwice { mac: MacAddr, links: Vec<String> },
    LinkTaken { link: String, by: String },
}

impl TroubleKind {
    /// Whether waiting may help: the link or the address may be on its way.
    pub fn may_pass(&self) -> bool {
        match self {
            TroubleKind::NoLink { .. } | TroubleKind::NoAddress { .. } => true,
            TroubleKind::LinkTwice { .. } | TroubleKind::LinkTaken { .. } => false,
        }
    }
}

impl fmt::Display for TroubleKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            TroubleKind::NoLink { mac } => {
                write!(f, "no link with its MAC {mac} (not plugged in yet, or moved to another namespace)")
            }
            TroubleKind::NoAddress { link } => {
                write!(f, "its link {link} is here, but metadata gives it no address yet")
            }
            TroubleKind::LinkTwice { mac, links } => {
                write!(f, "its MAC {mac} is on {}: give all but one another MAC", links.join(" and "))
            }
            TroubleKind::LinkTaken { link, by } => {
                write!(f, "its link {link} is a port of {by}, so whoever made {by} manages it")
            }
        }
    }
}

/// The ENI's link on this machine. None for an ENI that needs none.
pub fn place<'a>(mac: MacAddr, eni: &DesiredEni, observed: &'a Observed) -> Result<Option<&'a Link>, TroubleKind> {
    match (find_link(mac, observed)?, eni.has_addresses) {
        (Some(link), true) => Ok(Some(link)),
        (Some(link), false) => Err(TroubleKind::NoAddress { link: link.name.clone() }),
        (None, true) => Err(TroubleKind::NoLink { mac }),
        // EFA-only: it has neither an address nor a link in the guest.
        (None, false) => Ok(None),
    }
}

/// The one link that is this ENI's own, if it is here.
pub fn find_link(mac: MacAddr, observed: &Observed) -> Result<Option<&Link>, TroubleKind> {
    let of_mac = |link: &&Link| link.mac == Some(mac) && policy::can_be_eni(link);
    let links: Vec<&Link> = observed.links.values().filter(of_mac).collect();
    if let Some((link, controller)) = links.iter().find_map(|link| Some((link, link.controller?))) {
        let by = observed.links.get(&controller).map_or_else(|| format!("link {controller}"), |link| link.name.clone());
        return Err(TroubleKind::LinkTaken { link: link.name.clone(), by });
    }
    match links.as_slice() {
        [] => Ok(None),
        [link] => Ok(Some(link)),
        links => Err(TroubleKind::LinkTwice { mac, links: links.iter().map(|link| link.name.clone()).collect() }),
    }
}
