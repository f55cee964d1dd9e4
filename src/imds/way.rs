//! How the service is reached: by which of its addresses, and by which link when the plain way leads nowhere (a VPN that
//! took the default route).

use std::rc::Rc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hyper::header::HeaderValue;
use tokio::time::{Instant, timeout};

use super::connections::Connections;
use super::endpoint::Endpoint;
use super::http::{self, Attempt};
use super::pace::Pace;
use super::{ENDPOINTS, Error};
use crate::metadata::Fault;
use crate::net::{Family, HasFamily, MacAddr, Observed, RouteKind};
use crate::policy;

/// How long a way is ahead of the next one, which is then tried beside it (as RFC 8305 has it for addresses).
const HEAD_START: Duration = Duration::from_millis(200);

/// Links by which the service is tried at a time: most likely the primary's, and some in case that it is not.
const MOST_LINKS: usize = 4;

/// What the kernel tells of this machine before metadata does; facts for guesses, nothing is concluded from them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Surroundings {
    /// Links that may be ENIs', the one that is most likely the primary's first.
    pub links: Vec<(MacAddr, String)>,
    /// No link has an IPv4 address, so metadata's IPv4 address cannot be reached.
    pub is_ipv6_only: bool,
}

impl Surroundings {
    /// A software device counts only where a default route leaves by it: a host of containers has hundreds of them.
    pub fn of(observed: &Observed) -> Surroundings {
        let default_metric = |index: u32, is_wanted_table: &dyn Fn(u32) -> bool| {
            let routes = observed.routes.iter().filter(|(link, _)| *link == Some(index)).map(|(_, route)| route);
            let defaults = routes.filter(|route| {
                route.kind == RouteKind::Unicast && route.destination.prefix_len() == 0 && is_wanted_table(route.table)
            });
            defaults.map(|route| route.metric).min()
        };
        let mut links = Vec::new();
        for link in observed.links.values() {
            let Some(mac) = link.mac.filter(|mac| MacAddr::from_bytes(&[0; 6]) != Some(*mac)) else { continue };
            let is_card = link.kind.is_none();
            let may_be_eni = policy::can_be_eni(link) && link.controller.is_none();
            if may_be_eni && (is_card || default_metric(link.index, &|_| true).is_some()) {
                let metric = default_metric(link.index, &|table| table == policy::MAIN_TABLE);
                links.push(((metric.is_none(), metric, link.index), (mac, link.name.clone())));
            }
        }
        links.sort();
        let mut addresses = observed.addresses.iter().map(|(_, address)| address.net);
        let has_ipv4 = addresses.any(|net| net.family() == Family::V4 && !net.addr().is_loopback());
        Surroundings { links: links.into_iter().map(|(_, link)| link).collect(), is_ipv6_only: !has_ipv4 }
    }
}

/// The service's addresses in the order in which they are tried; a given one is the only one.
pub fn endpoints(given: Option<&str>, surroundings: &Surroundings) -> Result<Vec<Endpoint>, Error> {
    if let Some(given) = given {
        return Ok(vec![Endpoint::parse(given)?]);
    }
    let mut endpoints = ENDPOINTS.map(Endpoint::parse).into_iter().collect::<Result<Vec<Endpoint>, Error>>()?;
    if surroundings.is_ipv6_only {
        endpoints.reverse();
    }
    Ok(endpoints)
}

/// One way to the service.
#[derive(Clone)]
pub struct Way(pub Rc<Connections>);

impl Way {
    pub fn shown(&self) -> String {
        let Connections { endpoint, link, .. } = &*self.0;
        match link {
            Some(link) => format!("{endpoint} by {link}"),
            None => endpoint.to_string(),
        }
    }
}

/// The ways that leave by this link, or as the routing table says: one for each endpoint.
pub fn ways(endpoints: &[Endpoint], link: Option<&str>) -> Vec<Way> {
    endpoints.iter().map(|endpoint| Way(Rc::new(Connections::new(endpoint.clone(), link)))).collect()
}

/// The same by a few links, in each round by the next: every ENI's way leads to the same service.
pub fn ways_by_links(endpoints: &[Endpoint], surroundings: &Surroundings, round: usize) -> Vec<Way> {
    let links = &surroundings.links;
    let from_here = links.iter().cycle().skip(round * MOST_LINKS);
    from_here.take(MOST_LINKS.min(links.len())).flat_map(|(_, link)| ways(endpoints, Some(link))).collect()
}

