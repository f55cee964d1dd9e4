//! The metadata client against a service that misbehaves on request, and in networks that lead astray.

#[path = "support/metadata_lab.rs"]
mod lab;

use std::net::TcpListener;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use eniup::imds::{Error, Imds, Scope, Surroundings};
use eniup::metadata::{self, Answer, Tree};
use eniup::netlink::Netlink;
use lab::{Lab, all_links, block_on, dual_stack_eni, eni, ip, mac, metadata_listeners, plug, rule, watching};
use vpc_lab::imds::{Action, Faults, Method, Occurrences};
use vpc_lab::metadata::{EniView, Published};

const TOKEN: &str = "/latest/api/token";

#[test]
fn a_snapshot_is_the_truth_whether_links_are_known_or_not_and_connections_kept_or_not() -> Result<()> {
    for (is_known, is_kept) in [(false, true), (true, true), (false, false), (true, false)] {
        let lab = Lab::new((0..4).map(if is_kept { eni } else { dual_stack_eni }).collect());
        lab.service.set_keep_alive(is_kept);
        let links = if is_known { all_links(&lab.view) } else { Default::default() };
        let tree = block_on(async { lab.connect_with(&links, 10.0).await?.snapshot(Scope::Routing).await })?;
        ensure!(lab.unknown_keys(&tree)? == 0, "{:?}", lab.keys(&tree));
        ensure!(metadata::attached(&tree)?.ready.len() == 4);
    }
    Ok(())
}

#[test]
fn each_path_is_asked_for_once_and_an_absent_key_not_at_all() -> Result<()> {
    for is_known in [false, true] {
        let lab = Lab::new((0..4).map(eni).collect());
        let links = if is_known { all_links(&lab.view) } else { Default::default() };
        block_on(async { lab.connect_with(&links, 10.0).await?.snapshot(Scope::Routing).await })?;
        let counters = lab.service.requests();
        ensure!(counters.tokens == 1, "{} tokens", counters.tokens);
        ensure!(counters.gets_by_path.values().all(|&times| times == 1), "{:?}", counters.gets_by_path);
        ensure!(counters.gets_by_status.keys().eq([&200]), "{:?}", counters.gets_by_status);
        // The MAC and the list; of each ENI its listing and four keys.
        ensure!(counters.gets_by_path.len() == 2 + 4 * 5, "{:?}", counters.gets_by_path);
        // A connection that was begun when another became idle is kept as well, so there may be one or two more.
        ensure!(counters.max_in_flight <= 8 && counters.connections <= 10, "{counters:?}");
    }
    Ok(())
}

/// With 300 ms for each answer what else happens can be told from a round trip.
#[test]
fn the_token_and_one_wave_are_all_round_trips_of_a_machine_with_one_ipv4_eni() -> Result<()> {
    let lab = Lab::new(vec![eni(0)]);
    lab.service.set_latency(Duration::from_millis(300));
    let started = Instant::now();
    let tree = block_on(async { lab.connect_with(&all_links(&lab.view), 10.0).await?.snapshot(Scope::Routing).await })?;
    ensure!(started.elapsed() < Duration::from_millis(900), "{:?}", started.elapsed());
    ensure!(lab.unknown_keys(&tree)? == 0);
    Ok(())
}

#[test]
fn an_ipv6_only_machine_is_asked_for_no_ipv4_key() -> Result<()> {
    let ipv6_only =
        EniView { local_ipv4s: Vec::new(), subnet_ipv4_cidr: None, network_card: None, ..dual_stack_eni(0) };
    let lab = Lab::new(vec![ipv6_only]);
    let surroundings = Surroundings { is_ipv6_only: true, ..all_links(&lab.view) };
    let tree = block_on(async { lab.connect_with(&surroundings, 10.0).await?.snapshot(Scope::Routing).await })?;
    ensure!(lab.unknown_keys(&tree)? == 0);
    let counters = lab.service.requests();
    ensure!(counters.gets_by_status.iter().eq([(&200, &7)]), "{:?}", counters.gets_by_path);
    Ok(())
}

#[test]
fn details_are_read_only_where_they_are_wanted() -> Result<()> {
    let association = ("198.51.100.7".parse()?, "10.0.1.10".parse()?);
    let lab = Lab::new(vec![eni(0), EniView { associations: vec![association], ..eni(1) }]);
    let read = |scope| block_on(async { lab.connect(10.0).await?.snapshot(scope).await });
    let details = metadata::details(&read(Scope::Details { has_tags: false })?, mac(1));
    ensure!(details.associations.into_iter().eq([association]));
    ensure!(details.security_groups == ["with a space"]);
    lab.service.reset_counters();
    read(Scope::Routing)?;
    ensure!(lab.service.requests().gets_by_path.keys().all(|path| !path.contains("security")));
    Ok(())
}

