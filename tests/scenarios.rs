//! Scenario folders with golden plans, and what holds for all of them together.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::sync::LazyLock;

use eniup::config::Config;
use eniup::ledger::Ledger;
use eniup::net::{Address, HasFamily, Observed, Route, RouteKind, Rule};
use eniup::operation::Operation;
use eniup::plan::Plan;
use eniup::proof::{Notes, Taken, judge};
use eniup::release::release;
use eniup::{policy, trouble};
use proptest::prelude::*;
use support::{Scenario, apply, plan_for, scenarios};

/// The plan as `eniup plan` prints it, with what it warns of as comments below.
fn shown(attached: &eniup::eni::Attached, plan: &Plan) -> String {
    let mut text = String::new();
    for step in &plan.steps {
        text += &format!("{step}\n");
    }
    for note in &plan.notes {
        text += &format!("# note: {note}\n");
    }
    for (eni, trouble) in trouble::preview_troubles(attached, plan) {
        text += &format!("# {eni} is {}: {}\n", trouble.state, trouble.why);
    }
    text
}

/// `UPDATE_GOLDENS=1 cargo test` writes them; the difference is for the reviewer.
#[test]
fn every_scenario_plans_as_its_golden_says() {
    for scenario in scenarios().unwrap() {
        let golden = scenario.folder.join("plan.txt");
        let observed = scenario.observed();
        let plan = shown(&scenario.selected(&observed), &scenario.plan(&observed));
        if std::env::var_os("UPDATE_GOLDENS").is_some() {
            fs::write(&golden, &plan).unwrap();
        }
        let expected = fs::read_to_string(&golden).unwrap_or_default();
        assert_eq!(plan, expected, "scenario {}", scenario.name);
    }
}

#[test]
fn after_a_plan_is_carried_out_nothing_is_left_to_do() {
    for scenario in scenarios().unwrap() {
        let mut observed = scenario.observed();
        let plan = scenario.plan(&observed);
        apply(&mut observed, &plan);
        assert_eq!(scenario.plan(&observed).steps, [], "scenario {}", scenario.name);
    }
}

#[test]
fn pending_or_disputed_metadata_removes_nothing_of_that_eni() {
    for name in [
        "pending-metadata-removes-nothing",
        "link-in-a-bridge-is-left-alone",
        "mac-on-two-links-is-left-alone",
        "lost-ipv4-list-of-a-dual-stack-eni-removes-nothing",
        "lost-addresses-of-the-primary-remove-nothing",
        "lost-addresses-of-an-eni-with-a-link-remove-nothing",
    ] {
        let scenario = scenarios().unwrap().into_iter().find(|scenario| scenario.name == name).unwrap();
        let plan = scenario.plan(&scenario.observed());
        let removal = plan.steps.iter().find(|step| is_removal(&step.operation) && !is_superseded(&step.operation));
        assert_eq!(removal, None, "scenario {name}");
    }
}

fn is_removal(operation: &Operation) -> bool {
    match operation {
        Operation::DeleteAddress { .. } | Operation::DeleteRule { .. } | Operation::DeleteRoute { .. } => true,
        Operation::ResetLink { .. } => true,
        Operation::SetLink { .. }
        | Operation::AddRoute { .. }
        | Operation::AddRule { .. }
        | Operation::AddAddress { .. }
        | Operation::ChangeAddress { .. } => false,
    }
}

/// A ready ENI's rule that gives way to finer ones for the same addresses.
fn is_superseded(operation: &Operation) -> bool {
    matches!(operation, Operation::DeleteRule { rule } if rule.table == 20002)
}

fn ignoring(what: &str) -> Config {
    let text = Ok(format!("[[ignore]]\n{what}\n"));
    eniup::config::read(&[eniup::config::File { name: "config.toml".into(), text }]).unwrap().config
}

