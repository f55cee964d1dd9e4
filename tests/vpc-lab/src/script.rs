//! What happens to the machine in a storm, drawn from a seed before any of it happens: the same seed is the same storm
//! wherever it is played.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fastrand::Rng;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// A machine's ENIs at most.
pub const ENIS: usize = 15;
/// Subnets in which they are put; the last one is without IPv4.
pub const SUBNETS: u8 = 5;
pub const IPV6_ONLY: u8 = SUBNETS - 1;
/// Host number of the client in each subnet; above all that an ENI here may have.
pub const CLIENT: u8 = 100;

/// Addresses and prefixes of an ENI at most, and prefixes of the machine: each has conversations over it.
const SOURCES: usize = 6;
const PREFIXES: usize = 8;

/// An ENI as it is created.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ScriptedEni {
    /// Its name in this storm; 0 is the primary.
    pub number: usize,
    pub subnet: u8,
    pub device: u32,
    /// Addresses (whole-length prefixes) and delegated prefixes, in the order in which they came.
    pub sources: Vec<IpNet>,
}

impl ScriptedEni {
    fn has_ipv4(&self) -> bool {
        self.sources.iter().any(|source| is_address(source) && source.addr().is_ipv4())
    }

    /// What EC2 does not take away, and what makes the ENI one of its family: the first address of each, of a secondary
    /// ENI with IPv4 the first IPv4 address alone.
    fn lasting(&self) -> Vec<IpNet> {
        let first = |is_ipv4: bool| {
            self.sources.iter().copied().find(|source| is_address(source) && source.addr().is_ipv4() == is_ipv4)
        };
        let ipv6 = first(false).filter(|_| self.number == 0 || !self.has_ipv4());
        first(true).into_iter().chain(ipv6).collect()
    }
}

pub fn is_address(source: &IpNet) -> bool {
    source.prefix_len() == source.max_prefix_len()
}

/// One thing that happens to the machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Operation {
    Attach(ScriptedEni),
    Detach { eni: usize },
    Assign { eni: usize, source: IpNet },
    Unassign { eni: usize, source: IpNet },
    Move { source: IpNet, from: usize, to: usize },
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Operation::Attach(ScriptedEni { number, subnet, device, sources }) => {
                let sources: Vec<String> = sources.iter().map(IpNet::to_string).collect();
                write!(f, "attach ENI {number} of subnet {subnet} at {device}: {}", sources.join(" "))
            }
            Operation::Detach { eni } => write!(f, "detach ENI {eni}"),
            Operation::Assign { eni, source } => write!(f, "assign {source} to ENI {eni}"),
            Operation::Unassign { eni, source } => write!(f, "unassign {source} from ENI {eni}"),
            Operation::Move { source, from, to } => write!(f, "move {source} from ENI {from} to ENI {to}"),
        }
    }
}

/// The machine's ENIs, as far as a storm has come.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Machine {
    pub enis: BTreeMap<usize, ScriptedEni>,
}

impl Machine {
    pub fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::Attach(eni) => _ = self.enis.insert(eni.number, eni.clone()),
            Operation::Detach { eni } => _ = self.enis.remove(eni),
            Operation::Assign { eni, source } => self.sources_mut(*eni).push(*source),
            Operation::Unassign { eni, source } => self.sources_mut(*eni).retain(|own| own != source),
            Operation::Move { source, from, to } => {
                self.sources_mut(*from).retain(|own| own != source);
                self.sources_mut(*to).push(*source);
            }
        }
    }

    fn sources_mut(&mut self, eni: usize) -> &mut Vec<IpNet> {
        &mut self.enis.get_mut(&eni).expect("a script names ENIs that are there").sources
    }

    pub fn sources(&self) -> impl Iterator<Item = IpNet> {
        self.enis.values().flat_map(|eni| eni.sources.iter().copied())
    }

    /// What goes, or goes elsewhere, by an operation.
    pub fn leaving(&self, operation: &Operation) -> Vec<IpNet> {
        match operation {
            Operation::Attach(_) | Operation::Assign { .. } => Vec::new(),
            Operation::Detach { eni } => self.enis[eni].sources.clone(),
            Operation::Unassign { source, .. } | Operation::Move { source, .. } => vec![*source],
        }
    }

    /// What comes by an operation, be it from another ENI.
    pub fn coming(operation: &Operation) -> Vec<IpNet> {
        match operation {
            Operation::Attach(eni) => eni.sources.clone(),
            Operation::Assign { source, .. } | Operation::Move { source, .. } => vec![*source],
            Operation::Detach { .. } | Operation::Unassign { .. } => Vec::new(),
        }
    }

    /// The primary's sources, and those of all ENIs in the subnet in which the operation happens: their rules may have to
    /// change with it.
    pub fn near(&self, operation: &Operation) -> Vec<IpNet> {
        let subnet = match operation {
            Operation::Attach(eni) => eni.subnet,
            Operation::Detach { eni }
            | Operation::Assign { eni, .. }
            | Operation::Unassign { eni, .. }
            | Operation::Move { to: eni, .. } => self.enis[eni].subnet,
        };
        let is_near = |eni: &&ScriptedEni| eni.number == 0 || eni.subnet == subnet;
        self.enis.values().filter(is_near).flat_map(|eni| eni.sources.iter().copied()).collect()
    }
}