#[test]
fn tags_of_the_instance_are_read_only_where_they_are_wanted() -> Result<()> {
    let lab = Lab::new(vec![eni(0), eni(1)]);
    let read = |scope| block_on(async { lab.connect(10.0).await?.snapshot(scope).await });
    let with_tags = Scope::Selection { has_tags: true };
    ensure!(metadata::lacks_instance_tags(&read(with_tags)?), "they are off");
    let tags = [("Name", "db 1"), ("a:b=c+d@e", "x=y"), ("empty", ""), ("owner", "<ops@example.com>")];
    let mut leaves = vpc_lab::metadata::render(&lab.view);
    leaves.extend(tags.map(|(key, value)| (format!("tags/instance/{key}"), value.to_string())));
    *lab.tree.lock().unwrap() = Published::raw(leaves, Default::default());
    let tree = read(with_tags)?;
    let expected = ["Name=db 1", "a:b=c+d@e=x=y", "empty=", "owner=<ops@example.com>"].map(String::from);
    ensure!(metadata::instance_tags(&tree) == Some(expected.into()), "{:?}", metadata::instance_tags(&tree));
    lab.service.reset_counters();
    for scope in [Scope::Routing, Scope::Selection { has_tags: false }, Scope::Details { has_tags: false }] {
        read(scope)?;
    }
    ensure!(lab.service.requests().gets_by_path.keys().all(|path| !path.contains("tags")));
    Ok(())
}

#[test]
fn a_tag_that_could_not_be_read_is_read_again_and_the_others_are_not_until_then() -> Result<()> {
    let lab = Lab::new(vec![eni(0)]);
    let mut leaves = vpc_lab::metadata::render(&lab.view);
    leaves.insert("tags/instance/role".into(), "node".into());
    *lab.tree.lock().unwrap() = Published::raw(leaves, Default::default());
    lab.fault(vec![rule("tags/instance/role", Occurrences::FirstN(9), Action::Status(500))]);
    let scope = Scope::Selection { has_tags: true };
    block_on(async {
        let mut imds = lab.connect(20.0).await?;
        let mut tree = imds.snapshot(scope).await?;
        ensure!(metadata::instance_tags(&tree).is_none() && !metadata::lacks_instance_tags(&tree));
        while metadata::instance_tags(&tree).is_none() {
            tree = imds.ask_again(tree, &Default::default(), scope).await?;
        }
        lab.service.reset_counters();
        imds.ask_again(tree, &Default::default(), scope).await?;
        ensure!(lab.service.requests().gets_by_path.keys().all(|path| !path.contains("tags")));
        Ok(())
    })
}

#[test]
fn the_packet_limit_is_no_excuse_to_pass_the_deadline() -> Result<()> {
    let lab = Lab::new((0..80).map(dual_stack_eni).collect());
    lab.service.set_keep_alive(false);
    let started = Instant::now();
    let tree = block_on(lab.snapshot(2.5))?;
    ensure!(started.elapsed() < Duration::from_millis(2_800), "{:?}", started.elapsed());
    ensure!(lab.unknown_keys(&tree)? > 0, "the limit was not kept");
    Ok(())
}

#[test]
fn a_known_link_that_is_no_eni_leaves_no_trace() -> Result<()> {
    let lab = Lab::new(vec![eni(0)]);
    let mut links = all_links(&lab.view);
    links.links.push((mac(99), "eth9".into()));
    let tree = block_on(async { lab.connect_with(&links, 10.0).await?.snapshot(Scope::Routing).await })?;
    ensure!(tree.paths().all(|path| !path.contains(&mac(99).to_string())), "{tree:?}");
    Ok(())
}

#[test]
fn a_listed_key_that_is_not_found_is_unknown_and_an_unlisted_one_absent() -> Result<()> {
    let lab = Lab::new(vec![eni(0), dual_stack_eni(1)]);
    lab.fault(vec![rule(&format!("*{}/ipv6s", mac(1)), Occurrences::Always, Action::Status(404))]);
    let tree = block_on(lab.snapshot(10.0))?;
    let directory = metadata::eni_directory(mac(1));
    ensure!(matches!(tree.get(&format!("{directory}ipv6s")), Answer::Unknown(_)), "{tree:?}");
    ensure!(tree.get(&format!("{directory}ipv6-prefix")) == Answer::Absent);
    let attached = metadata::attached(&tree)?;
    ensure!(attached.pending.contains_key(&mac(1)) && attached.ready.contains_key(&mac(0)), "{attached:?}");
    Ok(())
}

