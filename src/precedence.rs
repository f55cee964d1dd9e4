//! Rules that follow from what others have configured: what has to be tried before the guard rule, because of routes that
//! it would take wrongly, and the way past rules of others that come before all of ours.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::config::Config;
use crate::cover::overlap;
use crate::desired::{Desired, DesiredEni, Wanted};
use crate::net::{Family, HasFamily, Link, MacAddr, Observed, Route, Rule};
use crate::place::find_link;
use crate::policy;

/// What is there, and what is wanted without these rules.
pub struct Circumstances<'a, 'b> {
    pub desired: &'a Desired,
    pub observed: &'a Observed,
    /// The ENIs that have their links here.
    pub placed: &'a BTreeMap<MacAddr, (&'b DesiredEni, &'b Link)>,
    pub primary: MacAddr,
    /// The links of the ENIs that are not the primary.
    pub others: &'a [&'a Link],
    /// By link index, as in `Observed`.
    pub routes: &'a BTreeSet<(Option<u32>, Route)>,
    pub rules: &'a BTreeSet<Rule>,
    /// Those among them that are `apart_from_others`.
    pub apart: &'a [OfEni<'b>],
    pub config: &'a Config,
}

impl<'a, 'b> Circumstances<'a, 'b> {
    /// The wanted rules of an ENI, but those that follow from what others have configured otherwise.
    fn rules_of(&self, eni: &'b DesiredEni) -> impl Iterator<Item = &'a Rule> {
        let is_its = move |(of, _): &&OfEni| of.is_some_and(|of| std::ptr::eq(of, eni));
        let rules = eni.rules.iter().map(|rule| &rule.object);
        rules.chain(self.apart.iter().filter(is_its).map(|(_, rule)| &rule.object))
    }
}

pub fn other_links<'a>(desired: &Desired, observed: &'a Observed, primary: MacAddr) -> Vec<&'a Link> {
    let macs = desired.enis.keys().chain(&desired.pending).chain(&desired.left_alone);
    macs.filter(|mac| **mac != primary).filter_map(|mac| find_link(*mac, observed).ok().flatten()).collect()
}

/// A rule, and the ENI that it is for; none: for all traffic.
pub type OfEni<'a> = (Option<&'a DesiredEni>, Wanted<Rule>);

/// The guard rule cannot tell that a link in a foreign group, or of an ENI that is left alone, is an ENI's, and would send
/// other ENIs' traffic by the routes in `main` by that link. So each such route gets rules before the guard, which send the other ENIs' traffic to
/// its destination by their own tables; and each longer route of a container, bridge or tunnel inside it a guard rule
/// for itself before those.
pub fn before_guard<'b>(circumstances: &Circumstances<'_, 'b>) -> Vec<OfEni<'b>> {
    let Circumstances { desired, observed, placed, rules: wanted, config, .. } = circumstances;
    let macs = desired.enis.keys().chain(&desired.pending).chain(&desired.left_alone);
    let eni_links: Vec<&Link> = macs.filter_map(|mac| find_link(*mac, observed).ok().flatten()).collect();
    let eni_link = |index: &Option<u32>| eni_links.iter().copied().find(|link| *index == Some(link.index));
    let is_left_alone = |link: &Link| link.mac.is_some_and(|mac| desired.left_alone.contains(&mac));
    let is_foreign = |link: &&Link| (link.group != 0 || is_left_alone(link)) && link.group != config.link_group;
    let mut rules = Vec::new();
    let routes = main_routes(circumstances);
    for (index, route) in &routes {
        let Some(link) = eni_link(index).filter(is_foreign) else { continue };
        let destination = route.destination;
        // A better one by another ENI's link may go with that link; a container's is the one to take.
        let is_better = |(index, other): &(Option<u32>, Route)| {
            other.destination == destination && other.metric < route.metric && eni_link(index).is_none()
        };
        if routes.iter().any(is_better) {
            continue;
        }
        for (eni, _) in placed.values().filter(|(_, own)| own.index != link.index) {
            let is_meant = |rule: &&Rule| rule.family == destination.family() && wanted.contains(rule);
            for rule in circumstances.rules_of(eni).filter(is_meant) {
                let Some(to) = narrower(rule.to, destination) else { continue };
                let rank = rule.priority.saturating_sub(eni.table).checked_div(config.subnet_rule_offset).unwrap_or(0);
                let priority = policy::priority_before_guard(config, &destination, rank);
                let rule = Rule { to: Some(to), priority, ..rule.clone() };
                let why = if is_left_alone(link) { "it is left alone" } else { "it stays in a foreign group" };
                let reason = format!("not by {}, which main has for {destination}: {why}", link.name);
                rules.push((Some(*eni), Wanted { object: rule, reason }));
            }
        }
        rules.extend(guards_inside(destination, &link.name, &routes, &eni_link, config));
    }
    rules.extend(to_own_networks(circumstances, &routes, &eni_link));
    let mut seen = BTreeSet::new();
    rules.retain(|(_, rule)| seen.insert(rule.object.clone()));
    rules
}