/// A storm: the machine at its launch, and what happens to it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Script {
    pub launch: Vec<ScriptedEni>,
    pub operations: Vec<Operation>,
}

impl Script {
    /// Draws a storm. The number of ENIs goes to and fro between 1 and [`ENIS`]; each of these numbers is gone to in turn,
    /// in an order of chance.
    pub fn write(seed: u64, operations: usize) -> Script {
        let mut writer = Writer { rng: Rng::with_seed(seed), machine: Machine::default(), count: 0, tides: Vec::new() };
        let launch: Vec<ScriptedEni> = (0..writer.rng.usize(1..=ENIS)).map(|_| writer.launch()).collect();
        let operations = (0..operations).map(|_| writer.draw()).collect();
        Script { launch, operations }
    }
}

struct Writer {
    rng: Rng,
    machine: Machine,
    /// ENIs so far.
    count: usize,
    /// Numbers of ENIs to go to, the next one last.
    tides: Vec<usize>,
}

impl Writer {
    fn launch(&mut self) -> ScriptedEni {
        let device = self.count as u32;
        let eni = self.eni(device);
        self.machine.apply(&Operation::Attach(eni.clone()));
        eni
    }

    fn draw(&mut self) -> Operation {
        let operation = loop {
            let drawn = match self.rng.u8(..9) {
                0..3 => Some(self.attach_or_detach()),
                3..6 => self.assign(),
                6..8 => self.unassign(),
                _ => self.reassign(),
            };
            if let Some(operation) = drawn {
                break operation;
            }
        };
        self.machine.apply(&operation);
        operation
    }

    fn attach_or_detach(&mut self) -> Operation {
        let there = self.machine.enis.len();
        while self.tides.last().is_none_or(|tide| *tide == there) {
            if self.tides.pop().is_none() {
                self.tides = (1..=ENIS).collect();
                self.rng.shuffle(&mut self.tides);
            }
        }
        if self.tides.last().is_some_and(|tide| *tide > there) {
            let taken: Vec<u32> = self.machine.enis.values().map(|eni| eni.device).collect();
            let free: Vec<u32> = (1..ENIS as u32 + 5).filter(|device| !taken.contains(device)).collect();
            let device = self.pick(&free);
            return Operation::Attach(self.eni(device));
        }
        let secondaries: Vec<usize> = self.machine.enis.keys().copied().filter(|number| *number > 0).collect();
        Operation::Detach { eni: self.pick(&secondaries) }
    }

    /// The primary has both families.
    fn eni(&mut self, device: u32) -> ScriptedEni {
        let number = self.count;
        self.count += 1;
        let subnet = self.rng.u8(..if number == 0 { IPV6_ONLY } else { SUBNETS });
        let (ipv4s, ipv6s) = match (number, subnet) {
            (0, _) => (self.rng.usize(1..=3), self.rng.usize(1..=2)),
            (_, IPV6_ONLY) => (0, self.rng.usize(1..=2)),
            _ => (self.rng.usize(1..=3), self.rng.usize(..=2)),
        };
        let mut eni = ScriptedEni { number, subnet, device, sources: Vec::new() };
        for is_ipv4 in std::iter::repeat_n(true, ipv4s).chain(std::iter::repeat_n(false, ipv6s)) {
            let address = self.address(subnet, is_ipv4, &eni.sources);
            eni.sources.push(address);
        }
        eni
    }

    fn assign(&mut self) -> Option<Operation> {
        let all: Vec<ScriptedEni> = self.machine.enis.values().cloned().collect();
        let eni = &all[self.rng.usize(..all.len())];
        if eni.sources.len() == SOURCES {
            return None;
        }
        let is_ipv4 = eni.has_ipv4() && self.rng.bool();
        let prefixes = self.machine.sources().filter(|source| !is_address(source)).count();
        let source = match self.rng.u8(..4) {
            0 if prefixes < PREFIXES => self.prefix(eni.subnet, is_ipv4)?,
            _ => self.address(eni.subnet, is_ipv4, &[]),
        };
        Some(Operation::Assign { eni: eni.number, source })
    }

