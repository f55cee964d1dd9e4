//! The metadata client against a service that misbehaves on request, and in networks that lead astray.

#[path = "support/metadata_lab.rs"]
mod lab;

use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use eniup::imds::{Error, Scope};
use eniup::metadata::{self, Answer};
use lab::{Lab, all_links, block_on, dual_stack_eni, eni, mac, rule};
use vpc_lab::imds::{Action, Faults, Method, Occurrences};

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
        ensure!(counters.max_in_flight <= 8 && counters.connections <= 9, "{counters:?}");
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