/// For each route of a container, bridge or tunnel that is for a part of this destination, which rules before the guard take out of its
/// hands: a guard rule for itself.
fn guards_inside<'a, 'b>(
    destination: IpNet,
    taker: &str,
    routes: &BTreeSet<(Option<u32>, Route)>,
    eni_link: &impl Fn(&Option<u32>) -> Option<&'a Link>,
    config: &Config,
) -> Vec<OfEni<'b>> {
    let is_inside = |inner: &Route| destination.contains(&inner.destination) && inner.destination != destination;
    let inner = routes.iter().filter(|(index, inner)| is_inside(inner) && eni_link(index).is_none());
    let guard = |(_, inner): &(Option<u32>, Route)| {
        let to = inner.destination;
        let guard = policy::guard_rule(config, to.family());
        let object = Rule { to: Some(to), priority: policy::priority_before_guard(config, &to, 0), ..guard };
        (None, Wanted { object, reason: format!("no ENI's, though inside {destination} by {taker}") })
    };
    inner.map(guard).collect()
}

/// `main` need not have an ENI's own subnet, nor what is chosen for its table. So the longest match there may be a route around it, as a
/// split tunnel has for all private networks, and the guard rule would follow that instead of the longer one in the ENI's table.
fn to_own_networks<'a, 'b>(
    circumstances: &Circumstances<'_, 'b>,
    routes: &BTreeSet<(Option<u32>, Route)>,
    eni_link: &impl Fn(&Option<u32>) -> Option<&'a Link>,
) -> Vec<OfEni<'b>> {
    let Circumstances { placed, primary, rules: wanted, config, .. } = circumstances;
    let others: Vec<IpNet> =
        routes.iter().filter(|(index, _)| eni_link(index).is_none()).map(|(_, route)| route.destination).collect();
    let is_taken = |to: &IpNet| {
        let around = |other: &IpNet| other.contains(to) && other != to;
        others.iter().any(around) && !others.contains(to)
    };
    let mut rules = Vec::new();
    for (eni, link) in placed.iter().filter(|(mac, _)| *mac != primary).map(|(_, placed)| *placed) {
        let own = eni.routes.iter().map(|route| &route.object);
        let own = own.filter(|route| route.table == eni.table && route.destination.prefix_len() > 0);
        let own: BTreeSet<IpNet> = own.map(|route| route.destination).filter(is_taken).collect();
        for to in own {
            for rule in circumstances.rules_of(eni).filter(|rule| rule.family == to.family() && wanted.contains(*rule))
            {
                let rank = rule.priority.saturating_sub(eni.table).checked_div(config.subnet_rule_offset).unwrap_or(0);
                let priority = policy::priority_before_guard(config, &to, rank);
                let object = Rule { to: Some(to), priority, ..rule.clone() };
                let reason = format!("{to} is {}'s, though inside a wider network that main has by no ENI", eni.id);
                rules.push((Some(eni), Wanted { object, reason }));
            }
            rules.extend(guards_inside(to, &link.name, routes, eni_link, config));
        }
    }
    rules
}