/// What goes before the rules of all ENIs is not taken from under rules that stay, or containers' traffic would follow those.
#[test]
fn who_ignores_enis_that_were_configured_finds_them_as_they_were() {
    for scenario in scenarios().unwrap() {
        let name = &scenario.name;
        let mut observed = scenario.observed();
        let plan = scenario.plan(&observed);
        apply(&mut observed, &plan);
        let guards = |observed: &Observed| -> BTreeSet<Rule> {
            let is_shared =
                |rule: &&Rule| policy::owns_rule(&Config::default(), rule) && rule.table < policy::TABLE_BASE;
            observed.rules.iter().filter(is_shared).cloned().collect()
        };

        let all = Scenario { config: ignoring("id = \"*\""), ..scenario.clone() };
        assert_eq!(all.plan(&observed).steps, [], "{name}: all ignored");

        let secondaries = scenario.attached.ready.keys().chain(scenario.attached.pending.keys());
        let secondaries: Vec<String> =
            secondaries.filter(|mac| **mac != scenario.attached.primary).map(|mac| format!("{mac:?}")).collect();
        if !secondaries.is_empty() {
            let but_primary = Scenario { config: ignoring(&format!("mac = {secondaries:?}")), ..scenario.clone() };
            let mut after = observed.clone();
            apply(&mut after, &but_primary.plan(&observed));
            assert_eq!(guards(&after), guards(&observed), "{name}: all but the primary ignored");
        }

        let config = ignoring("link = \"*\"");
        let mut after = observed.clone();
        apply(&mut after, &release(&observed, None, &Ledger::default(), &config));
        assert_eq!(guards(&after), guards(&observed), "{name}: released");
    }
}

/// Objects of every sort that are not ours, some of them hard to tell from ours.
fn foreign(observed: &mut Observed) {
    let config = Config::default();
    for index in observed.links.keys().copied().collect::<Vec<_>>() {
        let net = format!("10.99.{index}.1/24").parse().unwrap();
        let address = Address { net, is_deprecated: false, has_prefix_route: true, is_leased: false, protocol: 0 };
        observed.addresses.insert((index, address));
        let net = format!("10.98.{index}.1/24").parse().unwrap();
        observed.addresses.insert((index, Address { net, protocol: 175, ..address }));
        for table in [254, 20001, 10001] {
            let route = Route {
                destination: "172.31.0.0/16".parse().unwrap(),
                kind: RouteKind::Unicast,
                gateway: None,
                is_onlink: false,
                table,
                metric: index,
                protocol: 4,
            };
            observed.routes.insert((Some(index), route));
        }
    }
    // Our mark, but of a type that we never write.
    let multipath = Route {
        destination: "172.30.0.0/16".parse().unwrap(),
        kind: RouteKind::Other(1),
        gateway: None,
        is_onlink: false,
        table: 20001,
        metric: 0,
        protocol: config.mark,
    };
    observed.routes.insert((None, multipath));
    for protocol in [0, 3, 175, 177] {
        for priority in [100, 19900, 20001, 24001, 32000] {
            let rule = Rule {
                from: Some("10.0.1.0/24".parse().unwrap()),
                iif: Some("lo".into()),
                protocol,
                ..policy::rule(&config, eniup::net::Family::V4, priority, 20001)
            };
            observed.rules.insert(rule);
        }
    }
    // Our mark, but with a part that we never write.
    let more = Rule { has_more: true, ..policy::rule(&config, eniup::net::Family::V4, 20001, 20001) };
    observed.rules.insert(more);
}

/// A route in `main` is everybody's: while it is there, so are the rules that keep the primary from it and the addresses of its ENI.
fn what_is_in_main_comes_last_and_goes_first(plan: &Plan, name: &str) {
    let is_mains = |route: &Route| route.table == policy::MAIN_TABLE;
    let place = |is: &dyn Fn(&Operation) -> bool| -> Vec<usize> {
        (0..plan.steps.len()).filter(|n| is(&plan.steps[*n].operation)).collect()
    };
    let comes = place(&|operation| matches!(operation, Operation::AddRoute { route, .. } if is_mains(route)));
    let goes = place(&|operation| matches!(operation, Operation::DeleteRoute { route, .. } if is_mains(route)));
    let adds = place(&|operation| matches!(operation, Operation::AddRule { .. } | Operation::AddAddress { .. }));
    let takes = place(&|operation| matches!(operation, Operation::DeleteRule { .. } | Operation::DeleteAddress { .. }));
    assert!(comes.iter().all(|comes| adds.iter().all(|other| other < comes)), "{name}: {plan:#?}");
    assert!(goes.iter().all(|goes| takes.iter().all(|other| goes < other)), "{name}: {plan:#?}");
}

