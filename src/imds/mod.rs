//! The only place that speaks to the metadata service: token, a snapshot of what is needed, and again what was not there
//! yet. Faults are typed; what the answers mean is for `metadata`.

mod connections;
mod endpoint;
mod http;
mod pace;
mod watch;
mod way;

pub use watch::Watch;
pub use way::Surroundings;

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hyper::header::HeaderValue;
use tokio::time::{Instant, sleep_until};

use self::http::Attempt;
use self::pace::Pace;
use self::way::{Failures, Way};
use crate::config::Config;
use crate::metadata::{
    ASSOCIATIONS, Answer, DETAIL_KEYS, Fault, INSTANCE_TAGS, INTERFACES, PRIMARY_MAC, ROUTING_KEYS, SELECTOR_KEYS, Tree,
};
use crate::metadata::{eni_directory, lines, listed_macs};
use crate::net::MacAddr;

/// The service's addresses: IPv4 on every instance, IPv6 on Nitro where it is enabled (the one that works in an
/// IPv6-only subnet).
pub const ENDPOINTS: [&str; 2] = ["http://169.254.169.254", "http://[fd00:ec2::254]"];

/// Between attempts, doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How long links are tried before it is the plain way's turn again: at boot it may be open by then.
const LINKS_TIME: Duration = Duration::from_secs(2);

/// A single key is asked for this often; then it is unknown, and its ENI waits.
const KEY_ATTEMPTS: u32 = 4;

/// Requests in flight, and so connections.
const IN_FLIGHT: usize = 8;

/// Asked for together with an ENI's listing, since next to every ENI has them: in an IPv4 subnet, and in an IPv6-only one.
const CERTAIN_KEYS: [&str; 4] = ["device-number", "interface-id", "local-ipv4s", "subnet-ipv4-cidr-block"];
const CERTAIN_IPV6_KEYS: [&str; 4] = ["device-number", "interface-id", "ipv6s", "subnet-ipv6-cidr-blocks"];

/// What is assigned and unassigned while an ENI is attached; all else stays as it is.
const CHANGING_KEYS: [&str; 4] = ["local-ipv4s", "ipv6s", "ipv4-prefix", "ipv6-prefix"];

/// Why no snapshot could be had. Each is its own message, since each has its own remedy.
#[derive(Debug)]
pub enum Error {
    /// `AWS_EC2_METADATA_DISABLED=true`.
    Disabled,
    /// The given endpoint is no URL that can be used.
    BadEndpoint { endpoint: String, why: String },
    /// A `prohibit` route stands before the service.
    Locked { endpoints: String },
    /// 403: metadata is turned off for this instance, or not allowed here.
    Forbidden { endpoint: String },
    /// 401 also with a new token.
    Unauthorized { endpoint: String },
    /// The answers are not the metadata service's.
    NotMetadata { endpoint: String, what: String },
    /// No usable answer before the deadline; the last thing that went wrong.
    NoAnswer { endpoints: String, fault: Fault, last: String, waited: Duration },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Error::Disabled => {
                write!(f, "instance metadata is switched off by AWS_EC2_METADATA_DISABLED=true: unset it to use eniup")
            }
            Error::BadEndpoint { endpoint, why } => write!(
                f,
                "metadata endpoint `{}` cannot be used: {why}; expected something like {}",
                endpoint.escape_debug(),
                ENDPOINTS[0]
            ),
            // systemd-imdsd(8), systemd 261: `locked` is the default where it runs.
            Error::Locked { endpoints } => write!(
                f,
                "instance metadata at {endpoints} is prohibited by this machine's own routing table, as systemd-imdsd \
                 does in its locked mode; boot with `systemd.imds.network=unlocked` on the kernel command line, or find \
                 the route with `ip route show table all type prohibit`"
            ),
            Error::Forbidden { endpoint } => write!(
                f,
                "{endpoint} refuses (403): instance metadata is disabled for this instance, or a proxy stands between; \
                 enable it with `aws ec2 modify-instance-metadata-options --http-endpoint enabled`"
            ),
            Error::Unauthorized { endpoint } => {
                write!(f, "{endpoint} refuses a token that it has just given (401): is it the real metadata service?")
            }
            Error::NotMetadata { endpoint, what } => {
                write!(f, "{endpoint} does not answer as the metadata service does: {what}")
            }
            Error::NoAnswer { endpoints, fault, last, waited } => write!(
                f,
                "no answer from instance metadata at {endpoints} within {:.1} s ({last}). {}",
                waited.as_secs_f64(),
                match fault {
                    Fault::Refused => "Does a firewall rule reject it, or is this no EC2 instance?",
                    Fault::Unreachable => "Does a route lead there?",
                    Fault::Overloaded => "Does something on this machine ask it all the time?",
                    Fault::NotMetadata => "Does a proxy or portal answer in its place?",
                    _ => {
                        "Is this an EC2 instance, is IMDSv2 enabled, and is the hop limit large enough if this runs in \
                         a container?"
                    }
                }
            ),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    pub fn fault(&self) -> Fault {
        match self {
            Error::Disabled => Fault::SwitchedOff,
            Error::BadEndpoint { .. } => Fault::BadEndpoint,
            Error::Locked { .. } => Fault::Locked,
            Error::Forbidden { .. } => Fault::Forbidden,
            Error::Unauthorized { .. } => Fault::Unauthorized,
            Error::NotMetadata { .. } => Fault::NotMetadata,
            Error::NoAnswer { fault, .. } => *fault,
        }
    }
}

