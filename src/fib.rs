//! Which way a packet would go: a model of the kernel's look-up of rules and routes (`net/core/fib_rules.c`,
//! `net/ipv4/fib_trie.c`, `net/ipv6/route.c`), for people who ask and for tests. What cannot be told from the
//! observed facts is called unknown, with the reason. The source address that the kernel would choose for an unbound
//! socket is not told: a route's preferred source and the order of addresses are not among the facts.

use std::cmp::Reverse;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use crate::net::{Family, HasFamily, Observed, Route, RouteKind, Rule};

/// As much of a packet as rules and routes look at.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Packet {
    /// None: the socket is not bound to an address, so that rules with `from` pass it by.
    pub source: Option<IpAddr>,
    pub destination: IpAddr,
    /// Index of the link by which it came. None: made on this machine, which rules know as `iif lo`.
    pub input: Option<u32>,
    /// Index of the link that the socket is bound to (SO_BINDTODEVICE); only for packets made on this machine.
    pub output: Option<u32>,
    /// The firewall mark.
    pub mark: u32,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer<'a> {
    pub way: Way,
    /// The rule that decided; any one of those that agree, if they have one priority. None when no rule did: nothing
    /// matched, or the socket's link alone settled it.
    pub rule: Option<&'a Rule>,
    /// The route that decided.
    pub route: Option<&'a Route>,
    /// Each rule that was tried, in order, with what came of it.
    pub trace: Vec<(&'a Rule, Outcome<'a>)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// It leaves by this link, to this gateway or straight to its destination.
    Out {
        link: u32,
        gateway: Option<IpAddr>,
    },
    /// It is for this machine itself.
    Here,
    Nowhere(Refusal),
    Unknown(Doubt),
}

/// Why a packet goes nowhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    NoRoute,
    /// The socket's link is not there, or down.
    LinkDown,
    Unreachable,
    Prohibited,
    /// Dropped without a word.
    Blackhole,
}

/// Why it cannot be told what the kernel would do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Doubt {
    /// A rule that may match has a part, or an action, that was not observed.
    Rule,
    /// Rules of one priority disagree, and the order in which they were added is not known.
    OrderOfRules { priority: u32 },
    /// Several routes with the same destination and metric, by which it goes different ways.
    EqualRoutes,
    /// A route that is not told in full: it has many next hops, or one of the other family, a type of service, a
    /// source prefix or a kind of its own.
    Route,
    /// What comes in for many goes to whoever has joined, which is not among the facts.
    Multicast,
}