    fn unassign(&mut self) -> Option<Operation> {
        let (eni, source) = self.passing(|_| true)?;
        Some(Operation::Unassign { eni, source })
    }

    /// EC2 lets secondary IPv4 addresses alone go from one ENI to another, within a subnet.
    fn reassign(&mut self) -> Option<Operation> {
        let (from, source) = self.passing(|source| is_address(source) && source.addr().is_ipv4())?;
        let subnet = self.machine.enis[&from].subnet;
        let may_have = |eni: &&ScriptedEni| {
            eni.number != from && eni.subnet == subnet && eni.has_ipv4() && eni.sources.len() < SOURCES
        };
        let others: Vec<usize> = self.machine.enis.values().filter(may_have).map(|eni| eni.number).collect();
        (!others.is_empty()).then(|| Operation::Move { source, from, to: self.pick(&others) })
    }

    /// Something of this sort that may go, and its ENI.
    fn passing(&mut self, is_meant: impl Fn(&IpNet) -> bool) -> Option<(usize, IpNet)> {
        let passing = |eni: &ScriptedEni| -> Vec<(usize, IpNet)> {
            let lasting = eni.lasting();
            let may_go = |source: &&IpNet| !lasting.contains(source) && is_meant(source);
            eni.sources.iter().filter(may_go).map(|source| (eni.number, *source)).collect()
        };
        let all: Vec<(usize, IpNet)> = self.machine.enis.values().flat_map(passing).collect();
        (!all.is_empty()).then(|| self.pick(&all))
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.rng.usize(..from.len())]
    }

    /// One that nobody has; `taken` are spoken for besides.
    fn address(&mut self, subnet: u8, is_ipv4: bool, taken: &[IpNet]) -> IpNet {
        let candidates = (4..CLIENT).map(|host| match is_ipv4 {
            true => IpNet::from(IpAddr::from(ipv4(subnet, host))),
            false => IpAddr::from(ipv6(subnet, host.into())).into(),
        });
        let is_free = |net: &IpNet| !taken.contains(net) && self.machine.sources().all(|own| own != *net);
        let free: Vec<IpNet> = candidates.filter(is_free).collect();
        self.pick(&free)
    }

    /// A /28 of the subnet's upper half, or a /80, where no single address is.
    fn prefix(&mut self, subnet: u8, is_ipv4: bool) -> Option<IpNet> {
        let candidates = (0..7).map(|n| match is_ipv4 {
            true => IpNet::from(Ipv4Net::new(ipv4(subnet, 128 + 16 * n), 28).expect("28 is a length")),
            false => {
                let mut segments = ipv6(subnet, 0).segments();
                segments[4] = 1 + u16::from(n);
                Ipv6Net::new(segments.into(), 80).expect("80 is a length").into()
            }
        });
        let free: Vec<IpNet> = candidates.filter(|net| self.machine.sources().all(|own| own != *net)).collect();
        (!free.is_empty()).then(|| self.pick(&free))
    }
}

pub fn ipv4(subnet: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, subnet, host)
}

pub fn ipv6(subnet: u8, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2600, 0x1f16, 0x67f, 0xf200 + u16::from(subnet), 0, 0, 0, host)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_is_a_storm() {
        assert_eq!(Script::write(7, 500), Script::write(7, 500));
        assert_ne!(Script::write(7, 500), Script::write(8, 500));
        // A longer one begins as the shorter one does.
        assert_eq!(Script::write(7, 500).operations[..100], Script::write(7, 100).operations);
    }

    #[test]
    fn five_hundred_operations_go_through_every_number_of_enis_and_every_kind_of_change() {
        for seed in 0..50 {
            let Script { launch, operations } = Script::write(seed, 500);
            let mut machine = Machine::default();
            launch.into_iter().for_each(|eni| machine.apply(&Operation::Attach(eni)));
            let mut numbers = BTreeSet::from([machine.enis.len()]);
            let mut kinds = BTreeMap::new();
            for operation in &operations {
                *kinds.entry(operation.to_string().split(' ').next().map(str::to_string)).or_insert(0) += 1;
                machine.apply(operation);
                numbers.insert(machine.enis.len());
                let sources: Vec<IpNet> = machine.sources().collect();
                assert_eq!(sources.iter().collect::<BTreeSet<_>>().len(), sources.len(), "seed {seed}: {operation}");
                assert!(machine.enis.values().all(|eni| !eni.lasting().is_empty()), "seed {seed}: {operation}");
            }
            assert_eq!(numbers, (1..=ENIS).collect(), "seed {seed}");
            assert!(kinds.len() == 5 && kinds.values().all(|count| *count >= 20), "seed {seed}: {kinds:?}");
        }
    }
}
