//! How metadata goes wrong for the time of a run: everything that follows from a seed.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use fastrand::Rng;

use crate::imds::{Action, Faults, Occurrences, Rule};
use crate::metadata::Propagation;

/// The keys of an ENI that eniup asks for, and `None` for its place in the listing.
const KEYS: [Option<&str>; 13] = [
    None,
    Some("device-number"),
    Some("network-card"),
    Some("interface-id"),
    Some("local-ipv4s"),
    Some("ipv6s"),
    Some("ipv4-prefix"),
    Some("ipv6-prefix"),
    Some("subnet-id"),
    Some("subnet-ipv4-cidr-block"),
    Some("subnet-ipv6-cidr-blocks"),
    Some("vpc-ipv4-cidr-blocks"),
    Some("vpc-ipv6-cidr-blocks"),
];

/// From a change until the last key of it can be read, at most: within the time of a run.
pub const SLOWEST: Duration = Duration::from_millis(1200);

#[derive(Clone, Debug, PartialEq)]
pub struct Trouble {
    pub faults: Faults,
    /// Keys that keep what they read before the change, of every ENI; none is its place in the listing.
    pub held: Vec<Option<&'static str>>,
    /// Keys come one by one while the run reads them.
    pub propagation: Option<Propagation>,
    /// Reads that are lied to: with what was true before the change, or that there is nothing.
    pub lie: Option<Rule>,
    /// Of the packets to and from the service, 0 to 1.
    pub loss: f64,
}

impl Trouble {
    pub fn random(seed: u64) -> Trouble {
        // Not the numbers of `Faults::random`, nor those of the change.
        let mut random = Rng::with_seed(seed.wrapping_add(1 << 40));
        let is_faulty = random.f64() < 0.7;
        let faults = if is_faulty { Faults::random(seed) } else { Faults { seed, ..Faults::default() } };
        let held = match random.f64() < 0.35 {
            true => KEYS.into_iter().filter(|_| random.bool()).collect(),
            false => Vec::new(),
        };
        let propagation = (random.f64() < 0.25).then(|| random_propagation(&mut random));
        let lie = (random.f64() < 0.3).then(|| random_lie(&mut random));
        let loss = if random.f64() < 0.15 { 0.02 + random.f64() * 0.3 } else { 0.0 };
        Trouble { faults, held, propagation, lie, loss }
    }

    /// All that goes wrong with requests.
    pub fn rules(&self) -> Faults {
        let rules = self.lie.iter().chain(&self.faults.rules).cloned().collect();
        Faults { rules, ..self.faults.clone() }
    }

    /// Whether answers that look right are not all of one truth.
    pub fn is_lie(&self) -> bool {
        !self.held.is_empty() || self.is_unsteady()
    }

    /// Whether a later look would be told something else.
    pub fn is_unsteady(&self) -> bool {
        self.propagation.is_some() || self.lie.is_some()
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Trouble { faults, held, propagation, lie, loss } = self;
        write!(f, "{} rules of faults", faults.rules.len())?;
        if !held.is_empty() {
            let held: Vec<&str> = held.iter().map(|key| key.unwrap_or("listing")).collect();
            write!(f, ", held: {}", held.join(" "))?;
        }
        if let Some(Propagation { delay, .. }) = propagation {
            write!(f, ", keys come within {delay:?} and later")?;
        }
        if let Some(lie) = lie {
            write!(f, ", {:?} to {} {:?}", lie.action, lie.path, lie.occurrences)?;
        }
        if *loss > 0.0 {
            write!(f, ", {:.0} % of packets lost", loss * 100.0)?;
        }
        Ok(())
    }
}

fn random_propagation(random: &mut Rng) -> Propagation {
    let mut any = || SLOWEST.mul_f64(random.f64());
    let overrides: BTreeMap<String, Duration> =
        KEYS.into_iter().flatten().map(|key| (key.to_string(), any())).collect();
    let (delay, listing_entry) = (any(), any());
    // After its last key, which is the slowest.
    let detach_lag = Duration::ZERO;
    Propagation { delay, overrides, listing_entry, detach_lag, zero_device_number_first: random.bool() }
}

fn random_lie(random: &mut Rng) -> Rule {
    let paths = ["*", "*/macs/", "*/macs/*/", "*/local-ipv4s", "*/ipv6s", "*/ipv4-prefix", "*/device-number"];
    let path = paths[random.usize(0..paths.len())];
    let occurrences = match random.u8(0..5) {
        0 => Occurrences::FirstN(random.u64(1..=4)),
        1 => Occurrences::EveryNth(random.u64(2..=6)),
        2 => Occurrences::Probability(random.f64()),
        3 => Occurrences::OnEveryNthConnection(random.u64(2..=3)),
        _ => Occurrences::Always,
    };
    let action = if random.u8(0..3) == 0 { Action::Status(404) } else { Action::Stale };
    Rule::new(path, occurrences, action)
}