/// What came of trying a rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome<'a> {
    NotMatched,
    /// It matched, but its table has no route for the packet.
    NoRoute,
    /// A route of kind `throw`: on to the next rule.
    Thrown(&'a Route),
    /// The route is too short, or by a link of the wrong group, for this rule.
    Suppressed(&'a Route),
    /// On to the rules of this priority.
    Jumped(u32),
    /// There is no rule where it would go on.
    NoTarget,
    Decided(Way, Option<&'a Route>),
}

/// `RTN_*` of `linux/rtnetlink.h`.
mod kind {
    pub const UNICAST: u8 = 1;
    pub const LOCAL: u8 = 2;
    pub const BROADCAST: u8 = 3;
    pub const ANYCAST: u8 = 4;
    pub const MULTICAST: u8 = 5;
    pub const BLACKHOLE: u8 = 6;
    pub const PROHIBIT: u8 = 8;
    pub const THROW: u8 = 9;
}

/// The kernel's decision on a packet.
///
/// A set of rules has lost the order in which rules of one priority were added, and the kernel tries them in that
/// order. So all of one priority are tried, and where those that decide do not agree the answer is unknown.
pub fn lookup<'a>(observed: &'a Observed, packet: &Packet) -> Answer<'a> {
    let mut answer = Answer { way: Way::Nowhere(Refusal::NoRoute), rule: None, route: None, trace: Vec::new() };
    if packet.output.is_some_and(|link| observed.links.get(&link).is_none_or(|link| !link.is_up)) {
        answer.way = Way::Nowhere(Refusal::LinkDown);
        return answer;
    }
    if let Some(way) = way_without_rules(observed, packet) {
        answer.way = way;
        return answer;
    }
    let of_family = |rule: &&Rule| rule.family == packet.destination.family();
    let rules: Vec<&Rule> = observed.rules.iter().filter(of_family).collect();
    let mut reached = 0;
    for tied in rules.chunk_by(|a, b| a.priority == b.priority) {
        if tied[0].priority < reached {
            continue;
        }
        let first = answer.trace.len();
        answer.trace.extend(tied.iter().map(|rule| (*rule, try_rule(observed, packet, rule))));
        match decision(&answer.trace[first..]) {
            None => {}
            Some(Decision::GoOn { priority }) => reached = priority,
            Some(Decision::Taken { way, rule, route }) => {
                (answer.way, answer.rule, answer.route) = (way, Some(rule), route);
                break;
            }
        }
    }
    // Where look-up fails, IPv4 takes whatever a socket is bound to for the destination's own link
    // (`ip_route_output_key_hash_rcu`: "apparently, routing tables are wrong").
    if let (Way::Nowhere(_), Family::V4, None, Some(link)) =
        (answer.way, packet.destination.family(), packet.input, packet.output)
    {
        (answer.way, answer.rule, answer.route) = (Way::Out { link, gateway: None }, None, None);
    }
    // "If multicast route do not exist use default one, but do not gateway in this case" (`__mkroute_output`).
    let is_direct = |route: &Route| is_broadcast(packet.destination) || route.destination.prefix_len() < 4;
    if let (IpAddr::V4(_), Way::Out { link, .. }, Some(route)) = (packet.destination, answer.way, answer.route)
        && is_for_many(packet.destination)
        && is_direct(route)
    {
        answer.way = Way::Out { link, gateway: None };
    }
    answer
}

/// Whether a packet to this address is for whoever listens. The broadcast addresses of networks are for routes to know.
pub fn is_for_many(destination: IpAddr) -> bool {
    destination.is_multicast() || is_broadcast(destination)
}

fn is_broadcast(destination: IpAddr) -> bool {
    destination == IpAddr::from(Ipv4Addr::BROADCAST)
}

/// The way of a packet for many, where the kernel looks at no rule for it: it leaves by the link that the socket is bound
/// to, or else by the one that has its source (`ip_route_output_key_hash_rcu`).
fn way_without_rules(observed: &Observed, packet: &Packet) -> Option<Way> {
    let Packet { source, destination, input, output, .. } = *packet;
    match (destination, input, output, source) {
        (to, Some(_), ..) if to.is_multicast() => Some(Way::Unknown(Doubt::Multicast)),
        (to, Some(_), ..) if is_broadcast(to) => Some(Way::Here),
        (IpAddr::V4(to), None, Some(link), _) if to.is_broadcast() || to.octets().starts_with(&[224, 0, 0]) => {
            Some(Way::Out { link, gateway: None })
        }
        (IpAddr::V4(_), None, None, Some(source)) if is_for_many(destination) => {
            let (link, _) = observed.addresses.iter().find(|(_, address)| address.net.addr() == source)?;
            Some(Way::Out { link: *link, gateway: None })
        }
        _ => None,
    }
}

#[derive(Clone, Copy)]
enum Decision<'a> {
    Taken { way: Way, rule: &'a Rule, route: Option<&'a Route> },
    GoOn { priority: u32 },
}

/// What rules of one priority decide together, if any of them decides.
fn decision<'a>(tried: &[(&'a Rule, Outcome<'a>)]) -> Option<Decision<'a>> {
    let mut decided = tried.iter().filter_map(|(rule, outcome)| match outcome {
        Outcome::Decided(way, route) => Some((Decision::Taken { way: *way, rule, route: *route }, rule)),
        Outcome::Jumped(priority) => Some((Decision::GoOn { priority: *priority }, rule)),
        Outcome::NotMatched | Outcome::NoRoute | Outcome::Thrown(_) | Outcome::Suppressed(_) | Outcome::NoTarget => {
            None
        }
    });
    let (first, rule) = decided.next()?;
    let is_same = |other: Decision| match (first, other) {
        (Decision::Taken { way, .. }, Decision::Taken { way: other, .. }) => way == other,
        (Decision::GoOn { priority }, Decision::GoOn { priority: other }) => priority == other,
        (Decision::Taken { .. }, Decision::GoOn { .. }) | (Decision::GoOn { .. }, Decision::Taken { .. }) => false,
    };
    match decided.all(|(other, _)| is_same(other)) {
        true => Some(first),
        false => {
            let way = Way::Unknown(Doubt::OrderOfRules { priority: rule.priority });
            Some(Decision::Taken { way, rule, route: None })
        }
    }
}