/// How much of the tree is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// What routing needs.
    Routing,
    /// What the configuration tells ENIs apart by besides.
    Selection { has_tags: bool },
    /// What `status` shows besides.
    Details { has_tags: bool },
}

impl Scope {
    /// What a run needs with this configuration.
    pub fn of(config: &Config) -> Scope {
        match config.needs_details() || config.needs_tags() {
            true => Scope::Selection { has_tags: config.needs_tags() },
            false => Scope::Routing,
        }
    }

    /// What people want to see with this configuration.
    pub fn details(config: &Config) -> Scope {
        Scope::Details { has_tags: config.needs_tags() }
    }

    /// Whether the instance's tags belong to it.
    fn has_tags(self) -> bool {
        match self {
            Scope::Routing => false,
            Scope::Selection { has_tags } | Scope::Details { has_tags } => has_tags,
        }
    }
}

/// A session with the service: one token, few connections.
pub struct Imds {
    way: Way,
    token: HeaderValue,
    /// ENIs that are asked for before the service has named them.
    expected: Vec<MacAddr>,
    certain_keys: [&'static str; 4],
    pace: Pace,
    deadline: Instant,
}

impl Imds {
    /// Finds a way to the service and gets a token. `endpoint` overrides the two well-known ones.
    ///
    /// # Errors
    /// As [`Error`] says; by `deadline` at the latest.
    pub async fn connect(
        endpoint: Option<&str>,
        surroundings: &Surroundings,
        deadline: Instant,
    ) -> Result<Imds, Error> {
        Imds::check(endpoint)?;
        let endpoints = way::endpoints(endpoint, surroundings)?;
        let plain = way::ways(&endpoints, None);
        let shown: Vec<String> = plain.iter().map(Way::shown).collect();
        let shown = shown.join(" and ");
        let pace = Pace::default();
        let started = Instant::now();
        let mut pauses = Pauses::default();
        let mut round = 0;
        loop {
            let mut last = match way::race(&plain, &pace, deadline).await? {
                Ok((way, token)) => return Ok(Imds::new(way, token, surroundings, pace, deadline)),
                // Whoever put the route there wants nobody to go round it.
                Err(Failures { is_nobody_there: true, is_prohibited: true, .. }) => {
                    return Err(Error::Locked { endpoints: shown });
                }
                Err(failures) => failures,
            };
            if last.is_nobody_there {
                let until = deadline.min(Instant::now() + LINKS_TIME);
                match way::race(&way::ways_by_links(&endpoints, surroundings, round), &pace, until).await? {
                    Ok((way, token)) => {
                        tracing::info!("instance metadata is reached at {} ({})", way.shown(), last.shown);
                        return Ok(Imds::new(way, token, surroundings, pace, deadline));
                    }
                    Err(failures) => last.append(&failures),
                }
                round += 1;
            }
            if pauses.is_first() {
                tracing::info!("waiting for instance metadata ({})", last.shown);
            }
            if !pauses.pause(deadline).await {
                let fault = last.fault.unwrap_or(Fault::NoAnswer);
                let waited = started.elapsed();
                return Err(Error::NoAnswer { endpoints: shown, fault, last: last.shown, waited });
            }
        }
    }