/// The routes of `main` that the guard rule looks at: others', ours to come, and those of ours that stay. Link-local ones are every link's,
/// and a packet to them is bound to its link.
fn main_routes(circumstances: &Circumstances) -> BTreeSet<(Option<u32>, Route)> {
    let is_looked_at = |route: &Route| {
        let length = u32::from(route.destination.prefix_len());
        route.table == policy::MAIN_TABLE && length > policy::GUARD_PREFIX_LENGTH && !policy::is_link_local(route)
    };
    let foreign = foreign_routes(circumstances);
    let routes = foreign.chain(circumstances.routes).filter(|(_, route)| is_looked_at(route)).copied();
    routes.chain(staying(circumstances).into_iter().filter(|(_, route)| is_looked_at(route))).collect()
}

fn foreign_routes<'a>(
    circumstances: &Circumstances<'a, '_>,
) -> impl Iterator<Item = &'a (Option<u32>, Route)> + use<'a> {
    let config = circumstances.config;
    circumstances.observed.routes.iter().filter(|(_, route)| !policy::owns_route(config, route))
}

/// What two destinations have in common; no limit is everything.
fn narrower(limit: Option<IpNet>, destination: IpNet) -> Option<IpNet> {
    match limit {
        Some(limit) if destination.contains(&limit) => Some(limit),
        Some(limit) if !limit.contains(&destination) => None,
        Some(_) | None => Some(destination),
    }
}

/// The way past rules of others that come before ours and would take what is an ENI's: full tunnels (wg-quick that started
/// after eniup, Tailscale with an exit node). Right before such a rule the ENIs' traffic goes on right behind it; and there
/// what was passed by is tried once more, as far as it is for specific destinations. Nobody else comes there without having
/// tried it itself.
///
/// What a rule's table has at the moment does not matter: an exit node is a route that comes and goes.
pub fn past_others<'b>(circumstances: &Circumstances<'_, 'b>, before_guard: &[OfEni<'b>]) -> Vec<OfEni<'b>> {
    let config = circumstances.config;
    let mut rules = Vec::new();
    for family in Family::BOTH {
        let sources = source_rules(circumstances, family);
        let ours = before_guard.iter().map(|(_, rule)| &rule.object).filter(|rule| rule.family == family);
        let ours: BTreeSet<u32> = ours.map(|rule| rule.priority).chain([config.guard_priority]).collect();
        for block in blocks(circumstances, family).filter(|_| !sources.is_empty()) {
            let Some(before) = block.free_before() else { continue };
            let Landing { priority: landing, parts } = block.landing(&ours, &sources, config);
            let why = format!("not by somebody's rule {}, which takes everything", block.taking(config));
            // They have to be there when the first packet comes.
            rules.extend(parts.into_iter().map(|object| {
                let reason =
                    format!("behind {}: what others have for certain destinations holds for ENIs, too", block.last);
                (None, Wanted { object, reason })
            }));
            rules.extend(sources.iter().map(|(eni, rule)| {
                let object = Rule { priority: before, goto: Some(landing), ..(*rule).clone() };
                (Some(*eni), Wanted { object, reason: why.clone() })
            }));
        }
    }
    rules
}

/// What the primary ENI's addresses send follows `main`. Where the default there is another ENI's (who asks DHCP on every ENI
/// gets one with the same metric from each, and the kernel takes which came first), they get the primary's own instead, right
/// before `main` would be looked up: its specific routes and the rules of others still go before.
pub fn before_main<'b>(circumstances: &Circumstances<'_, 'b>) -> Vec<OfEni<'b>> {
    let Some((eni, _)) = circumstances.placed.get(&circumstances.primary) else { return Vec::new() };
    let mut rules = Vec::new();
    for family in Family::BOTH.into_iter().filter(|family| is_default_of_others(circumstances, *family)) {
        let narrowed = of_primary(circumstances, family);
        let Some(priorities) = free_before_main(circumstances, family, &narrowed) else { continue };
        for rule in narrowed {
            let [specific, default] = policy::rules_before_main(rule, priorities);
            let reason = format!("what main has for certain destinations holds for {}", eni.id);
            rules.push((None, Wanted { object: specific, reason }));
            let reason = format!("main's default is another ENI's, and {} has its own", eni.id);
            rules.push((Some(*eni), Wanted { object: default, reason }));
        }
    }
    rules
}