#[test]
fn an_expired_token_is_renewed_once() -> Result<()> {
    let lab = Lab::new((0..4).map(eni).collect());
    lab.fault(vec![rule("*/macs/", Occurrences::FirstN(1), Action::ExpireToken)]);
    let tree = block_on(lab.snapshot(10.0))?;
    ensure!(lab.unknown_keys(&tree)? == 0);
    ensure!(lab.service.requests().tokens == 2, "{}", lab.service.requests().tokens);
    Ok(())
}

#[test]
fn a_token_that_is_refused_for_ever_is_an_error_at_once() {
    let lab = Lab::new((0..4).map(eni).collect());
    lab.fault(vec![rule("*", Occurrences::Always, Action::Status(401)).only(Method::Get)]);
    let started = Instant::now();
    let error = block_on(lab.snapshot(30.0)).unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
    assert_eq!(lab.service.requests().tokens, 2);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[test]
fn a_refusal_is_final_and_said_at_once() {
    for path in ["*", "*/device-number"] {
        let lab = Lab::new(vec![eni(0)]);
        lab.fault(vec![rule(path, Occurrences::Always, Action::Status(403))]);
        let started = Instant::now();
        let error = block_on(lab.snapshot(30.0)).unwrap_err();
        assert!(matches!(error, Error::Forbidden { .. }), "{error}");
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
        assert_eq!(
            lab.service.requests().gets_by_status.get(&403).copied().unwrap_or_default(),
            u64::from(path != "*")
        );
    }
}

#[test]
fn what_passes_is_waited_for() -> Result<()> {
    let faults = [
        Action::Status(429),
        Action::Status(500),
        Action::Status(503),
        Action::Reset,
        Action::Close,
        Action::Truncate(0),
        Action::Truncate(3),
        Action::Garbage,
        Action::NotUtf8,
        Action::Body("<html>sign in</html>".into()),
        Action::Body("a\n".repeat(2_000)),
        Action::HugeBody(1 << 20),
        Action::Hang,
        Action::WrongContentLength,
    ];
    side_by_side(faults.to_vec(), |fault| {
        for path in [TOKEN, "mac", "*/macs/", "*/local-ipv4s"] {
            let lab = Lab::new(vec![eni(0), eni(1)]);
            lab.fault(vec![rule(path, Occurrences::FirstN(1), fault.clone())]);
            let tree = block_on(lab.snapshot(10.0)).with_context(|| format!("{fault:?} of {path}"))?;
            ensure!(lab.unknown_keys(&tree)? == 0, "{fault:?} of {path}: {tree:?}");
            ensure!(lab.service.requests().faults > 0);
        }
        Ok(())
    })
}

#[test]
fn the_deadline_ends_all_waiting_and_pauses_grow() {
    for (fault, attempts) in [(Action::Status(503), 4..=9), (Action::Hang, 1..=2), (Action::Reset, 4..=9)] {
        for path in [TOKEN, "*/macs/"] {
            let lab = Lab::new(vec![eni(0)]);
            lab.fault(vec![rule(path, Occurrences::Always, fault.clone())]);
            let started = Instant::now();
            let error = block_on(lab.snapshot(3.0)).unwrap_err();
            assert!(matches!(error, Error::NoAnswer { .. }), "{error}");
            let (elapsed, faults) = (started.elapsed(), lab.service.requests().faults);
            assert!(elapsed < Duration::from_millis(3_300), "{fault:?}: {elapsed:?}");
            // Fewer would be giving up too early, more would be a storm.
            assert!(attempts.contains(&faults), "{fault:?} of {path}: {faults} attempts");
        }
    }
}

#[test]
fn one_key_that_cannot_be_read_is_unknown_alone() -> Result<()> {
    for fault in [Action::Status(500), Action::Body("<".into()), Action::HugeBody(80_000), Action::NotUtf8] {
        let lab = Lab::new((0..3).map(eni).collect());
        let path = format!("*{}/local-ipv4s", mac(1));
        lab.fault(vec![rule(&path, Occurrences::Always, fault.clone())]);
        let tree = block_on(lab.snapshot(10.0))?;
        ensure!(lab.unknown_keys(&tree)? == 1, "{fault:?}: {tree:?}");
        let attached = metadata::attached(&tree)?;
        ensure!(attached.pending.keys().eq([&mac(1)]), "{attached:?}");
    }
    Ok(())
}

#[test]
fn a_key_that_drips_does_not_hold_up_the_others_or_the_run() -> Result<()> {
    let lab = Lab::new((0..3).map(eni).collect());
    let path = format!("*{}/local-ipv4s", mac(1));
    lab.fault(vec![rule(&path, Occurrences::Always, Action::Drip(Duration::from_millis(100)))]);
    let started = Instant::now();
    let tree = block_on(lab.snapshot(3.0))?;
    ensure!(started.elapsed() < Duration::from_millis(3_300), "{:?}", started.elapsed());
    ensure!(lab.unknown_keys(&tree)? == 1, "{tree:?}");
    Ok(())
}

#[test]
fn a_redirect_is_never_followed() -> Result<()> {
    let elsewhere = Lab::new(vec![eni(0)]);
    for path in [TOKEN, "*/macs/", "*/local-ipv4s"] {
        let lab = Lab::new(vec![eni(0)]);
        let place = format!("{}/latest/meta-data/mac", elsewhere.endpoint);
        lab.fault(vec![rule(path, Occurrences::Always, Action::Redirect(place))]);
        match block_on(lab.snapshot(10.0)) {
            Ok(tree) => ensure!(lab.unknown_keys(&tree)? == 1, "{path}: {tree:?}"),
            Err(error) => ensure!(matches!(error, Error::NotMetadata { .. }) && path != "*/local-ipv4s", "{error}"),
        }
    }
    ensure!(elsewhere.service.requests().connections == 0);
    Ok(())
}

#[test]
fn through_any_faults_what_is_said_is_true() -> Result<()> {
    // Most of the time is spent waiting, so they wait side by side.
    side_by_side((0..300).collect(), |seed| {
        let lab = Lab::new(vec![eni(0), dual_stack_eni(1), eni(2)]);
        lab.service.set_faults(Faults::random(seed));
        let links = if seed % 2 == 0 { all_links(&lab.view) } else { Default::default() };
        let started = Instant::now();
        let result = block_on(async { lab.connect_with(&links, 2.5).await?.snapshot(Scope::Routing).await });
        ensure!(started.elapsed() < Duration::from_millis(2_800), "seed {seed}: {:?}", started.elapsed());
        match result {
            Ok(tree) => lab.unknown_keys(&tree).with_context(|| format!("seed {seed}")).map(drop),
            Err(_) => Ok(()),
        }
    })
}

/// Sixteen at a time; gives the first error.
fn side_by_side<T: Send>(cases: Vec<T>, test: impl Fn(T) -> Result<()> + Sync) -> Result<()> {
    let cases = Mutex::new(cases);
    let work = || {
        while let Some(case) = { cases.lock().unwrap().pop() } {
            test(case)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..16).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker panicked"))
    })
}