#[test]
fn from_any_scenario_to_any_other_one_run_converges_and_nothing_foreign_is_touched() {
    let scenarios = scenarios().unwrap();
    for from in &scenarios {
        for to in &scenarios {
            let name = format!("{} → {}", from.name, to.name);
            let mut observed = from.observed();
            foreign(&mut observed);
            let before = observed.clone();
            apply(&mut observed, &plan_for(&from.attached, &before));
            let plan = to.plan(&observed);
            what_is_in_main_comes_last_and_goes_first(&plan, &name);
            apply(&mut observed, &plan);
            assert_eq!(to.plan(&observed).steps, [], "{name}");
            assert_foreign_untouched(&before, &observed, &name);

            let plan = release(&observed, None, &Ledger::default(), &Config::default());
            apply(&mut observed, &plan);
            assert_foreign_untouched(&before, &observed, &name);
            let config = Config::default();
            assert!(!observed.addresses.iter().any(|(_, address)| policy::owns_address(&config, address)), "{name}");
            assert!(!observed.routes.iter().any(|(_, route)| policy::owns_route(&config, route)), "{name}");
            assert!(!observed.rules.iter().any(|rule| policy::owns_rule(&config, rule)), "{name}");
        }
    }
}

/// One run on a kernel older than 5.18, which forgets the mark of addresses.
fn run_on_an_old_kernel(attached: &eniup::eni::Attached, observed: &mut Observed, ledger: &mut Ledger) -> usize {
    let mut recalled = ledger.recall(observed.clone(), Config::default().mark);
    let plan = plan_for(attached, &recalled);
    *ledger = ledger.noting(&plan.steps, &recalled);
    apply(&mut recalled, &plan);
    *observed = forgetting(recalled);
    plan.steps.len()
}

fn forgetting(mut observed: Observed) -> Observed {
    let forget = |(index, address)| (index, Address { protocol: 0, ..address });
    observed.addresses = observed.addresses.into_iter().map(forget).collect();
    observed
}

#[test]
fn on_a_kernel_that_forgets_the_mark_of_addresses_the_ledger_says_which_are_ours() {
    let scenarios = scenarios().unwrap();
    let changing: Vec<_> = scenarios.iter().filter(|scenario| !scenario.folder.join("machine.json").exists()).collect();
    for (scenario, before) in changing.iter().filter_map(|scenario| Some((scenario, scenario.before.as_ref()?))) {
        let name = &scenario.name;
        let fresh = eniup::plan::fresh_machine(before);
        let mut observed = fresh.clone();
        foreign(&mut observed);
        let mut observed = forgetting(observed);
        let untouched = observed.clone();
        let mut ledger = Ledger::default();
        assert!(run_on_an_old_kernel(before, &mut observed, &mut ledger) > 0, "{name}");
        assert_eq!(run_on_an_old_kernel(before, &mut observed, &mut ledger), 0, "{name}: a second run");

        run_on_an_old_kernel(&scenario.attached, &mut observed, &mut ledger);
        assert_eq!(
            run_on_an_old_kernel(&scenario.attached, &mut observed, &mut ledger),
            0,
            "{name}: the next second run"
        );
        let mut remembering = untouched.clone();
        for attached in [before, &scenario.attached] {
            let plan = plan_for(attached, &remembering);
            apply(&mut remembering, &plan);
        }
        assert_eq!(observed.addresses, forgetting(remembering).addresses, "{name}");

        let mut recalled = ledger.recall(observed, Config::default().mark);
        let release = release(&recalled, None, &ledger, &Config::default());
        apply(&mut recalled, &release);
        assert_eq!(forgetting(recalled).addresses, untouched.addresses, "{name}: release");
    }
}

#[test]
fn on_a_kernel_that_remembers_marks_the_ledger_claims_no_address() {
    let scenario = scenarios().unwrap().into_iter().find(|scenario| scenario.name == "two-subnets-dual-stack").unwrap();
    let fresh = scenario.observed();
    let plan = scenario.plan(&fresh);
    let ledger = Ledger::default().noting(&plan.steps, &fresh);
    let mut observed = fresh;
    apply(&mut observed, &plan);
    // Somebody has replaced one of ours by the same of his own.
    let (index, address) = *observed.addresses.iter().next().unwrap();
    observed.addresses.remove(&(index, address));
    observed.addresses.insert((index, Address { protocol: 0, ..address }));
    assert_eq!(ledger.recall(observed.clone(), Config::default().mark), observed);
}