/// What all traffic of the primary would be led to its table by.
fn of_primary<'b>(circumstances: &Circumstances<'_, 'b>, family: Family) -> Vec<&'b Rule> {
    let primary = circumstances.placed.get(&circumstances.primary).map(|(eni, _)| *eni);
    primary.into_iter().flat_map(|eni| &eni.narrowed).filter(|rule| rule.family == family).collect()
}

/// The last two priorities before `main`'s rule that nobody has, and behind which somebody's rules are for other sources only.
fn free_before_main(circumstances: &Circumstances, family: Family, narrowed: &[&Rule]) -> Option<[u32; 2]> {
    let Circumstances { observed, rules, config, .. } = circumstances;
    let others = observed.rules.iter().filter(|rule| rule.family == family && !policy::owns_rule(config, rule));
    let is_for_others = |rule: &Rule| {
        let is_elsewhere = |from: IpNet| !narrowed.iter().filter_map(|rule| rule.from).any(|own| overlap(&own, &from));
        !rule.is_inverted && rule.from.is_some_and(is_elsewhere)
    };
    let last_of_ours = rules.iter().filter(|rule| rule.family == family).map(|rule| rule.priority).max()?;
    let decisive = others.clone().filter(|rule| rule.priority < policy::MAIN_PRIORITY && !is_for_others(rule));
    let first = decisive.map(|rule| rule.priority).chain([last_of_ours]).max()? + 1;
    let taken: BTreeSet<u32> = others.map(|rule| rule.priority).collect();
    let mut free = (first..policy::MAIN_PRIORITY).rev().filter(|priority| !taken.contains(priority));
    let (default, specific) = (free.next()?, free.next()?);
    Some([specific, default])
}

/// Whether the best default in `main`, there or to come, leaves by an ENI that is not the primary, or may.
fn is_default_of_others(circumstances: &Circumstances, family: Family) -> bool {
    let Circumstances { others, routes, .. } = circumstances;
    let others: BTreeSet<u32> = others.iter().map(|link| link.index).collect();
    let staying = staying(circumstances);
    policy::is_best_default_by(&others, foreign_routes(circumstances).chain(*routes).chain(&staying), family)
}

/// What is for unbound traffic, and what an ENI has that nobody knows more of, takes nothing that the primary's addresses send: to where
/// `main` leads by another ENI as chosen, or by one that is pending, that goes by the primary's own table, as to those ENIs'
/// subnets. Somebody's routes by the primary's link are followed: those inside that destination by rules of their own.
pub fn apart_from_others<'b>(circumstances: &Circumstances<'_, 'b>) -> Vec<OfEni<'b>> {
    let Some((eni, _)) = circumstances.placed.get(&circumstances.primary) else { return Vec::new() };
    let mut rules = BTreeMap::new();
    let config = circumstances.config;
    for Detour { to, link, inside, .. } in detours(circumstances).into_iter().filter(|detour| detour.around.is_none()) {
        for rule in of_primary(circumstances, to.family()) {
            let reason =
                format!("{}'s own traffic to {to}, which main has by {}, leaves by {}", eni.id, link.name, eni.id);
            rules.entry(Rule { to: Some(to), ..rule.clone() }).or_insert((Some(*eni), reason));
            for to in &inside {
                let priority = policy::priority_before_guard(config, to, 0);
                let rule = Rule { to: Some(*to), table: policy::MAIN_TABLE, priority, ..rule.clone() };
                rules
                    .entry(rule)
                    .or_insert((None, format!("somebody's route to {to} by the primary's link is followed")));
            }
        }
    }
    let new = rules.into_iter().filter(|(rule, _)| !circumstances.rules.contains(rule));
    new.map(|(object, (eni, reason))| (eni, Wanted { object, reason })).collect()
}

/// A destination to which `main` leads by another ENI than the primary.
struct Detour<'a> {
    to: IpNet,
    link: &'a Link,
    /// Destinations of somebody's routes by the primary's link that are parts of it.
    inside: Vec<IpNet>,
    /// Of such a route that it is a part of.
    around: Option<IpNet>,
}