#[test]
fn a_pending_eni_is_asked_for_again_alone() -> Result<()> {
    let mut lab = Lab::new(vec![eni(0), eni(1)]);
    block_on(async {
        lab.tree.lock().unwrap().hold(&format!("*/{}/*", mac(2)));
        lab.view.enis.push(eni(2));
        lab.tree.lock().unwrap().publish(&lab.view);
        let mut imds = lab.connect(30.0).await?;
        let tree = imds.snapshot(Scope::Routing).await?;
        let attached = metadata::attached(&tree)?;
        ensure!(attached.unsettled().iter().eq([&mac(2)]), "{attached:?}");

        lab.tree.lock().unwrap().release("*");
        lab.service.reset_counters();
        let tree = imds.ask_again(tree, &attached.unsettled(), Scope::Routing).await?;
        ensure!(metadata::attached(&tree)?.ready.len() == 3 && lab.unknown_keys(&tree)? == 0, "{tree:?}");
        // The list, and of the ENI its listing and four keys.
        let counters = lab.service.requests();
        ensure!(counters.gets_by_path.values().sum::<u64>() == 1 + 5, "{:?}", counters.gets_by_path);
        ensure!(counters.tokens == 0);

        lab.view.enis.remove(1);
        lab.view.enis.push(EniView { network_card: None, ..dual_stack_eni(3) });
        lab.tree.lock().unwrap().publish_without_delay(&lab.view);
        lab.service.reset_counters();
        let tree = imds.ask_again(tree, &Default::default(), Scope::Routing).await?;
        ensure!(metadata::attached(&tree)?.ready.keys().eq([&mac(0), &mac(2), &mac(3)]), "{tree:?}");
        ensure!(lab.unknown_keys(&tree)? == 0);
        let counters = lab.service.requests();
        ensure!(counters.gets_by_path.values().sum::<u64>() == 1 + 7, "{:?}", counters.gets_by_path);
        Ok(())
    })
}