fn assert_foreign_untouched(before: &Observed, after: &Observed, name: &str) {
    let config = Config::default();
    for key in before.addresses.iter().filter(|(_, address)| !policy::owns_address(&config, address)) {
        assert!(after.addresses.contains(key), "{name}: {key:?} is gone");
    }
    for key in before.routes.iter().filter(|(_, route)| !policy::owns_route(&config, route)) {
        assert!(after.routes.contains(key), "{name}: {key:?} is gone");
    }
    for rule in before.rules.iter().filter(|rule| !policy::owns_rule(&config, rule)) {
        assert!(after.rules.contains(rule), "{name}: {rule:?} is gone");
    }
    // Whatever mark they carry: we make none of these.
    for key in before.routes.iter().filter(|(_, route)| matches!(route.kind, RouteKind::Other(_))) {
        assert!(after.routes.contains(key), "{name}: {key:?} is gone");
    }
}

/// The first rule of ours that each address of a ready ENI meets, but for those that leave it to `main`'s specific routes.
fn first_rules<'a>(
    attached: &'a eniup::eni::Attached,
    observed: &'a Observed,
) -> Vec<(&'a eniup::eni::Eni, IpAddr, Option<&'a Rule>)> {
    let config = Config::default();
    let leads_on = |rule: &&Rule| policy::owns_rule(&config, rule) && rule.suppress_prefix_length.is_none();
    let rules: Vec<&Rule> = observed.rules.iter().filter(leads_on).collect();
    let first =
        |source: IpAddr| rules.iter().copied().find(|rule| rule.from.is_some_and(|from| from.contains(&source)));
    let sources = |eni: &eniup::eni::Eni| {
        eniup::net::Family::BOTH.into_iter().flat_map(|family| eni.addresses(family)).collect::<Vec<_>>()
    };
    attached
        .ready
        .values()
        .flat_map(|eni| sources(eni).into_iter().map(move |source| (eni, source)))
        .map(|(eni, source)| (eni, source, first(source)))
        .collect()
}

/// The promise's first half, in the plan itself: no rule sends an address by another ENI.
#[test]
fn no_rule_matches_a_source_of_another_eni() {
    for scenario in scenarios().unwrap() {
        let mut observed = scenario.observed();
        let plan = scenario.plan(&observed);
        apply(&mut observed, &plan);
        let name = &scenario.name;
        let selected = scenario.selected(&observed);
        for (eni, source, first) in first_rules(&selected, &observed) {
            let is_primary = selected.primary_eni() == Some(eni);
            match first {
                Some(rule) => {
                    assert_eq!(rule.table, policy::table(&Config::default(), eni.slot), "{name}: {source} by {rule:?}")
                }
                // In a pending link's or a bridge's stead nothing is made.
                None => assert!(is_primary || has_trouble(&scenario, eni), "{name}: no rule for {source}"),
            }
        }
    }
}

fn has_trouble(scenario: &support::Scenario, eni: &eniup::eni::Eni) -> bool {
    let machine = &scenario.machine;
    !machine.no_ipv6.is_empty()
        || scenario.plan(&scenario.observed()).troubles.values().any(|trouble| trouble.eni == eni.id)
}

/// A machine of the largest kinds, as metadata tells of it: every ENI with this many addresses in a row.
#[derive(Clone, Copy, Debug)]
struct Largest {
    cards: usize,
    /// On each card.
    enis: usize,
    /// Of each ENI and family.
    addresses: usize,
    /// All in one /16, or the ENIs of each card in a /20.
    is_one_subnet: bool,
    /// IPv6 as well, and a prefix of each family delegated to each ENI.
    is_dual_stack: bool,
}