fn try_rule<'a>(observed: &'a Observed, packet: &Packet, rule: &Rule) -> Outcome<'a> {
    let are_selectors_met = are_selectors_met(observed, packet, rule);
    // What was not observed can only narrow the selectors, so without `not` those that are known can rule it out.
    if rule.has_more && (are_selectors_met || rule.is_inverted) {
        return Outcome::Decided(Way::Unknown(Doubt::Rule), None);
    }
    if are_selectors_met == rule.is_inverted {
        return Outcome::NotMatched;
    }
    if let Some(target) = rule.goto {
        let is_target = |other: &Rule| other.family == rule.family && other.priority == target;
        return if observed.rules.iter().any(is_target) { Outcome::Jumped(target) } else { Outcome::NoTarget };
    }
    let routes = find_routes(observed, packet, rule.table);
    let mut outcomes = routes.into_iter().map(|(link, route)| outcome(observed, packet, rule, link, route));
    let Some(first) = outcomes.next() else { return Outcome::NoRoute };
    match outcomes.all(|other| comes_to_the_same(first, other)) {
        true => first,
        false => Outcome::Decided(Way::Unknown(Doubt::EqualRoutes), None),
    }
}

/// What comes of a rule whose table has this route for the packet.
fn outcome<'a>(observed: &Observed, packet: &Packet, rule: &Rule, link: Option<u32>, route: &'a Route) -> Outcome<'a> {
    if route.kind == RouteKind::Other(kind::THROW) {
        return Outcome::Thrown(route);
    }
    if may_hide_another(packet, link, route) {
        return Outcome::Decided(Way::Unknown(Doubt::Route), Some(route));
    }
    let way = way(packet, link, route);
    // A route that refuses is an error to the kernel, and only a success is suppressed.
    if !matches!(way, Way::Nowhere(_)) {
        if rule.suppress_prefix_length.is_some_and(|length| u32::from(route.destination.prefix_len()) <= length) {
            return Outcome::Suppressed(route);
        }
        let group = link.and_then(|index| observed.links.get(&index)).map(|link| link.group);
        if rule.suppress_group.is_some() && rule.suppress_group == group {
            return Outcome::Suppressed(route);
        }
    }
    Outcome::Decided(way, Some(route))
}

/// Whether it is all one which of two equal routes the kernel takes.
fn comes_to_the_same(one: Outcome, other: Outcome) -> bool {
    match (one, other) {
        (Outcome::Thrown(_), Outcome::Thrown(_)) | (Outcome::Suppressed(_), Outcome::Suppressed(_)) => true,
        (Outcome::Decided(way, _), Outcome::Decided(other, _)) => way == other,
        _ => false,
    }
}

fn are_selectors_met(observed: &Observed, packet: &Packet, rule: &Rule) -> bool {
    let is_named = |index: Option<u32>, name: &String| {
        let link = index.and_then(|index| observed.links.get(&index));
        link.is_some_and(|link| link.name == *name || link.altnames.contains(name))
    };
    let is_from = rule.from.is_none_or(|from| match packet.source {
        Some(source) => from.contains(&source),
        // IPv4 compares with 0.0.0.0; IPv6 knows that there is none.
        None => from.prefix_len() == 0 || from.contains(&IpAddr::from(Ipv4Addr::UNSPECIFIED)),
    });
    let is_to = rule.to.is_none_or(|to| to.contains(&packet.destination));
    let is_in = rule.iif.as_ref().is_none_or(|name| match packet.input {
        None => name == "lo",
        some => is_named(some, name),
    });
    let is_out = rule.oif.as_ref().is_none_or(|name| is_named(packet.output, name));
    let is_marked = rule.mark.is_none_or(|mark| (mark.value ^ packet.mark) & mark.mask == 0);
    is_from && is_to && is_in && is_out && is_marked
}