fn detours<'a>(circumstances: &Circumstances<'a, '_>) -> Vec<Detour<'a>> {
    let Circumstances { desired, placed, primary, others, routes, .. } = circumstances;
    let Some((eni, of_primary)) = placed.get(primary) else { return Vec::new() };
    let of = |index: &Option<u32>| others.iter().copied().find(|link| *index == Some(link.index));
    let is_known_otherwise = |mac: &MacAddr| desired.left_alone.contains(mac) || desired.isolated.contains(mac);
    let is_pending =
        |link: &Link| link.mac.is_some_and(|mac| desired.pending.contains(&mac) && !is_known_otherwise(&mac));
    let foreign = || foreign_routes(circumstances).filter(|(_, route)| policy::is_mains_for_some(route));
    let staying = staying(circumstances);
    // What has no gateway may be its subnet.
    let by_pending = foreign().filter(|(index, route)| route.gateway.is_none() && of(index).is_some_and(is_pending));
    // An isolated ENI's subnet means other machines than the primary's, if both are called the same.
    let subnets = || eni.routes.iter().map(|route| route.object.destination).filter(|net| net.prefix_len() > 0);
    let is_isolated = |link: &Link| link.mac.is_some_and(|mac| desired.isolated.contains(&mac));
    let is_primarys = |route: &Route| subnets().any(|subnet| subnet.contains(&route.destination));
    let by_isolated = foreign().filter(|(index, route)| of(index).is_some_and(is_isolated) && is_primarys(route));
    let leading = by_pending.chain(by_isolated).chain(routes.iter()).chain(&staying);
    let leading = leading.filter(|(_, route)| policy::is_mains_for_some(route));
    // The table has these, too.
    let has = |net: &IpNet| eni.routes.iter().any(|route| route.object.destination == *net);
    let is_own = |(index, route): &&(Option<u32>, Route)| *index == Some(of_primary.index) && !has(&route.destination);
    let own: Vec<&Route> = foreign().filter(is_own).map(|(_, route)| route).collect();
    let detours = leading.filter_map(|(index, route)| {
        let (to, link) = (route.destination, of(index)?);
        let is_better = |own: &&&Route| own.destination == to && own.metric <= route.metric;
        let other = || own.iter().filter(|own| own.destination != to).map(|own| own.destination);
        let inside = other().filter(|own| to.contains(own)).collect();
        let around = other().find(|own| own.contains(&to));
        own.iter().find(is_better).is_none().then_some(Detour { to, link, inside, around })
    });
    detours.collect()
}

/// Of our routes those that stay though they are not wanted now: by ENIs that keep what they have.
fn staying(circumstances: &Circumstances) -> Vec<(Option<u32>, Route)> {
    let Circumstances { observed, placed, others, config, .. } = circumstances;
    let is_placed = |link: &Link| placed.values().any(|(_, placed)| placed.index == link.index);
    let keepers: BTreeSet<Option<u32>> =
        others.iter().filter(|link| !is_placed(link)).map(|link| Some(link.index)).collect();
    if keepers.is_empty() {
        return Vec::new();
    }
    let stays = |(index, route): &&(Option<u32>, Route)| policy::owns_route(config, route) && keepers.contains(index);
    observed.routes.iter().filter(stays).copied().collect()
}