#[test]
fn the_other_side_of_a_dispute_is_asked_for_again_too() -> Result<()> {
    let mut lab = Lab::new(vec![eni(0), eni(1)]);
    // The primary's secondary address moves to ENI 1, which has it first.
    let moving = "10.0.1.99".parse()?;
    lab.view.enis[0].local_ipv4s.push(moving);
    lab.view.enis[0].subnet_ipv4_cidr = Some("10.0.0.0/16".parse()?);
    lab.tree.lock().unwrap().publish(&lab.view);
    lab.tree.lock().unwrap().hold(&format!("*/{}/local-ipv4s", mac(0)));
    lab.view.enis[0].local_ipv4s.pop();
    lab.view.enis[1].local_ipv4s.push(moving);
    lab.tree.lock().unwrap().publish(&lab.view);
    block_on(async {
        let mut imds = lab.connect(30.0).await?;
        let tree = imds.snapshot(Scope::Routing).await?;
        let attached = metadata::attached(&tree)?;
        ensure!(attached.disputes.keys().eq([&mac(0), &mac(1)]), "{attached:?}");
        ensure!(attached.unsettled().iter().eq([&mac(0), &mac(1)]), "{attached:?}");
        lab.tree.lock().unwrap().release("*");
        let tree = imds.ask_again(tree, &attached.unsettled(), Scope::Routing).await?;
        ensure!(metadata::attached(&tree)?.is_complete(), "{tree:?}");
        Ok(())
    })
}

#[test]
fn a_run_that_waits_for_one_eni_reads_the_others_again_when_it_is_there() {
    vpc_lab::inside(|| {
        ip("link set lo up")?;
        let lab = Lab::new(vec![eni(0), eni(1)]);
        for n in 0..2 {
            let keep = || TcpListener::bind("[::]:1").context("keeping the namespace");
            plug(&format!("eth{n}"), mac(n), keep).map(std::mem::forget)?;
        }
        // As if ENI 1 had been attached a moment ago.
        let number = format!("*/{}/device-number", mac(1));
        lab.fault(vec![rule(&number, Occurrences::FirstN(3), Action::Body("0".into()))]);
        let output = eniup(&lab.endpoint, "reconcile --timeout 20s", &[])?;
        ensure!(output.status.success(), "{output:?}");
        let asked = lab.service.requests().gets_by_path;
        let times =
            |n: u8, key: &str| asked.get(&format!("/latest/meta-data/{}{key}", metadata::eni_directory(mac(n))));
        ensure!(times(0, "").into_iter().chain(times(0, "device-number")).eq([&2, &2]), "{asked:?}");
        ensure!(times(1, "").into_iter().chain(times(1, "device-number")).eq([&5, &5]), "{asked:?}");
        Ok(())
    });
}