/// The longest prefix's route of the lowest metric by which the packet may leave; several, if that does not tell them
/// apart.
///
/// IPv6 also prefers gateways of which it does not know that they are silent; that is not among the facts.
fn find_routes<'a>(observed: &'a Observed, packet: &Packet, table: u32) -> Vec<(Option<u32>, &'a Route)> {
    let rank = |route: &Route| (Reverse(route.destination.prefix_len()), route.metric);
    let in_table = observed.routes.iter().filter(|(_, route)| route.table == table);
    let usable: Vec<(Option<u32>, &Route)> = in_table
        .filter(|(link, route)| route.destination.contains(&packet.destination) && may_leave_by(packet, *link, route))
        .map(|(link, route)| (*link, route))
        .collect();
    let best = usable.iter().map(|(_, route)| rank(route)).min();
    usable.into_iter().filter(|(_, route)| Some(rank(route)) == best).collect()
}

/// A socket that is bound to a link passes over routes by others. Routes that refuse count for it in IPv4, which knows
/// no link for them; in IPv6 they are by the loopback link.
fn may_leave_by(packet: &Packet, link: Option<u32>, route: &Route) -> bool {
    let Some(output) = packet.output.filter(|_| packet.input.is_none()) else { return true };
    match route.kind {
        RouteKind::Unreachable | RouteKind::Other(kind::BLACKHOLE | kind::PROHIBIT | kind::THROW) => {
            packet.destination.family() == Family::V4
        }
        // A route of many links may have this one among them.
        RouteKind::Unicast | RouteKind::Other(_) => {
            link.is_none_or(|link| link == output) || may_hide_another(packet, link, route)
        }
    }
}

/// IPv6's dump goes from the first of many next hops to the last (`fib6_dump_node`), and does not tell a route without a gateway that
/// was added between them: by it a socket that is bound to its link may leave.
fn may_hide_another(packet: &Packet, link: Option<u32>, route: &Route) -> bool {
    let is_bound_elsewhere = packet.input.is_none() && packet.output.is_some() && packet.output != link;
    is_bound_elsewhere && route.kind == RouteKind::Other(kind::UNICAST) && packet.destination.family() == Family::V6
}

fn way(packet: &Packet, link: Option<u32>, route: &Route) -> Way {
    match (route.kind, link) {
        (RouteKind::Other(kind::BROADCAST), _) if packet.input.is_some() => Way::Here,
        (RouteKind::Other(kind::BROADCAST | kind::MULTICAST), Some(link)) if packet.input.is_none() => {
            Way::Out { link, gateway: None }
        }
        (RouteKind::Unicast, Some(link)) => Way::Out { link, gateway: route.gateway },
        (RouteKind::Unreachable, _) => Way::Nowhere(Refusal::Unreachable),
        (RouteKind::Other(kind::BLACKHOLE), _) => Way::Nowhere(Refusal::Blackhole),
        (RouteKind::Other(kind::PROHIBIT), _) => Way::Nowhere(Refusal::Prohibited),
        (RouteKind::Other(kind::LOCAL | kind::ANYCAST), _) => Way::Here,
        (RouteKind::Unicast, None) | (RouteKind::Other(_), _) => Way::Unknown(Doubt::Route),
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Refusal::NoRoute => "no rule leads to a route for it",
            Refusal::LinkDown => "the link that the socket is bound to is down or not there",
            Refusal::Unreachable => "a route says that its destination is unreachable",
            Refusal::Prohibited => "a route prohibits it",
            Refusal::Blackhole => "a route drops it silently",
        })
    }
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Doubt::Rule => write!(f, "a rule that may match has a part that eniup does not know"),
            Doubt::OrderOfRules { priority } => {
                write!(f, "rules of priority {priority} disagree, and which was added first is not known")
            }
            Doubt::EqualRoutes => write!(f, "several routes have the same destination and metric"),
            Doubt::Multicast => write!(f, "it comes in for many, and who has joined is not known"),
            Doubt::Route => write!(f, "the route has a part that eniup does not know, such as many next hops"),
        }
    }
}