/// What others have that is not to be got round, in words.
pub fn limits(circumstances: &Circumstances) -> Vec<String> {
    let Circumstances { observed, rules, config, .. } = circumstances;
    let last = |family| rules.iter().filter(|rule| rule.family == family).map(|rule| rule.priority).max().unwrap_or(0);
    let is_between = |rule: &&Rule| (config.guard_priority..last(rule.family)).contains(&rule.priority);
    let others =
        observed.rules.iter().filter(|rule| !policy::owns_rule(config, rule) && may_take_everything(rule, config));
    let between = others.filter(is_between).map(|rule| {
        let (priority, guard) = (rule.priority, config.guard_priority);
        format!(
            "somebody's rule {priority} comes between eniup's and takes traffic of ENIs: give it a priority below {guard}"
        )
    });
    let blocks = Family::BOTH.into_iter().flat_map(|family| blocks(circumstances, family));
    let before = blocks.flat_map(|block| {
        let unpassed = block.free_before().is_none().then(|| {
            let taking = block.taking(config);
            format!("somebody's rule {taking} takes traffic of ENIs, and no priority is free before it: give it a larger one")
        });
        let unheeded = block.rules.iter().filter(|rule| !may_take_everything(rule, config) && is_beyond_words(rule));
        let unheeded = unheeded.map(|rule| {
            let (priority, taking) = (rule.priority, block.taking(config));
            format!(
                "somebody's rule {priority} does not hold for ENIs, which go past the one at {taking} that takes \
                 everything: leave room between the two"
            )
        });
        unpassed.into_iter().chain(unheeded).collect::<Vec<String>>()
    });
    let followed = detours(circumstances).into_iter().filter_map(|Detour { to, link, around, .. }| {
        let (own, name) = (around?, &link.name);
        Some(format!(
            "main has {to} by {name} and {own} by the primary's link: what the primary's addresses send there goes as main says, \
             and by {name} the VPC drops it"
        ))
    });
    let is_stuck = |family: &Family| {
        let narrowed = of_primary(circumstances, *family);
        let is_needed = !narrowed.is_empty() && is_default_of_others(circumstances, *family);
        is_needed && free_before_main(circumstances, *family, &narrowed).is_none()
    };
    let stuck = Family::BOTH.into_iter().filter(is_stuck).map(|family| {
        format!(
            "main's default for {family} is another ENI's, and what the primary's addresses send follows it: somebody's rule \
             right before main leaves no priority free for a better one"
        )
    });
    between.chain(before).chain(followed).chain(stuck).collect()
}

/// Rules of others with no room between them, at least one of which may take everything.
struct Block<'a> {
    rules: Vec<&'a Rule>,
    last: u32,
    /// The first rule behind it that is somebody else's; none before ours.
    next: Option<u32>,
    /// Somebody's `goto` leads into it, so that not all who come to its end have tried all of it.
    is_entered: bool,
}

/// Where those go on that went past a block, and what is tried there once more.
struct Landing {
    priority: u32,
    parts: Vec<Rule>,
}

fn blocks<'a>(circumstances: &Circumstances<'a, '_>, family: Family) -> impl Iterator<Item = Block<'a>> {
    let others = others_before_guard(circumstances, family);
    // With one free priority, what goes on behind the first would stand beside what goes past the second.
    let runs: Vec<Vec<&Rule>> = others.chunk_by(|a, b| b.priority - a.priority <= 2).map(<[&Rule]>::to_vec).collect();
    let block = move |run: &Vec<&'a Rule>| {
        let (first, last) = (run[0].priority, run[run.len() - 1].priority);
        let next = others.iter().map(|rule| rule.priority).find(|priority| *priority > last);
        let is_entered = others.iter().filter_map(|rule| rule.goto).any(|target| (first + 1..=last).contains(&target));
        Block { rules: run.clone(), last, next, is_entered }
    };
    let blocks: Vec<Block> = runs.iter().map(block).collect();
    let config = circumstances.config;
    blocks.into_iter().filter(|block| block.rules.iter().any(|rule| may_take_everything(rule, config)))
}

impl Block<'_> {
    /// The priority of the first rule that may take everything.
    fn taking(&self, config: &Config) -> u32 {
        let taking = self.rules.iter().find(|rule| may_take_everything(rule, config));
        taking.map_or(self.last, |rule| rule.priority)
    }

    fn free_before(&self) -> Option<u32> {
        self.rules[0].priority.checked_sub(1).filter(|priority| *priority > 0)
    }

    /// Right behind it; at the guard rule, or what of ours comes before that, where nothing of others is in between.
    fn landing(&self, ours: &BTreeSet<u32>, sources: &[(&DesiredEni, &Rule)], config: &Config) -> Landing {
        let repeated = self.rules.iter().filter(|_| !self.is_entered);
        let parts: Vec<Rule> = repeated.filter_map(|rule| specific_part(rule, sources, config)).collect();
        let ours = ours.iter().copied().find(|priority| *priority > self.last).unwrap_or(config.guard_priority);
        if self.next.is_none() && ours == self.last + 1 {
            let numbered = parts.into_iter().enumerate();
            let parts =
                numbered.map(|(n, rule)| Rule { priority: policy::priority_after_guard(config, n), ..rule }).collect();
            return Landing { priority: ours, parts };
        }
        let first = self.last + 1;
        // One to land on that does nothing, where nothing is to be tried.
        let nothing = policy::landing_rule(config, self.rules[0].family, first);
        let parts = if parts.is_empty() { vec![nothing] } else { parts };
        let end = self.next.map_or(ours, |next| next.min(ours)) - 1;
        let numbered = (first..).zip(parts);
        let parts = numbered.map(|(priority, rule)| Rule { priority: priority.min(end), ..rule }).collect();
        Landing { priority: first, parts }
    }
}