    /// For whoever is to ask again and again.
    ///
    /// # Errors
    /// Those that time does not heal: it is switched off, or the endpoint cannot be used.
    pub fn check(endpoint: Option<&str>) -> Result<(), Error> {
        if std::env::var("AWS_EC2_METADATA_DISABLED").is_ok_and(|value| value.eq_ignore_ascii_case("true")) {
            return Err(Error::Disabled);
        }
        way::endpoints(endpoint, &Surroundings::default()).map(drop)
    }

    /// Whatever is asked from now on has to be answered by then.
    pub fn end_by(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    fn new(way: Way, token: HeaderValue, surroundings: &Surroundings, pace: Pace, deadline: Instant) -> Imds {
        let expected = surroundings.links.iter().map(|(mac, _)| *mac).collect();
        let certain_keys = if surroundings.is_ipv6_only { CERTAIN_IPV6_KEYS } else { CERTAIN_KEYS };
        Imds { way, token, expected, certain_keys, pace, deadline }
    }

    /// The interface subtree of this moment. A key that cannot be read is unknown in it.
    ///
    /// # Errors
    /// The list of interfaces or the primary's MAC cannot be read: without them nothing can be concluded.
    pub async fn snapshot(&mut self, scope: Scope) -> Result<Tree, Error> {
        let mut reading = Reading::new(Tree::default(), scope, self.certain_keys);
        reading.ask(PRIMARY_MAC.into());
        reading.ask(INTERFACES.into());
        if scope.has_tags() {
            reading.ask(INSTANCE_TAGS.into());
        }
        for mac in &self.expected {
            reading.ask_for_eni(*mac);
        }
        self.read(reading).await
    }

    /// A snapshot that says which ENI is the primary and nothing else, in one request.
    ///
    /// # Errors
    /// As for [`Imds::snapshot`].
    pub async fn primary(&mut self) -> Result<Tree, Error> {
        let mut reading = Reading::new(Tree::default(), Scope::Routing, self.certain_keys);
        reading.ask(PRIMARY_MAC.into());
        self.read(reading).await
    }

    /// The snapshot as it is by now, as far as these ENIs are concerned, and those that have come or gone since. What was
    /// read of the others stands.
    ///
    /// # Errors
    /// As for [`Imds::snapshot`].
    pub async fn ask_again(&mut self, mut tree: Tree, enis: &BTreeSet<MacAddr>, scope: Scope) -> Result<Tree, Error> {
        tree.forget(INTERFACES);
        for mac in enis {
            tree.forget_below(&eni_directory(*mac));
        }
        if !tree.is_whole_below(INSTANCE_TAGS) {
            tree.forget_below(INSTANCE_TAGS);
        }
        let mut reading = Reading::new(tree, scope, self.certain_keys);
        reading.ask(INTERFACES.into());
        if scope.has_tags() {
            reading.ask(INSTANCE_TAGS.into());
        }
        for mac in enis {
            reading.ask_for_eni(*mac);
        }
        self.read(reading).await
    }

    /// The same snapshot with what changes in an ENI's life read anew: which there are, and what they have.
    ///
    /// # Errors
    /// As for [`Imds::snapshot`].
    pub async fn glance(&mut self, mut tree: Tree, enis: &BTreeSet<MacAddr>, scope: Scope) -> Result<Tree, Error> {
        tree.forget(INTERFACES);
        for directory in enis.iter().map(|mac| eni_directory(*mac)) {
            CHANGING_KEYS.iter().for_each(|key| tree.forget(&format!("{directory}{key}")));
            tree.forget(&directory);
        }
        let mut reading = Reading::new(tree, scope, self.certain_keys);
        reading.ask(INTERFACES.into());
        for directory in enis.iter().map(|mac| eni_directory(*mac)) {
            reading.ask(directory);
        }
        self.read(reading).await
    }

    /// Asks until nothing is left to ask, a few at a time. A token that is refused is renewed once.
    async fn read(&mut self, mut reading: Reading) -> Result<Tree, Error> {
        let started = Instant::now();
        let mut token = self.token.clone();
        let mut is_renewed = false;
        let mut in_flight = FuturesUnordered::new();
        loop {
            while in_flight.len() < IN_FLIGHT
                && let Some(path) = reading.waiting.pop_front()
            {
                let (imds, token) = (&*self, token.clone());
                in_flight.push(async move { (imds.get(&path, &token).await, path, token) });
            }
            let Some((attempt, path, used)) = in_flight.next().await else { break };
            let answer = match attempt {
                Attempt::Body(body) => Answer::Present(body),
                Attempt::NotFound => Answer::Absent,
                Attempt::Unauthorized if used != token => {
                    reading.waiting.push_front(path);
                    continue;
                }
                Attempt::Unauthorized if !is_renewed => {
                    token = self.renewed_token(started).await?;
                    is_renewed = true;
                    reading.waiting.push_front(path);
                    continue;
                }
                Attempt::NoWay { why, .. } | Attempt::Passing { why, .. } | Attempt::Useless(why)
                    if !is_essential(&path) =>
                {
                    Answer::Unknown(why)
                }
                attempt => return Err(self.error(&attempt, &path, started)),
            };
            reading.learn(path, answer);
        }
        drop(in_flight);
        self.token = token;
        reading.tree.forget_unlisted();
        Ok(reading.tree)
    }

    async fn renewed_token(&self, started: Instant) -> Result<HeaderValue, Error> {
        let mut pauses = Pauses::default();
        loop {
            let attempt = http::token(&self.way.0, &self.pace, self.deadline).await;
            if let Attempt::Body(token) = attempt {
                return Ok(token);
            }
            let is_final = way::final_error(&attempt, &self.way).is_some();
            if is_final || !pauses.pause(self.deadline).await {
                return Err(self.error(&attempt, "a new token", started));
            }
        }
    }

    /// One path, asked for again while that may help.
    async fn get(&self, path: &str, token: &HeaderValue) -> Attempt<String> {
        let mut pauses = Pauses::default();
        let mut made = 0;
        let mut last: Option<Attempt<String>> = None;
        loop {
            let attempt = http::get(&self.way.0, token, path, &self.pace, self.deadline).await;
            made += 1;
            // Cut short by the deadline it says less than the one before.
            let is_cut = attempt.fault() == Fault::NoAnswer && Instant::now() >= self.deadline;
            let attempt = match last.take() {
                Some(last) if is_cut && !matches!(attempt, Attempt::Body(_)) => last,
                _ => attempt,
            };
            let may_pass = matches!(attempt, Attempt::NoWay { .. } | Attempt::Passing { .. });
            let is_enough = made >= KEY_ATTEMPTS && !is_essential(path);
            if !may_pass || is_enough || !pauses.pause(self.deadline).await {
                return attempt;
            }
            last = Some(attempt);
        }
    }

    fn error<T>(&self, attempt: &Attempt<T>, asked: &str, started: Instant) -> Error {
        way::final_error(attempt, &self.way).unwrap_or_else(|| Error::NoAnswer {
            endpoints: self.way.shown(),
            fault: attempt.fault(),
            last: format!("{asked}: {}", attempt.shown()),
            waited: started.elapsed(),
        })
    }
}

/// Without these nothing can be concluded, so they are asked for until the deadline.
fn is_essential(path: &str) -> bool {
    path == PRIMARY_MAC || path == INTERFACES
}

/// What was read and what is to be read. Each answer tells what to ask next.
struct Reading {
    tree: Tree,
    scope: Scope,
    certain_keys: [&'static str; 4],
    waiting: VecDeque<String>,
    asked: BTreeSet<String>,
}

impl Reading {
    /// What is in the tree is not asked for.
    fn new(tree: Tree, scope: Scope, certain_keys: [&'static str; 4]) -> Reading {
        let asked = tree.paths().map(String::from).collect();
        Reading { tree, scope, certain_keys, waiting: VecDeque::new(), asked }
    }

    fn ask(&mut self, path: String) {
        if self.asked.insert(path.clone()) {
            self.waiting.push_back(path);
        }
    }

    fn ask_for_eni(&mut self, mac: MacAddr) {
        let directory = eni_directory(mac);
        if !self.asked.contains(&directory) {
            let keys = self.certain_keys.map(|key| format!("{directory}{key}"));
            self.ask(directory);
            keys.into_iter().for_each(|key| self.ask(key));
        }
    }

    fn learn(&mut self, path: String, answer: Answer) {
        match &answer {
            Answer::Present(listing) if path == INTERFACES => {
                let (macs, _) = listed_macs(listing);
                let is_listed = |path: &String| macs.iter().any(|mac| path.starts_with(&eni_directory(*mac)));
                self.waiting.retain(|path| !path.starts_with(INTERFACES) || is_essential(path) || is_listed(path));
                macs.into_iter().for_each(|mac| self.ask_for_eni(mac));
            }
            Answer::Present(listing) if path.ends_with('/') => {
                let names: Vec<&str> = lines(listing).filter(|name| self.is_wanted(&path, name)).collect();
                names.into_iter().for_each(|name| self.ask(format!("{path}{name}")));
            }
            Answer::Present(_) | Answer::Absent | Answer::Unknown(_) => {}
        }
        self.tree.insert(path, answer);
    }

    fn is_wanted(&self, directory: &str, name: &str) -> bool {
        let is_detail = || DETAIL_KEYS.contains(&name) || name == ASSOCIATIONS || directory.ends_with(ASSOCIATIONS);
        let is_of_scope = match self.scope {
            Scope::Routing => false,
            Scope::Selection { .. } => SELECTOR_KEYS.contains(&name),
            Scope::Details { .. } => is_detail(),
        };
        directory == INSTANCE_TAGS || ROUTING_KEYS.contains(&name) || is_of_scope
    }
}

/// The pauses between attempts.
struct Pauses {
    next: Duration,
}

impl Default for Pauses {
    fn default() -> Pauses {
        Pauses { next: FIRST_PAUSE }
    }
}

impl Pauses {
    fn is_first(&self) -> bool {
        self.next == FIRST_PAUSE
    }

    /// Waits before another attempt; says no, at once, where the deadline would come first.
    async fn pause(&mut self, deadline: Instant) -> bool {
        let until = Instant::now() + with_jitter(self.next);
        self.next = (self.next * 2).min(LONGEST_PAUSE);
        if until < deadline {
            sleep_until(until).await;
        }
        until < deadline
    }
}

/// Between half and the whole of the pause, so that many hosts (and runs) do not ask in step.
fn with_jitter(pause: Duration) -> Duration {
    let nanos = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.subsec_nanos());
    pause / 2 + pause / 2 * (nanos % 1024) / 1024
}