impl Largest {
    fn metadata(self) -> String {
        let mut leaves = serde_json::Map::new();
        let mut put = |key: String, value: String| leaves.insert(key, value.into());
        put("mac".into(), "02:00:00:00:00:00".into());
        for n in 0..self.cards * self.enis {
            let (card, device) = (n / self.enis, n % self.enis);
            let (net, place) = if self.is_one_subnet { (0, n) } else { (card, device) };
            let hosts = |a: usize| 4 + place * self.addresses + a;
            let directory = format!("network/interfaces/macs/02:00:00:00:00:{n:02x}/");
            let mut put = |key: &str, value: String| put(format!("{directory}{key}"), value);
            put("interface-id", format!("eni-{n:017x}"));
            put("device-number", device.to_string());
            if self.cards > 1 {
                put("network-card", card.to_string());
            }
            put("subnet-ipv4-cidr-block", format!("10.{net}.0.0/{}", if self.is_one_subnet { 16 } else { 20 }));
            let ipv4s = (0..self.addresses).map(|a| format!("10.{net}.{}.{}", hosts(a) / 256, hosts(a) % 256));
            put("local-ipv4s", ipv4s.collect::<Vec<_>>().join("\n"));
            if self.is_dual_stack {
                put("subnet-ipv6-cidr-blocks", format!("2600:1f16:67f:{net:x}:0:0:0:0/64"));
                let ipv6s = (0..self.addresses).map(|a| format!("2600:1f16:67f:{net:x}::{:x}", hosts(a)));
                put("ipv6s", ipv6s.collect::<Vec<_>>().join("\n"));
                // The last ones of the subnets, above all addresses.
                let last = 0x0fff - 16 * place;
                put("ipv4-prefix", format!("10.{net}.{}.{}/28", last / 256, (last % 256) & 0xf0));
                put("ipv6-prefix", format!("2600:1f16:67f:{net:x}:{:x}::/80", place + 1));
            }
        }
        serde_json::json!({ "leaves": leaves }).to_string()
    }
}

/// 24 ENIs of 64 addresses in one subnet, and 64 on 32 cards with 50 each: what EC2 has no larger machines than.
const LARGEST: [Largest; 4] = {
    let one = Largest { cards: 1, enis: 24, addresses: 64, is_one_subnet: true, is_dual_stack: false };
    let many = Largest { cards: 32, enis: 2, addresses: 50, is_one_subnet: false, is_dual_stack: false };
    [one, many, Largest { is_dual_stack: true, ..one }, Largest { is_dual_stack: true, ..many }]
};

#[test]
fn the_largest_machines_get_few_rules_and_every_address() {
    for largest in LARGEST {
        let tree = eniup::metadata::Tree::from_json(&largest.metadata()).unwrap();
        let attached = eniup::metadata::attached(&tree).unwrap();
        let enis = largest.cards * largest.enis;
        assert_eq!((attached.ready.len(), attached.pending.len()), (enis, 0), "{largest:?}");
        let plan = plan_for(&attached, &eniup::plan::fresh_machine(&attached));
        let count = |is_it: fn(&Operation) -> bool| plan.steps.iter().filter(|step| is_it(&step.operation)).count();
        let families = if largest.is_dual_stack { 2 } else { 1 };
        let addresses = count(|operation| matches!(operation, Operation::AddAddress { .. }));
        // The primary's first ones are there.
        assert_eq!(addresses, families * (enis * largest.addresses - 1), "{largest:?}");
        let rules = count(|operation| matches!(operation, Operation::AddRule { .. }));
        eprintln!("{largest:?}: {} steps, {rules} rules", plan.steps.len());
        // Rules are there for the addresses in delegated prefixes, too, of which those of IPv4 have 16 each.
        let in_prefixes = attached.ready.values().map(|eni| 16 * eni.ipv4_prefixes.len()).sum::<usize>();
        assert!(rules * 5 < addresses + in_prefixes, "{largest:?}: {rules} rules");
    }
}

/// The whole command, as built for the tests (several times slower than a release), the best of three: once it has had the
/// processor to itself it has to be fast enough.
#[test]
fn the_largest_machines_are_planned() {
    vpc_lab::inside(|| {
        for largest in LARGEST {
            let file = std::env::temp_dir().join(format!("largest-{}.json", std::process::id()));
            fs::write(&file, largest.metadata())?;
            let output = std::process::Command::new(env!("CARGO_BIN_EXE_eniup"))
                .arg("plan")
                .arg("--metadata")
                .arg(&file)
                .output();
            fs::remove_file(&file)?;
            let output = output?;
            anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let lines = output.stdout.split(|byte| *byte == b'\n').count();
            anyhow::ensure!(lines > largest.cards * largest.enis * largest.addresses, "{largest:?}: {lines} lines");
        }
        Ok(())
    });
}