#[test]
fn the_token_is_in_no_message() -> Result<()> {
    let faults = [
        Action::Status(401),
        Action::Status(403),
        Action::Status(503),
        Action::Garbage,
        Action::Truncate(30),
        Action::WrongContentLength,
        Action::Body("AQAEALsecret\nsecond line".into()),
        Action::Redirect("http://127.0.0.1:1/".into()),
    ];
    for fault in faults {
        for path in [TOKEN, "*/macs/", "*/local-ipv4s"] {
            let lab = Lab::new(vec![eni(0)]);
            lab.fault(vec![rule(path, Occurrences::Always, fault.clone())]);
            let log = Log::default();
            let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer({
                let log = log.clone();
                move || log.clone()
            });
            let result = tracing::subscriber::with_default(subscriber.finish(), || {
                tracing::trace!("the log is kept");
                block_on(lab.snapshot(1.0))
            });
            let log = String::from_utf8(log.0.lock().unwrap().clone())?;
            // Real tokens and the service's begin so.
            let messages = match result {
                // What the service itself writes into a value is not a message.
                Ok(tree) => format!("{:?}", metadata::attached(&tree)),
                Err(error) => format!("{error} {error:?}"),
            };
            ensure!(log.contains("the log is kept"));
            ensure!(!log.contains("AQAEAL"), "{fault:?} of {path}: {log}");
            ensure!(!messages.contains("AQAEAL") || matches!(fault, Action::Body(_)) && path != TOKEN, "{messages}");
        }
    }
    Ok(())
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn eniup(endpoint: &str, arguments: &str, variables: &[(&str, &str)]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_eniup"));
    command.args(arguments.split_whitespace()).envs(variables.iter().copied());
    command.env("RUNTIME_DIRECTORY", "/run/eniup").env("AWS_EC2_METADATA_SERVICE_ENDPOINT", endpoint);
    command.output().context("running eniup")
}

#[test]
fn a_proxy_is_never_asked() {
    vpc_lab::inside(|| {
        ip("link set lo up")?;
        let (lab, proxy) = (Lab::new(vec![eni(0)]), Lab::new(vec![eni(0)]));
        let variables = ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"];
        let output = eniup(&lab.endpoint, "status", &variables.map(|name| (name, proxy.endpoint.as_str())))?;
        ensure!(lab.service.requests().tokens == 1, "{output:?}");
        ensure!(proxy.service.requests().connections == 0);
        Ok(())
    });
}

#[test]
fn metadata_that_is_switched_off_is_not_asked() {
    vpc_lab::inside(|| {
        ip("link set lo up")?;
        let lab = Lab::new(vec![eni(0)]);
        for value in ["true", "True"] {
            let output = eniup(&lab.endpoint, "status", &[("AWS_EC2_METADATA_DISABLED", value)])?;
            ensure!(output.status.code() == Some(69), "{output:?}");
            ensure!(String::from_utf8_lossy(&output.stderr).contains("AWS_EC2_METADATA_DISABLED"), "{output:?}");
        }
        ensure!(lab.service.requests().connections == 0);
        eniup(&lab.endpoint, "status", &[("AWS_EC2_METADATA_DISABLED", "false")])?;
        ensure!(lab.service.requests().connections > 0);
        Ok(())
    });
}

/// A machine with one ENI: its link `eth0`, behind which the service answers on both its addresses.
struct Network {
    ipv4: Lab,
    ipv6: Lab,
}

impl Network {
    fn new() -> Result<Network> {
        ip("link set lo up")?;
        let mut listeners = plug("eth0", mac(0), metadata_listeners)?;
        let serving = |listener| Lab::serving(vec![eni(0)], vec![listener], String::new());
        let ipv6 = serving(listeners.remove(1));
        Ok(Network { ipv4: serving(listeners.remove(0)), ipv6 })
    }

    fn with_ipv4(self, metric: u32) -> Result<Network> {
        ip("addr add 10.0.0.10/24 dev eth0")?;
        ip(&format!("route add default via 10.0.0.1 metric {metric}"))?;
        Ok(self)
    }

    fn with_ipv6(self) -> Result<Network> {
        ip("addr add fd99::10/64 dev eth0 nodad")?;
        ip("-6 route add default via fd99::1 metric 500")?;
        Ok(self)
    }

    /// By a link behind which nobody answers goes whatever has no better route.
    fn with_a_hole(self, route: &str) -> Result<Network> {
        plug("hole", mac(9), || TcpListener::bind("[::]:1").context("keeping the namespace")).map(std::mem::forget)?;
        ip("addr add 10.9.9.9/24 dev hole")?;
        ip(&format!("route add {route} via 10.9.9.1 dev hole metric 1"))?;
        Ok(self)
    }

    /// A snapshot with what the kernel really tells of the surroundings; how long it took, and the tokens that the IPv4
    /// and IPv6 addresses gave.
    fn read(&self) -> (Result<Tree, Error>, Duration, [u64; 2]) {
        let started = Instant::now();
        let result = block_on(async {
            let surroundings = Surroundings::of(&Netlink::open().unwrap().observe().await.unwrap());
            let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
            Imds::connect(None, &surroundings, deadline).await?.snapshot(Scope::Routing).await
        });
        (result, started.elapsed(), [&self.ipv4, &self.ipv6].map(|lab| lab.service.requests().tokens))
    }
}

#[test]
fn ipv4_is_asked_first_and_alone_when_it_answers() {
    vpc_lab::inside(|| {
        let network = Network::new()?.with_ipv4(0)?.with_ipv6()?;
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut others = 0;
        for read in 1.. {
            let (tree, elapsed, tokens) = network.read();
            ensure!(tree?.get("mac") == Answer::Present(mac(0).to_string()));
            ensure!(tokens[0] == read, "{tokens:?} after {read} reads");
            // What a busy machine answers later than that is asked for by the other way, too.
            if elapsed < Duration::from_millis(200) {
                ensure!(tokens[1] == others, "{tokens:?}");
                return Ok(());
            }
            others = tokens[1];
            ensure!(Instant::now() < deadline, "no read was quick");
        }
        Ok(())
    });
}

#[test]
fn an_ipv6_only_machine_does_not_even_try_ipv4() {
    vpc_lab::inside(|| {
        let network = Network::new()?.with_ipv6()?;
        // A route that leads nowhere, so that an attempt would show: as a packet.
        plug("hole", mac(9), || TcpListener::bind("[::]:1").context("keeping the namespace")).map(std::mem::forget)?;
        // IPv6 speaks on a link by itself.
        std::fs::write("/proc/sys/net/ipv6/conf/hole/disable_ipv6", "1")?;
        ip("route add 169.254.169.254/32 dev hole")?;
        let before = lab::packets("hole")?.0;
        let (tree, elapsed, tokens) = network.read();
        ensure!(tokens == [0, 1], "{tokens:?}");
        tree?;
        ensure!(elapsed < Duration::from_millis(1_500), "{elapsed:?}");
        ensure!(lab::packets("hole")?.0 == before);
        Ok(())
    });
}

#[test]
fn a_refusal_by_ipv6_is_final_where_no_way_leads_to_ipv4() {
    vpc_lab::inside(|| {
        let network = Network::new()?.with_ipv6()?;
        // IPv4 is tried first, and the kernel says at once that there is no way.
        ip("addr add 10.0.0.10/24 dev eth0")?;
        network.ipv6.fault(vec![rule("*", Occurrences::Always, Action::Status(403))]);
        let (result, ..) = network.read();
        let error = result.expect_err("a token was refused");
        ensure!(matches!(error, Error::Forbidden { .. }), "{error}");
        Ok(())
    });
}

#[test]
fn an_ipv4_way_that_leads_nowhere_delays_ipv6_by_no_timeout() {
    vpc_lab::inside(|| {
        let (tree, elapsed, tokens) = Network::new()?.with_ipv6()?.with_a_hole("169.254.169.254/32")?.read();
        ensure!(tokens == [0, 1], "{tokens:?}");
        tree?;
        ensure!(elapsed < Duration::from_millis(1_500), "{elapsed:?}");
        Ok(())
    });
}

#[test]
fn metadata_is_found_by_its_link_when_a_tunnel_has_the_default_route() {
    vpc_lab::inside(|| {
        let (tree, elapsed, tokens) = Network::new()?.with_ipv4(500)?.with_a_hole("default")?.read();
        ensure!(tokens == [1, 0], "{tokens:?}: {tree:?}");
        tree?;
        ensure!(elapsed < Duration::from_secs(5), "{elapsed:?}");
        Ok(())
    });
}

#[test]
fn metadata_is_found_by_its_link_when_the_route_is_unreachable() {
    vpc_lab::inside(|| {
        let network = Network::new()?.with_ipv4(0)?;
        ip("route add unreachable 169.254.169.254/32")?;
        let (tree, elapsed, tokens) = network.read();
        ensure!(tokens == [1, 0], "{tokens:?}: {tree:?}");
        tree?;
        ensure!(elapsed < Duration::from_secs(2), "{elapsed:?}");
        Ok(())
    });
}

#[test]
fn a_locked_service_is_named_at_once_and_not_gone_round() {
    vpc_lab::inside(|| {
        let network = Network::new()?.with_ipv4(0)?;
        ip("route add prohibit 169.254.169.254/32")?;
        ip("-6 route add prohibit fd00:ec2::254/128")?;
        let (result, elapsed, tokens) = network.read();
        let error = result.expect_err("it is locked");
        ensure!(matches!(error, Error::Locked { .. }), "{error}");
        ensure!(
            error.to_string().contains("systemd-imdsd") && error.to_string().contains("systemd.imds.network=unlocked")
        );
        ensure!(elapsed < Duration::from_secs(1) && tokens == [0, 0], "{elapsed:?} {tokens:?}");
        Ok(())
    });
}

#[test]
fn one_locked_address_is_no_reason_not_to_use_the_other() {
    vpc_lab::inside(|| {
        let network = Network::new()?.with_ipv4(0)?.with_ipv6()?;
        ip("route add prohibit 169.254.169.254/32")?;
        let (tree, _, tokens) = network.read();
        tree?;
        ensure!(tokens == [0, 1], "{tokens:?}");
        Ok(())
    });
}

/// It may have been cut anywhere.
#[test]
fn an_answer_that_does_not_say_how_long_it_is_is_none() -> Result<()> {
    for path in [TOKEN, "*/macs/", "*/local-ipv4s"] {
        let lab = Lab::new((0..2).map(eni).collect());
        lab.fault(vec![rule(path, Occurrences::Always, Action::Unmeasured)]);
        match (path, block_on(lab.snapshot(1.5))) {
            ("*/local-ipv4s", tree) => ensure!(lab.unknown_keys(&tree?)? == 2),
            (_, result) => ensure!(matches!(result, Err(Error::NoAnswer { .. })), "{path}: {result:?}"),
        }
        lab.fault(vec![rule(path, Occurrences::FirstN(1), Action::Unmeasured)]);
        ensure!(lab.unknown_keys(&block_on(lab.snapshot(10.0))?)? == 0, "{path}: asked once more it is well");
    }
    Ok(())
}

/// It would go out with each request.
#[test]
fn a_token_that_is_longer_than_any_is_refused() -> Result<()> {
    let lab = Lab::new(vec![eni(0)]);
    lab.fault(vec![rule(TOKEN, Occurrences::Always, Action::Body("A".repeat(8_000)))]);
    let error = block_on(lab.snapshot(0.5)).expect_err("it was taken");
    ensure!(error.to_string().contains("longer than 512 bytes"), "{error}");
    Ok(())
}

/// hyper reads interim answers as long as they come, and nothing else on its thread has a turn.
#[test]
fn interim_answers_without_end_hold_nothing_up() -> Result<()> {
    for path in [TOKEN, "*/local-ipv4s", "*"] {
        let lab = Lab::new((0..4).map(eni).collect());
        lab.service
            .set_faults(Faults { rules: vec![rule(path, Occurrences::Always, Action::Interim)], ..Faults::default() });
        let started = Instant::now();
        let read = block_on(lab.snapshot(2.0));
        ensure!(started.elapsed() < Duration::from_secs(4), "{path}: {:?}", started.elapsed());
        match path {
            "*/local-ipv4s" => ensure!(lab.unknown_keys(&read?)? == 4),
            _ => ensure!(matches!(read, Err(Error::NoAnswer { .. })), "{path}: {read:?}"),
        }
    }
    Ok(())
}

#[test]
fn the_largest_machine_is_read_within_the_packet_limit() {
    vpc_lab::inside(|| {
        let always = |action| Faults { rules: vec![rule("*", Occurrences::Always, action)], ..Faults::default() };
        let ends = [Faults::default(), always(Action::Unannounced), always(Action::Http10)];
        let ways = [(true, &ends[0]), (false, &ends[0]), (true, &ends[1]), (true, &ends[2])];
        for (is_kept, faults) in ways {
            ip("link set lo up")?;
            let listeners = plug("eth0", mac(0), metadata_listeners)?;
            ip("addr add 10.0.0.10/24 dev eth0")?;
            ip("route add default via 10.0.0.1")?;
            let lab = Lab::serving((0..80).map(dual_stack_eni).collect(), listeners, "http://169.254.169.254".into());
            lab.service.set_keep_alive(is_kept);
            lab.service.set_faults(faults.clone());
            let read = || Ok(block_on(lab.snapshot(30.0))?);
            let (tree, peak) = watching("eth0", read)?;
            ensure!(lab.unknown_keys(&tree)? == 0);
            ensure!(peak.sent > 100, "nothing was counted: {peak:?}");
            // What EC2 counts is what is sent; in both directions it is less than EC2 allows in one.
            ensure!(peak.sent <= 600 && peak.both <= 1_024, "{peak:?}");
            ip("link del eth0")?;
        }
        Ok(())
    });
}

/// A prohibit route for private IPv6 addresses, at a boot at which IPv4 is late.
#[test]
fn ipv4_that_comes_late_is_waited_for_though_ipv6_is_prohibited() {
    vpc_lab::inside(|| {
        let network = Network::new()?;
        ip("-6 route add prohibit fd00:ec2::254/128")?;
        std::thread::scope(|scope| {
            let late = scope.spawn(|| {
                std::thread::sleep(Duration::from_secs(1));
                ip("addr add 10.0.0.10/24 dev eth0")?;
                ip("route add default via 10.0.0.1")
            });
            let (result, elapsed, tokens) = network.read();
            late.join().expect("the network came")?;
            result?;
            ensure!(elapsed > Duration::from_millis(900), "{elapsed:?} {tokens:?}");
            Ok(())
        })
    });
}

/// getaddrinfo(3) waits in a thread that nobody can end, ten seconds for a name server that does not answer.
#[test]
fn a_name_that_nobody_resolves_is_not_waited_for() {
    vpc_lab::inside(|| {
        ip("link set lo up")?;
        let server = std::net::UdpSocket::bind("127.0.0.1:53")?;
        std::fs::write("/run/resolv.conf", "nameserver 127.0.0.1\noptions timeout:10 attempts:1\n")?;
        let mount = Command::new("mount").args(["--bind", "/run/resolv.conf", "/etc/resolv.conf"]).status()?;
        ensure!(mount.success());
        let started = Instant::now();
        let output = Command::new(env!("CARGO_BIN_EXE_eniup"))
            .args(["plan", "--timeout", "500ms", "--imds-endpoint", "http://imds.example.com"])
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(69) && said.contains("imds.example.com"), "{}: {said}", output.status);
        ensure!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        // It was asked, and so the name was being resolved.
        server.set_nonblocking(true)?;
        ensure!(server.recv(&mut [0; 512]).is_ok(), "nobody was asked");
        Ok(())
    });
}