/// What cannot be said again: it is not known in full, or leads to other rules.
fn is_beyond_words(rule: &Rule) -> bool {
    rule.has_more || rule.goto.is_some()
}

fn others_before_guard<'a>(circumstances: &Circumstances<'a, '_>, family: Family) -> Vec<&'a Rule> {
    let Circumstances { observed, config, .. } = circumstances;
    let of_family = observed.rules.iter().filter(|rule| rule.family == family);
    of_family.filter(|rule| rule.priority < config.guard_priority && !policy::owns_rule(config, rule)).collect()
}

/// The rules that lead the traffic of the ENIs that are here to their own tables.
fn source_rules<'a, 'b>(circumstances: &Circumstances<'a, 'b>, family: Family) -> Vec<(&'b DesiredEni, &'a Rule)> {
    let of_eni = |(eni, _): &(&'b DesiredEni, &'b Link)| -> Vec<(&'b DesiredEni, &'a Rule)> {
        let eni = *eni;
        // Those to the last resort say the same once more.
        let rules = circumstances.rules_of(eni).filter(|rule| rule.table == eni.table);
        rules
            .filter(|rule| rule.family == family && circumstances.rules.contains(*rule))
            .map(|rule| (eni, rule))
            .collect()
    };
    circumstances.placed.values().flat_map(of_eni).collect()
}

/// Whether packets that nobody marked, from an ENI's address to anywhere, may match it and be sent elsewhere. Rules for
/// certain sources or destinations are somebody's express wish.
fn may_take_everything(rule: &Rule, config: &Config) -> bool {
    let is_for_us = rule.mark.is_none_or(|mark| mark.value & mark.mask == 0)
        && rule.iif.as_ref().is_none_or(|iif| iif == "lo")
        && rule.oif.is_none();
    let is_matching = match rule.is_inverted {
        false => is_for_us && is_short(rule.from) && is_short(rule.to),
        true => !is_for_us || rule.from.is_some() || rule.to.is_some() || rule.has_more,
    };
    let is_way_out = match rule.goto {
        // One that leads past ours.
        Some(target) => target > config.guard_priority,
        None => ![0, policy::LOCAL_TABLE].contains(&rule.table),
    };
    is_matching && is_way_out && rule.suppress_prefix_length.is_none_or(|length| length < policy::GUARD_PREFIX_LENGTH)
}

fn is_short(net: Option<IpNet>) -> bool {
    net.is_none_or(|net| u32::from(net.prefix_len()) <= policy::GUARD_PREFIX_LENGTH)
}

/// As much of somebody's rule as holds for the ENIs' traffic, too: its table's specific routes by what is no ENI's link, as
/// the guard rule has it for `main`; all of it if the rule itself is for certain sources or destinations.
fn specific_part(rule: &Rule, sources: &[(&DesiredEni, &Rule)], config: &Config) -> Option<Rule> {
    let is_general = rule.is_inverted || is_short(rule.from) && is_short(rule.to);
    let meets = |from: IpNet| sources.iter().filter_map(|(_, source)| source.from).any(|own| overlap(&own, &from));
    let is_ours = policy::MAIN_TABLE == rule.table && is_general;
    if is_beyond_words(rule) || is_ours || !rule.is_inverted && !rule.from.is_none_or(meets) {
        return None;
    }
    let rule = Rule { protocol: config.mark, ..rule.clone() };
    if !is_general || rule.table == policy::LOCAL_TABLE {
        return Some(rule);
    }
    let length = rule.suppress_prefix_length.unwrap_or(0).max(policy::GUARD_PREFIX_LENGTH);
    let suppress_group = rule.suppress_group.or(Some(config.link_group));
    Some(Rule { suppress_prefix_length: Some(length), suppress_group, ..rule })
}