/// What became of a race without a winner.
#[derive(Default)]
pub struct Failures {
    /// What went wrong, way by way.
    pub shown: String,
    /// Not one answer of any sort: another way may be better.
    pub is_nobody_there: bool,
    /// The routing table forbids them, or the one over IPv4, which every instance has.
    pub is_prohibited: bool,
    is_ipv4_prohibited: bool,
    /// The most telling one.
    pub fault: Option<Fault>,
}

/// The first token, and the way that it came by. The ways start one after the other, without waiting long.
///
/// # Errors
/// The first way was told that asking again is of no use; of the others that is only one failure more, since an endpoint
/// may be off while another works.
pub async fn race(ways: &[Way], pace: &Pace, deadline: Instant) -> Result<Result<(Way, HeaderValue), Failures>, Error> {
    let mut waiting = ways.iter().enumerate();
    let mut running = FuturesUnordered::new();
    let mut failures = Failures { is_nobody_there: true, is_prohibited: true, ..Failures::default() };
    // What a later way said for good counts when nobody is there on the others.
    let (mut refusal, mut may_answer_later) = (None, false);
    loop {
        if let Some((n, way)) = waiting.next() {
            running.push(async move { (n, way, http::token(&way.0, pace, deadline).await) });
        }
        let Ok(ended) = timeout(HEAD_START, running.next()).await else { continue };
        match ended {
            None => return refusal.filter(|_| !may_answer_later).map_or(Ok(Err(failures)), Err),
            Some((_, way, Attempt::Body(token))) => return Ok(Ok((way.clone(), token))),
            Some((n, way, attempt)) => match final_error(&attempt, way) {
                Some(error) if n == 0 => return Err(error),
                Some(error) => {
                    refusal.get_or_insert(error);
                    failures.add(way, attempt);
                }
                None => {
                    may_answer_later |= !matches!(attempt, Attempt::NoWay { .. } | Attempt::Prohibited);
                    failures.add(way, attempt);
                }
            },
        }
    }
}

/// What an attempt means, if asking again is of no use.
pub fn final_error<T>(attempt: &Attempt<T>, way: &Way) -> Option<Error> {
    let endpoint = way.shown();
    match attempt {
        Attempt::Forbidden => Some(Error::Forbidden { endpoint }),
        Attempt::Unauthorized => Some(Error::Unauthorized { endpoint }),
        Attempt::Useless(what) => Some(Error::NotMetadata { endpoint, what: what.clone() }),
        Attempt::Body(_)
        | Attempt::NotFound
        | Attempt::NoWay { .. }
        | Attempt::Prohibited
        | Attempt::Passing { .. } => None,
    }
}

impl Failures {
    fn add<T>(&mut self, way: &Way, attempt: Attempt<T>) {
        self.fault = self.fault.max(Some(attempt.fault()));
        let is_prohibited = matches!(attempt, Attempt::Prohibited);
        self.is_ipv4_prohibited |= is_prohibited && way.0.endpoint.is_ipv4();
        self.is_prohibited = self.is_ipv4_prohibited || self.is_prohibited && is_prohibited;
        self.is_nobody_there &= is_prohibited || matches!(attempt, Attempt::NoWay { .. });
        self.show(&format!("{}: {}", way.shown(), attempt.shown()));
    }

    /// Those of ways that were tried later.
    pub fn append(&mut self, later: &Failures) {
        self.show(&later.shown);
    }

