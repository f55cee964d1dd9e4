//! What may be chosen for single ENIs.

use std::net::IpAddr;
use std::ops::Range;

use ipnet::IpNet;
use toml::de::DeValue;

use super::Rules;
use super::reading::RULES;
use super::show::quoted;
use super::table::{Table, Wrong, number, text, truth, word};

/// What is chosen for an ENI; none is as by default, or as for the whole machine.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Choices {
    /// Bytes, from what IPv6 needs to what a link of EC2's takes.
    pub mtu: Option<u32>,
    pub main_routes: Option<MainRoutes>,
    pub rules: Option<Rules>,
    pub routes: Vec<ExtraRoute>,
    /// Left alone, like an ignored one.
    pub unmanaged: Option<bool>,
    /// Kept apart from all that is not bound to it: it belongs to another VPC, where the same addresses mean others.
    pub isolate: Option<bool>,
}

/// Which of the ENI's routes `main` has, and with it traffic that is bound to no address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MainRoutes {
    None,
    /// Those to its subnet.
    Connected,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExtraRoute {
    pub to: IpNet,
    /// The VPC router if none is named.
    pub via: Option<IpAddr>,
    pub tables: Tables,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tables {
    Eni,
    Main,
    Both,
}

const MAIN_ROUTES: [(&str, MainRoutes); 2] = [("none", MainRoutes::None), ("connected", MainRoutes::Connected)];
const TABLES: [(&str, Tables); 3] = [("eni", Tables::Eni), ("main", Tables::Main), ("both", Tables::Both)];

impl Choices {
    /// What a later entry chooses wins; routes add up, but for those to the same destination.
    pub fn and_then(self, later: &Choices) -> Choices {
        let Choices { mtu, main_routes, rules, routes, unmanaged, isolate } = later.clone();
        let earlier = self.routes.into_iter().filter(|route| routes.iter().all(|later| later.to != route.to));
        Choices {
            mtu: mtu.or(self.mtu),
            main_routes: main_routes.or(self.main_routes),
            rules: rules.or(self.rules),
            routes: earlier.chain(routes.iter().copied()).collect(),
            unmanaged: unmanaged.or(self.unmanaged),
            isolate: isolate.or(self.isolate),
        }
    }

    pub fn read(table: &mut Table, span: &Range<usize>) -> Choices {
        let mut routes = Vec::new();
        let mtu = table.value("mtu", |value| number(value, 1280..=9216));
        let main_routes = table.value("main_routes", |value| word(value, &MAIN_ROUTES));
        let rules = table.value("rules", |value| word(value, &RULES));
        table.tables("routes", |table, span| routes.extend(route(table, span)));
        let unmanaged = table.value("unmanaged", truth);
        let isolate = table.value("isolate", truth);
        let choices = Choices {
            mtu: mtu.map(|mtu| mtu.value),
            main_routes: main_routes.map(|main_routes| main_routes.value),
            rules: rules.map(|rules| rules.value),
            routes,
            unmanaged: unmanaged.map(|unmanaged| unmanaged.value),
            isolate: isolate.map(|isolate| isolate.value),
        };
        if choices.isolate == Some(true) && choices.wants_main() {
            let hint = "take out main_routes, and table = \"main\" or \"both\" of its routes; or do not isolate it";
            table.wrong(span, "an isolated ENI has no routes in main", hint);
        }
        choices
    }

    /// Whether any of it goes to `main`.
    fn wants_main(&self) -> bool {
        let is_in_main = |route: &ExtraRoute| route.tables != Tables::Eni;
        self.main_routes == Some(MainRoutes::Connected) || self.routes.iter().any(is_in_main)
    }

    pub fn is_isolated(&self) -> bool {
        self.isolate == Some(true)
    }

    /// Each as TOML has it.
    pub fn values(&self) -> Vec<(&'static str, String)> {
        let Choices { mtu, main_routes, rules, routes, unmanaged, isolate } = self;
        let mut values = Vec::new();
        values.extend(mtu.map(|mtu| ("mtu", mtu.to_string())));
        values.extend(main_routes.map(|main_routes| ("main_routes", name(main_routes, &MAIN_ROUTES))));
        values.extend(rules.map(|rules| ("rules", name(rules, &RULES))));
        if !routes.is_empty() {
            let routes: Vec<String> = routes.iter().map(show).collect();
            values.push(("routes", format!("[{}]", routes.join(", "))));
        }
        values.extend(unmanaged.map(|unmanaged| ("unmanaged", unmanaged.to_string())));
        values.extend(isolate.map(|isolate| ("isolate", isolate.to_string())));
        values
    }
}

/// The word that stands for a meaning, in quotes.
pub fn name<T: PartialEq>(meaning: T, words: &[(&'static str, T)]) -> String {
    quoted(words.iter().find(|(_, other)| *other == meaning).map(|(name, _)| *name).unwrap_or_default())
}

fn show(route: &ExtraRoute) -> String {
    let ExtraRoute { to, via, tables } = route;
    let via = via.map(|via| format!("via = \"{via}\", ")).unwrap_or_default();
    format!("{{ to = \"{to}\", {via}table = {} }}", name(*tables, &TABLES))
}

fn route(table: &mut Table, span: &Range<usize>) -> Option<ExtraRoute> {
    let to = table.value("to", destination);
    let via = table.value("via", gateway).map(|via| via.value);
    let tables = table.value("table", |value| word(value, &TABLES)).map_or(Tables::Eni, |tables| tables.value);
    if !table.has("to") {
        table.wrong(span, "a route has to say where it leads", "add to = \"10.9.0.0/16\"");
    }
    let to = to?.value;
    if via.is_some_and(|via| via.is_ipv4() != to.addr().is_ipv4()) {
        table.wrong(span, "`to` and `via` are of different families", "write both in IPv4, or both in IPv6");
    }
    Some(ExtraRoute { to, via, tables })
}

fn destination(value: &DeValue) -> Result<IpNet, Wrong> {
    let text = text(value)?;
    let wrong = || Wrong::new(format!("\"{text}\" is not a network such as \"10.9.0.0/16\" or \"2600:1f16::/32\""));
    let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
    let network: IpNet = text.parse().map_err(|_| match address() {
        Some(network) => wrong().hint(format!("for this one address write \"{network}\"")),
        None => wrong(),
    })?;
    match network == network.trunc() {
        true => Ok(network),
        false => {
            let wrong = Wrong::new(format!("\"{text}\" has bits behind its length"));
            Err(wrong.hint(format!("did you mean \"{}\"?", network.trunc())))
        }
    }
}

fn gateway(value: &DeValue) -> Result<IpAddr, Wrong> {
    let text = text(value)?;
    text.parse().map_err(|_| Wrong::new(format!("\"{text}\" is not an address")))
}