/// Bodies as no service should give them, beside some that it does.
const BODIES: [&str; 24] = [
    "",
    "0",
    "1",
    "2",
    "99",
    "4294967295",
    "-1",
    "10.0.1.20",
    "10.0.1.20\n10.0.1.21",
    "10.0.0.10\n10.0.0.11\r\n ",
    "10.0.1.0/24",
    "10.0.0.0/16",
    "10.0.1.16/28",
    "0.0.0.0/0",
    "255.255.255.255",
    "::",
    "2600:1f16:67f:f201::14",
    "2600:1f16:67f:f201:0:0:0:0/64",
    "2600:1f16:67f:f201:1::/80",
    "fe80::1",
    "::ffff:10.0.1.20",
    "eni-01",
    "'; reboot #",
    "\u{1b}[2J\u{0}",
];

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_metadata_says_one_run_converges_and_nothing_foreign_is_touched(
        changes in prop::collection::vec((1..5u8, 0..eniup::metadata::ROUTING_KEYS.len(), 0..BODIES.len()), 0..12)
    ) {
        static WHOLE: LazyLock<(serde_json::Value, Observed)> = LazyLock::new(|| {
            let scenarios = scenarios().unwrap();
            let scenario = scenarios.iter().find(|scenario| scenario.name == "two-subnets-dual-stack").unwrap();
            let text = fs::read_to_string(scenario.folder.join("metadata.json")).unwrap();
            let mut observed = scenario.observed();
            foreign(&mut observed);
            let plan = scenario.plan(&observed);
            apply(&mut observed, &plan);
            (serde_json::from_str(&text).unwrap(), observed)
        });
        let (mut snapshot, mut observed) = WHOLE.clone();
        for (eni, key, body) in changes {
            let key = eniup::metadata::ROUTING_KEYS[key];
            snapshot["leaves"][format!("network/interfaces/macs/02:00:00:00:00:0{eni}/{key}")] = BODIES[body].into();
        }
        let tree = eniup::metadata::Tree::from_json(&snapshot.to_string()).unwrap();
        // A primary with another device number than a primary's: nothing is concluded from it, and no run happens.
        let Ok(attached) = eniup::metadata::attached(&tree) else { return Ok(()) };
        let before = observed.clone();
        let plan = plan_for(&attached, &observed);
        apply(&mut observed, &plan);
        prop_assert_eq!(plan_for(&attached, &observed).steps, []);
        assert_foreign_untouched(&before, &observed, &snapshot.to_string());
        for (mac, eni) in &attached.ready {
            let link = eniup::place::find_link(*mac, &observed).unwrap().map(|link| link.index);
            for (_, source, rule) in first_rules(&attached, &observed).into_iter().filter(|(of, ..)| *of == eni) {
                // A pending ENI keeps its rules, and the primary has none of its own to go before them (`docs/decisions.md`).
                let is_kept = rule.as_ref().is_some_and(|rule| before.rules.contains(rule)) && !attached.pending.is_empty();
                if *mac == attached.primary && is_kept {
                    continue;
                }
                // By its own table, or one from before a change that leads to the same link.
                let leads_elsewhere = |rule: &&Rule| {
                    let mut routes = observed.routes.iter().filter(|(_, route)| route.table == rule.table && policy::owns_route(&Config::default(), route));
                    rule.table != policy::table(&Config::default(), eni.slot) && routes.any(|(by, _)| by.is_some() && *by != link)
                };
                prop_assert!(!rule.as_ref().is_some_and(leads_elsewhere), "{} by {:?}", source, rule);
            }
        }
        for step in &plan.steps {
            prop_assert!(!step.to_string().contains(char::is_control), "{}", step);
        }
        // An automatic run, which has seen nothing of this before.
        let taken = Taken { begun: 1, ended: 2 };
        let believed = judge(&attached, &attached, &before, &Notes::default(), taken, &Config::default()).attached;
        let cautious = plan_for(&believed, &before);
        let mut observed = before.clone();
        apply(&mut observed, &cautious);
        prop_assert_eq!(plan_for(&believed, &observed).steps, []);
        assert_foreign_untouched(&before, &observed, &snapshot.to_string());
        for step in &cautious.steps {
            if let Operation::DeleteAddress { address, .. } = &step.operation {
                // It is another ENI's by now, or added again with another length.
                let is_in = |sources: &[ipnet::IpNet]| sources.iter().any(|source| source.contains(&address.net.addr()));
                let is_told = attached.ready.values().any(|eni| is_in(&eni.sources(address.net.family())))
                    || attached.pending.values().any(|eni| is_in(&eni.sources.clone().unwrap_or_default()));
                prop_assert!(is_told, "{} without proof", step);
            }
        }
        for (eni, trouble) in trouble::preview_troubles(&attached, &plan) {
            prop_assert!(!format!("{eni}{}", trouble.why).contains(char::is_control), "{}", trouble.why);
        }
    }
}