    fn show(&mut self, failure: &str) {
        if !self.shown.is_empty() && !failure.is_empty() {
            self.shown += "; ";
        }
        self.shown += failure;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn surroundings(links: &str, addresses: &str, routes: &str) -> Surroundings {
        let observed = format!(
            r#"{{"links": {{{links}}}, "addresses": [{addresses}], "routes": [{routes}], "rules": [], "has_ipv6": true}}"#
        );
        Surroundings::of(&serde_json::from_str(&observed).unwrap())
    }

    fn link(index: u32, mac: u8, more: &str) -> String {
        let mac = format!("02:00:00:00:00:{mac:02x}");
        format!(
            r#""{index}": {{"index": {index}, "name": "l{index}", "mac": "{mac}", "is_up": true, "mtu": 1500{more}}}"#
        )
    }

    fn default_route(link: u32, table: u32, metric: u32) -> String {
        format!(
            r#"[{link}, {{"destination": "0.0.0.0/0", "kind": "unicast", "table": {table}, "metric": {metric}, "protocol": 16}}]"#
        )
    }

    fn names(surroundings: &Surroundings) -> Vec<&str> {
        surroundings.links.iter().map(|(_, name)| name.as_str()).collect()
    }

    #[test]
    fn the_link_of_the_default_route_comes_first() {
        let links = [link(2, 2, ""), link(3, 3, ""), link(4, 4, "")].join(", ");
        let routes = [default_route(3, 254, 200), default_route(4, 254, 100), default_route(2, 20_001, 0)].join(", ");
        assert_eq!(names(&surroundings(&links, "", &routes)), ["l4", "l3", "l2"]);
    }

    #[test]
    fn links_that_are_no_enis_are_left_out() {
        let veth = r#", "kind": "veth""#;
        let links = [
            r#""1": {"index": 1, "name": "lo", "mac": "00:00:00:00:00:00", "is_up": true, "mtu": 65536}"#.to_string(),
            link(2, 2, ""),
            link(3, 3, veth),
            link(4, 4, r#", "kind": "bridge""#),
            link(5, 5, r#", "controller": 4"#),
            link(6, 6, veth),
            r#""7": {"index": 7, "name": "tun0", "kind": "tun", "is_up": true, "mtu": 1500}"#.to_string(),
        ];
        let routes = [default_route(6, 20_001, 0), default_route(7, 254, 0)].join(", ");
        assert_eq!(names(&surroundings(&links.join(", "), "", &routes)), ["l2", "l6"]);
    }

    #[test]
    fn loopback_is_no_ipv4() {
        let address = |net: &str| {
            format!(r#"[2, {{"net": "{net}", "is_deprecated": false, "has_prefix_route": true, "protocol": 0}}]"#)
        };
        let of = |net: &str| surroundings(&link(2, 2, ""), &address(net), "");
        assert!(of("127.0.0.1/8").is_ipv6_only && of("fd99::10/64").is_ipv6_only);
        assert!(!of("10.0.0.10/24").is_ipv6_only);
    }

    #[test]
    fn a_given_endpoint_is_the_only_one_and_ipv6_comes_first_without_ipv4() {
        let shown = |given, is_ipv6_only| {
            let surroundings = Surroundings { is_ipv6_only, ..Surroundings::default() };
            let endpoints = endpoints(given, &surroundings).unwrap();
            endpoints.iter().map(Endpoint::to_string).collect::<Vec<_>>()
        };
        assert_eq!(shown(Some("http://127.0.0.1:8080"), true), ["http://127.0.0.1:8080"]);
        assert_eq!(shown(None, false), ["http://169.254.169.254", "http://[fd00:ec2::254]"]);
        assert_eq!(shown(None, true), ["http://[fd00:ec2::254]", "http://169.254.169.254"]);
        assert!(matches!(endpoints(Some("ftp://x"), &Surroundings::default()), Err(Error::BadEndpoint { .. })));
    }

    #[test]
    fn every_link_has_its_turn() {
        let links: Vec<(MacAddr, String)> =
            (0..6u8).map(|n| (MacAddr::from_bytes(&[2, 0, 0, 0, 0, n]).unwrap(), format!("ens{n}"))).collect();
        let endpoints = [Endpoint::parse("http://169.254.169.254").unwrap()];
        let shown = |links: &[(MacAddr, String)], round| -> Vec<String> {
            let surroundings = Surroundings { links: links.to_vec(), is_ipv6_only: false };
            ways_by_links(&endpoints, &surroundings, round).iter().map(Way::shown).collect()
        };
        let tried: Vec<String> = (0..3).flat_map(|round| shown(&links, round)).collect();
        assert_eq!(tried.len(), 3 * MOST_LINKS);
        for (_, link) in &links {
            assert!(tried.iter().any(|way| way.contains(link.as_str())), "{link} is not in {tried:?}");
        }
        assert_eq!(shown(&links[..2], 1).len(), 2, "each once in a round");
        assert_eq!(shown(&[], 1).len(), 0);
    }
}
