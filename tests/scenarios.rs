//! Scenario folders with golden plans, and what holds for all of them together.

mod support;

use std::fs;

use eniup::config::Config;
use eniup::ledger::Ledger;
use eniup::net::{Address, Observed, Route, RouteKind, Rule};
use eniup::operation::Operation;
use eniup::plan::Plan;
use eniup::release::release;
use eniup::{policy, reconcile};
use support::{apply, plan_for, scenarios};

/// The plan as `eniup plan` prints it, with what it warns of as comments below.
fn shown(attached: &eniup::eni::Attached, plan: &Plan) -> String {
    let mut text = String::new();
    for step in &plan.steps {
        text += &format!("{step}\n");
    }
    for note in &plan.notes {
        text += &format!("# note: {note}\n");
    }
    for (eni, trouble) in reconcile::preview_troubles(attached, plan) {
        text += &format!("# {eni} is {}: {}\n", trouble.state, trouble.why);
    }
    text
}

/// `UPDATE_GOLDENS=1 cargo test` writes them; the difference is for the reviewer.
#[test]
fn every_scenario_plans_as_its_golden_says() {
    for scenario in scenarios().unwrap() {
        let golden = scenario.folder.join("plan.txt");
        let plan = shown(&scenario.attached, &scenario.plan(&scenario.observed()));
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

/// Objects of every sort that are not ours, some of them hard to tell from ours.
fn foreign(observed: &mut Observed) {
    let config = Config::default();
    for index in observed.links.keys().copied().collect::<Vec<_>>() {
        let net = format!("10.99.{index}.1/24").parse().unwrap();
        let address = Address { net, is_deprecated: false, has_prefix_route: true, protocol: 0 };
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
            apply(&mut observed, &plan);
            assert_eq!(to.plan(&observed).steps, [], "{name}");
            assert_foreign_untouched(&before, &observed, &name);

            let plan = release(&observed, &Ledger::default(), &Config::default());
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
        let release = release(&recalled, &ledger, &Config::default());
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

/// The promise's first half, in the plan itself: no rule sends an address by another ENI.
#[test]
fn no_rule_matches_a_source_of_another_eni() {
    for scenario in scenarios().unwrap() {
        let mut observed = scenario.observed();
        let plan = scenario.plan(&observed);
        apply(&mut observed, &plan);
        let config = Config::default();
        for (mac, eni) in &scenario.attached.ready {
            for family in eniup::net::Family::BOTH {
                for source in eni.addresses(family) {
                    let mut rules = observed.rules.iter().filter(|rule| policy::owns_rule(&config, rule));
                    let first = rules.find(|rule| rule.from.is_some_and(|from| from.contains(&source)));
                    let table = policy::table(&config, eni.slot);
                    let is_primary = *mac == scenario.attached.primary;
                    let name = &scenario.name;
                    match first {
                        Some(rule) => assert_eq!(rule.table, table, "{name}: {source} by {rule:?}"),
                        // In a pending link's or a bridge's stead nothing is made.
                        None => assert!(is_primary || has_trouble(&scenario, eni), "{name}: no rule for {source}"),
                    }
                }
            }
        }
    }
}

fn has_trouble(scenario: &support::Scenario, eni: &eniup::eni::Eni) -> bool {
    let machine = &scenario.machine;
    !machine.no_ipv6.is_empty()
        || scenario.plan(&scenario.observed()).troubles.values().any(|trouble| trouble.eni == eni.id)
}

#[test]
fn the_largest_machines_are_planned_in_well_under_a_second() {
    // 64 ENIs on 32 cards with 50 addresses each, and 24 ENIs of 64 addresses in one subnet.
    for (cards, devices, addresses, is_shared) in [(32, 2, 50, false), (1, 24, 64, true)] {
        let mut leaves = serde_json::Map::new();
        let mut put = |key: String, value: String| leaves.insert(key, value.into());
        put("mac".into(), "02:00:00:00:00:00".into());
        for n in 0..cards * devices {
            let directory = format!("network/interfaces/macs/02:00:00:00:00:{n:02x}/");
            put(format!("{directory}interface-id"), format!("eni-{n:017x}"));
            put(format!("{directory}device-number"), (n % devices).to_string());
            put(format!("{directory}network-card"), (n / devices).to_string());
            let subnet = if is_shared { "10.0.0.0/16".into() } else { format!("10.{n}.0.0/20") };
            put(format!("{directory}subnet-ipv4-cidr-block"), subnet);
            let own = (0..addresses).map(|a| match is_shared {
                true => format!("10.0.{}.{}", (a * 24 + n) / 250, (a * 24 + n) % 250 + 4),
                false => format!("10.{n}.0.{}", a + 4),
            });
            put(format!("{directory}local-ipv4s"), own.collect::<Vec<_>>().join("\n"));
        }
        let text = serde_json::json!({ "leaves": leaves }).to_string();
        let started = std::time::Instant::now();
        let attached = eniup::metadata::attached(&eniup::metadata::Tree::from_json(&text).unwrap()).unwrap();
        assert_eq!(attached.ready.len(), cards * devices);
        let plan = plan_for(&attached, &eniup::plan::fresh_machine(&attached));
        assert!(plan.steps.len() > cards * devices * addresses - addresses);
        // A wide margin for a debug build on a busy machine; the figures are in the benchmarks.
        assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
        eprintln!("{} ENIs × {addresses}: {} steps in {:?}", cards * devices, plan.steps.len(), started.elapsed());
    }
}
