//! An HTTP/1.1 server that behaves like EC2's instance metadata service, version 2 only, and misbehaves on request. What a
//! path reads is `metadata`'s business; in which network namespace the listeners were opened is the caller's.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::metadata::{self, Answer, Published};

/// From EC2's documentation: a token lives one second to six hours.
const TOKEN_SECONDS: std::ops::RangeInclusive<u64> = 1..=21_600;
const TOKEN_LENGTH: usize = 56;
/// A head beyond this is answered 431, a body beyond it 413. The service's own limits are not published.
const HEAD_LIMIT: usize = 16 * 1024;
const BODY_LIMIT: usize = 4 * 1024;
/// How long a kept connection may be silent, and a response unread.
const PATIENCE: Duration = Duration::from_secs(30);
const CONNECTION_LIMIT: usize = 1024;

/// A running service. Dropping it closes its listeners and connections and waits for its threads.
pub struct Service {
    shared: Arc<Shared>,
    listeners: Vec<TcpListener>,
    threads: Vec<JoinHandle<()>>,
}

/// What was asked since the start or the last [`Service::reset_counters`]. A request is counted before the last byte of
/// its response leaves, so whoever has read a response finds it here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Tokens handed out.
    pub tokens: u64,
    /// GET and HEAD by the status that was sent; those that got no status (reset, closed, garbage, hang) are not here.
    pub gets_by_status: BTreeMap<u16, u64>,
    /// GET and HEAD by path as asked, without query, with and without answer.
    pub gets_by_path: BTreeMap<String, u64>,
    pub connections: u64,
    /// Connections open at the same time, at most.
    pub max_concurrent: u64,
    /// Requests waiting for their response at the same time, at most.
    pub max_in_flight: u64,
    /// Bytes of the responses, heads included.
    pub bytes: u64,
    /// Requests that a fault has touched.
    pub faults: u64,
}

/// What goes wrong, when. Of the rules that match a request, the first whose turn it is acts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Faults {
    /// Decides [`Occurrences::Probability`] and the bytes of [`Action::Garbage`].
    pub seed: u64,
    pub rules: Vec<Rule>,
    /// From this many requests on all is well, whatever the rules say.
    pub well_after: Option<u64>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// A glob on the whole path (`/latest/api/token`) or on what is below `/latest/meta-data/` (`*/device-number`).
    pub path: String,
    /// `None` is any method.
    pub method: Option<Method>,
    pub occurrences: Occurrences,
    pub action: Action,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Get,
    Head,
    Put,
    Other,
}

/// Counted over the requests that match the rule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Occurrences {
    FirstN(u64),
    /// `EveryNth(3)`: the third, the sixth and so on.
    EveryNth(u64),
    /// 0 to 1.
    Probability(f64),
    /// `OnEveryNthConnection(2)`: all requests on the second connection, the fourth and so on, as if there were as many
    /// services behind one address.
    OnEveryNthConnection(u64),
    Always,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Status(u16),
    /// The right answer, this much later.
    Delay(Duration),
    /// RST instead of an answer.
    Reset,
    /// FIN instead of an answer.
    Close,
    /// The right head, this many bytes of the body at most, and FIN.
    Truncate(usize),
    /// The right answer, one byte at a time with a pause before each.
    Drip(Duration),
    /// Bytes that are not HTTP, and FIN.
    Garbage,
    /// The right answer whose `Content-Length` promises more than comes, on a connection that stays open.
    WrongContentLength,
    /// 200 with a body that is not UTF-8.
    NotUtf8,
    /// 200 with this body.
    Body(String),
    /// 200 with a body of this many bytes, without a newline.
    HugeBody(u64),
    /// 302 to this place.
    Redirect(String),
    /// On a read: its token has expired from here on. On a PUT: a token that has already expired.
    ExpireToken,
    /// No answer, for as long as the client waits.
    Hang,
    /// What a read gave when [`Service::remember`] was called.
    Stale,
    /// Interim answers (100) without end.
    Interim,
    /// The right answer, and FIN that no header announces.
    Unannounced,
    /// The right answer of an HTTP/1.0 server, whose connections end.
    Http10,
    /// The right answer, whose end is that of its connection: it does not say how long it is.
    Unmeasured,
}

impl Rule {
    pub fn new(path: &str, occurrences: Occurrences, action: Action) -> Rule {
        Rule { path: path.to_string(), method: None, occurrences, action }
    }

    pub fn only(self, method: Method) -> Rule {
        Rule { method: Some(method), ..self }
    }
}

impl Faults {
    /// Faults that follow from the seed alone. They get better: after 10 to 100 requests all is well. Each can be told from
    /// a right answer, so a client that checks and tries again ends with the truth.
    pub fn random(seed: u64) -> Faults {
        let mut random = fastrand::Rng::with_seed(seed);
        let rules = (0..random.usize(1..=4)).map(|_| random_rule(&mut random)).collect();
        Faults { seed, rules, well_after: Some(random.u64(10..=100)) }
    }
}

fn random_rule(random: &mut fastrand::Rng) -> Rule {
    let path = ["*", "/latest/api/token", "*/macs/*", "*/macs/", "*/device-number", "*/local-ipv4s", "*/ipv6s"];
    let occurrences = [
        Occurrences::FirstN(random.u64(1..=4)),
        Occurrences::EveryNth(random.u64(2..=6)),
        Occurrences::Probability(random.f64() * 0.5),
        Occurrences::OnEveryNthConnection(random.u64(2..=3)),
    ];
    let actions = [
        Action::Status([401, 429, 500, 502, 503, 504][random.usize(0..6)]),
        Action::Delay(Duration::from_millis(random.u64(1..=500))),
        Action::Reset,
        Action::Close,
        // A body cut to nothing at all, as the values of a machine can be one byte long.
        Action::Truncate(0),
        Action::Drip(Duration::from_millis(random.u64(1..=5))),
        Action::Garbage,
        Action::WrongContentLength,
        Action::NotUtf8,
        Action::Body("<html>sign in</html>".to_string()),
        Action::HugeBody(random.u64(1..=16) << 20),
        Action::Redirect("http://127.0.0.1:1/".to_string()),
        Action::ExpireToken,
        Action::Hang,
        Action::Interim,
        Action::Unannounced,
        Action::Http10,
        Action::Unmeasured,
    ];
    let action = actions[random.usize(0..actions.len())].clone();
    let occurrences = match action {
        // Each costs the client a timeout.
        Action::Hang | Action::WrongContentLength => Occurrences::FirstN(random.u64(1..=2)),
        _ => occurrences[random.usize(0..occurrences.len())],
    };
    Rule::new(path[random.usize(0..path.len())], occurrences, action)
}

/// A service on a free port of 127.0.0.1.
pub fn serve_on_loopback(tree: Arc<Mutex<Published>>) -> io::Result<(Service, SocketAddr)> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let address = listener.local_addr()?;
    Ok((Service::start(vec![listener], tree), address))
}

impl Service {
    /// Serves on all listeners, in whatever namespace they were opened.
    pub fn start(listeners: Vec<TcpListener>, tree: Arc<Mutex<Published>>) -> Service {
        let shared = Arc::new(Shared {
            tree,
            state: Mutex::new(State { keep_alive: true, ..State::default() }),
            changed: Condvar::new(),
        });
        let threads = listeners
            .iter()
            .map(|listener| {
                let listener = listener.try_clone().expect("a listener can be duplicated");
                let shared = shared.clone();
                std::thread::spawn(move || accept(&listener, &shared))
            })
            .collect();
        Service { shared, listeners, threads }
    }

    pub fn requests(&self) -> Counters {
        self.shared.state().counters.clone()
    }

    pub fn reset_counters(&self) {
        let mut state = self.shared.state();
        let (open, in_flight) = (state.connections.len() as u64, state.in_flight);
        state.counters = Counters { max_concurrent: open, max_in_flight: in_flight, ..Counters::default() };
    }

    /// Replaces the faults and begins counting their occurrences; `Faults::default()` is a service in good health.
    pub fn set_faults(&self, faults: Faults) {
        self.shared.state().faults = FaultState::new(faults);
    }

    /// Keeps what reads give at this moment, for [`Action::Stale`].
    pub fn remember(&self) {
        let tree = self.shared.tree.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.shared.state().remembered = Some((Arc::new(tree), Instant::now()));
    }

    /// The time each request waits for its answer.
    pub fn set_latency(&self, latency: Duration) {
        self.shared.state().latency = latency;
    }

    /// A disabled service answers all with 403.
    pub fn set_disabled(&self, is_disabled: bool) {
        self.shared.state().is_disabled = is_disabled;
    }

    /// Whether connections outlive a request. EC2's were seen to answer `Connection: close` each time, so a client must
    /// live with both.
    pub fn set_keep_alive(&self, keep_alive: bool) {
        self.shared.state().keep_alive = keep_alive;
    }

    /// Makes every token given so far invalid, as a restart of the real service does.
    pub fn forget_tokens(&self) {
        self.shared.state().tokens = Tokens::default();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.is_stopping = true;
        for connection in state.connections.values() {
            let _ = connection.shutdown(Shutdown::Both);
        }
        drop(state);
        self.shared.changed.notify_all();
        for listener in &self.listeners {
            // SAFETY: the descriptor is open for as long as `listener` lives. Linux lets a thread in accept() return EINVAL.
            unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RDWR) };
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        let state = self.shared.state();
        let still_open = |state: &mut State| !state.connections.is_empty();
        let waited = self.shared.changed.wait_timeout_while(state, Duration::from_secs(5), still_open);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Never is `state` locked while `tree` is, nor the other way round: the test holds `tree` when it pleases.
struct Shared {
    tree: Arc<Mutex<Published>>,
    state: Mutex<State>,
    /// The service stops, or a connection has ended.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    is_stopping: bool,
    is_disabled: bool,
    keep_alive: bool,
    latency: Duration,
    tokens: Tokens,
    faults: FaultState,
    /// A tree and the moment it is read at.
    remembered: Option<(Arc<Published>, Instant)>,
    counters: Counters,
    in_flight: u64,
    connections: HashMap<u64, Arc<TcpStream>>,
    next_connection: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps, but not beyond the end of the service.
    fn pause(&self, duration: Duration) {
        let is_running = |state: &mut State| !state.is_stopping;
        let waited = self.changed.wait_timeout_while(self.state(), duration, is_running);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// `None`: the service stops or has too many connections.
    fn enter(&self, connection: &Arc<TcpStream>) -> Option<u64> {
        let mut state = self.state();
        if state.is_stopping || state.connections.len() >= CONNECTION_LIMIT {
            return None;
        }
        let number = state.next_connection;
        state.next_connection += 1;
        state.connections.insert(number, connection.clone());
        state.counters.connections += 1;
        state.counters.max_concurrent = state.counters.max_concurrent.max(state.connections.len() as u64);
        Some(number)
    }

    /// Gives up both of the connection's owners, so the kernel closes it before anybody can see it gone.
    fn leave(&self, number: u64, connection: Arc<TcpStream>) {
        let mut state = self.state();
        state.connections.remove(&number);
        drop(connection);
        drop(state);
        self.changed.notify_all();
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    loop {
        let connection = match listener.accept() {
            Ok((connection, _)) => Arc::new(connection),
            Err(_) if shared.state().is_stopping => return,
            // A client that gave up in the queue, or no descriptors left: neither ends the service.
            Err(_) => {
                shared.pause(Duration::from_millis(10));
                continue;
            }
        };
        let Some(number) = shared.enter(&connection) else { continue };
        let shared = shared.clone();
        std::thread::spawn(move || {
            let _ = serve_connection(&connection, number, &shared);
            shared.leave(number, connection);
        });
    }
}

fn serve_connection(connection: &TcpStream, number: u64, shared: &Shared) -> io::Result<()> {
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.set_write_timeout(Some(PATIENCE))?;
    let mut buffer = Vec::new();
    loop {
        let request = match read_request(connection, &mut buffer)? {
            Received::Request(request) => request,
            Received::End => return Ok(()),
            Received::Refused(status) => {
                let refusal = encode(&Response::of_status(status), false, false);
                shared.state().counters.bytes += refusal.len() as u64;
                return refuse(connection, &refusal);
            }
        };
        if !answer_request(connection, number, shared, &request)? {
            return Ok(());
        }
    }
}

/// Answers, and says whether the connection lives on.
fn answer_request(mut connection: &TcpStream, number: u64, shared: &Shared, request: &Request) -> io::Result<bool> {
    let (fault, latency, keep_alive) = shared.state().begin(request, number);
    if !latency.is_zero() {
        shared.pause(latency);
    }
    if let Some(Action::Delay(duration)) = fault {
        shared.pause(duration);
    }
    let response = respond(shared, request, fault.as_ref());
    let delivery = deliver(request, response, fault.as_ref(), keep_alive && request.keep_alive);
    if delivery.ending == Ending::Hang {
        wait_for_the_client_to_leave(connection);
    }
    shared.state().end(request, &delivery);

    let Delivery { status: _, bytes, padding, pause, ending } = delivery;
    match pause {
        None => connection.write_all(&bytes)?,
        Some(pause) => {
            for byte in &bytes {
                shared.pause(pause);
                connection.write_all(&[*byte])?;
            }
        }
    }
    write_padding(connection, padding)?;
    if ending == Ending::Again {
        loop {
            connection.write_all(&bytes)?;
        }
    }
    if ending == Ending::Reset {
        reset_on_close(connection)?;
    }
    Ok(ending == Ending::KeepAlive)
}

impl State {
    fn begin(&mut self, request: &Request, connection: u64) -> (Option<Action>, Duration, bool) {
        self.in_flight += 1;
        self.counters.max_in_flight = self.counters.max_in_flight.max(self.in_flight);
        if request.is_read() {
            *self.counters.gets_by_path.entry(request.path.clone()).or_default() += 1;
        }
        let fault = self.faults.next(request.method, &request.path, connection);
        self.counters.faults += u64::from(fault.is_some());
        if let (Some(Action::ExpireToken), Some(token)) = (&fault, request.header(TOKEN_HEADER)) {
            self.tokens.forget(token);
        }
        (fault, self.latency, self.keep_alive)
    }

    fn end(&mut self, request: &Request, delivery: &Delivery) {
        self.in_flight -= 1;
        self.counters.bytes += delivery.bytes.len() as u64 + delivery.padding;
        if let Some(status) = delivery.status.filter(|_| request.is_read()) {
            *self.counters.gets_by_status.entry(status).or_default() += 1;
        }
    }
}

/// The response of the service in good health, unless the fault has one of its own.
fn respond(shared: &Shared, request: &Request, fault: Option<&Action>) -> Response {
    if let Some(response) = fault.and_then(response_of_fault) {
        return response;
    }
    let now = Instant::now();
    let permission = {
        let mut state = shared.state();
        let permission = if state.is_disabled {
            Permission::Refused(Response::of_status(403))
        } else {
            permit(request, &state.tokens, now)
        };
        if let Permission::Token { seconds } = permission {
            let token = state.tokens.issue(Duration::from_secs(seconds), now);
            state.counters.tokens += 1;
            if fault == Some(&Action::ExpireToken) {
                state.tokens.forget(&token);
            }
            return Response::text(token).with(TTL_HEADER, seconds.to_string());
        }
        permission
    };
    match permission {
        Permission::Refused(response) => response,
        Permission::Read { seconds_left } => {
            let remembered = if fault == Some(&Action::Stale) { shared.state().remembered.clone() } else { None };
            if let Some((tree, then)) = remembered {
                return read(&tree, &request.path, then).with(TTL_HEADER, seconds_left.to_string());
            }
            let tree = shared.tree.lock().unwrap_or_else(PoisonError::into_inner);
            read(&tree, &request.path, now).with(TTL_HEADER, seconds_left.to_string())
        }
        Permission::Token { .. } => unreachable!("answered above"),
    }
}

const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";
const TTL_HEADER: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const TOKEN_PATH: &str = "/latest/api/token";

/// Some of the dated versions that the service lists; each reads as `latest` does.
const VERSIONS: [&str; 4] = ["2018-09-24", "2021-01-03", "2022-09-24", "latest"];

#[derive(Debug, PartialEq, Eq)]
enum Permission {
    Refused(Response),
    Token { seconds: u64 },
    Read { seconds_left: u64 },
}

fn permit(request: &Request, tokens: &Tokens, now: Instant) -> Permission {
    let refused = |status| Permission::Refused(Response::of_status(status));
    match request.method {
        Method::Put if request.path == TOKEN_PATH => {
            if request.header("x-forwarded-for").is_some() {
                return refused(403);
            }
            let seconds = request.header(TTL_HEADER).and_then(|text| text.parse().ok());
            seconds
                .filter(|seconds| TOKEN_SECONDS.contains(seconds))
                .map_or(refused(400), |seconds| Permission::Token { seconds })
        }
        // Only `latest` gives tokens.
        Method::Put if request.path.ends_with("/api/token") => refused(403),
        Method::Get | Method::Head if request.path != TOKEN_PATH => {
            let left = request.header(TOKEN_HEADER).and_then(|token| tokens.time_left(token, now));
            left.map_or(refused(401), |left| Permission::Read { seconds_left: left.as_secs() })
        }
        Method::Get | Method::Head => {
            Permission::Refused(Response::of_status(405).with("allow", "OPTIONS, PUT".to_string()))
        }
        Method::Put | Method::Other => {
            Permission::Refused(Response::of_status(405).with("allow", "GET, HEAD".to_string()))
        }
    }
}

fn read(tree: &Published, path: &str, now: Instant) -> Response {
    let (version, below) = match path.trim_start_matches('/').split_once('/') {
        Some((version, below)) => (version, below),
        None => (path.trim_start_matches('/'), ""),
    };
    let is_version = VERSIONS.contains(&version);
    let answer = match below.strip_prefix("meta-data") {
        _ if path == "/" => Answer::Listing(VERSIONS.map(String::from).into()),
        None if is_version && below.is_empty() => Answer::Listing(vec!["meta-data/".to_string()]),
        Some("") if is_version => tree.get("", now),
        Some(below) if is_version && below.starts_with('/') => tree.get(&below[1..], now),
        Some(_) | None => Answer::NotFound,
    };
    match answer {
        Answer::Value(text) => Response::text(text),
        Answer::Listing(entries) => Response::text(entries.join("\n")),
        Answer::NotFound => Response::of_status(404),
    }
}

/// The tokens that are valid, until when.
#[derive(Debug, Default)]
struct Tokens(HashMap<String, Instant>);

impl Tokens {
    fn issue(&mut self, life: Duration, now: Instant) -> String {
        self.0.retain(|_, until| *until > now);
        let random: String = std::iter::repeat_with(fastrand::alphanumeric).take(TOKEN_LENGTH - 8).collect();
        // As the real ones begin and end.
        let token = format!("AQAEAL{random}==");
        self.0.insert(token.clone(), now + life);
        token
    }

    fn time_left(&self, token: &str, now: Instant) -> Option<Duration> {
        self.0.get(token).and_then(|until| until.checked_duration_since(now)).filter(|left| !left.is_zero())
    }

    fn forget(&mut self, token: &str) {
        self.0.remove(token);
    }
}

#[derive(Default)]
struct FaultState {
    faults: Faults,
    random: Option<fastrand::Rng>,
    /// Of each rule, the requests that it matched.
    matched: Vec<u64>,
    requests: u64,
}

impl FaultState {
    fn new(faults: Faults) -> FaultState {
        let random = Some(fastrand::Rng::with_seed(faults.seed));
        FaultState { random, matched: vec![0; faults.rules.len()], requests: 0, faults }
    }

    /// The fault of the next request; connections count from 0. Rules behind the one that acts do not count the request.
    fn next(&mut self, method: Method, path: &str, connection: u64) -> Option<Action> {
        self.requests += 1;
        if self.faults.well_after.is_some_and(|requests| self.requests > requests) {
            return None;
        }
        for (rule, matched) in self.faults.rules.iter().zip(&mut self.matched) {
            let is_meant = rule.method.is_none_or(|meant| meant == method) && matches_path(&rule.path, path);
            if !is_meant {
                continue;
            }
            *matched += 1;
            let is_its_turn = match rule.occurrences {
                Occurrences::FirstN(count) => *matched <= count,
                Occurrences::EveryNth(n) => n > 0 && matched.is_multiple_of(n),
                Occurrences::Probability(probability) => {
                    self.random.as_mut().is_some_and(|random| random.f64() < probability)
                }
                Occurrences::OnEveryNthConnection(n) => n > 0 && (connection + 1).is_multiple_of(n),
                Occurrences::Always => true,
            };
            if is_its_turn {
                return Some(rule.action.clone());
            }
        }
        None
    }
}

fn matches_path(pattern: &str, path: &str) -> bool {
    let below = path.strip_prefix("/latest/meta-data/");
    metadata::glob(pattern, path) || below.is_some_and(|below| metadata::glob(pattern, below))
}

fn response_of_fault(fault: &Action) -> Option<Response> {
    match fault {
        Action::Status(status) => Some(Response::of_status(*status)),
        Action::NotUtf8 => Some(Response { body: vec![0xff, 0xfe, b'0', 0xc3, 0x28], ..Response::text(String::new()) }),
        Action::Body(text) => Some(Response::text(text.clone())),
        Action::HugeBody(_) => Some(Response::text(String::new())),
        Action::Redirect(place) => Some(Response::of_status(302).with("location", place.clone())),
        Action::Delay(_)
        | Action::Reset
        | Action::Close
        | Action::Truncate(_)
        | Action::Drip(_)
        | Action::Garbage
        | Action::WrongContentLength
        | Action::ExpireToken
        | Action::Hang
        | Action::Stale
        | Action::Interim
        | Action::Unannounced
        | Action::Http10
        | Action::Unmeasured => None,
    }
}

/// What goes to the client, and how.
#[derive(Debug, PartialEq, Eq)]
struct Delivery {
    status: Option<u16>,
    bytes: Vec<u8>,
    /// This many more bytes that need no memory.
    padding: u64,
    /// Before each byte.
    pause: Option<Duration>,
    ending: Ending,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    KeepAlive,
    Close,
    Reset,
    /// As `Close`, after the client has left.
    Hang,
    /// The bytes again and again, until the client has left.
    Again,
}

fn deliver(request: &Request, response: Response, fault: Option<&Action>, keep_alive: bool) -> Delivery {
    let is_head = request.method == Method::Head;
    let ending = if keep_alive { Ending::KeepAlive } else { Ending::Close };
    let nothing = Delivery { status: None, bytes: Vec::new(), padding: 0, pause: None, ending };
    let whole = |keep_alive| Delivery {
        status: Some(response.status),
        bytes: encode(&response, is_head, keep_alive),
        padding: 0,
        pause: None,
        ending,
    };
    let promising = |length: u64, response: &Response| {
        let bytes = encode_promising(length, response, is_head, keep_alive);
        Delivery { status: Some(response.status), bytes, padding: 0, pause: None, ending }
    };
    match fault {
        Some(Action::Reset) => Delivery { ending: Ending::Reset, ..nothing },
        Some(Action::Close) => Delivery { ending: Ending::Close, ..nothing },
        Some(Action::Hang) => Delivery { ending: Ending::Hang, ..nothing },
        Some(Action::Garbage) => {
            // Never an `H`: a client that looks at the first byte alone must not take it for HTTP.
            let mut bytes: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(200).collect();
            bytes[0] = 0x16;
            Delivery { bytes, ending: Ending::Close, ..nothing }
        }
        Some(Action::Truncate(length)) => {
            let promised = response.body.len() as u64;
            let body = response.body.iter().copied().take(*length).collect();
            let delivery = promising(promised, &Response { body, ..response.clone() });
            Delivery { ending: Ending::Close, ..delivery }
        }
        Some(Action::WrongContentLength) => promising(response.body.len() as u64 + 7, &response),
        Some(Action::HugeBody(length)) => {
            Delivery { padding: if is_head { 0 } else { *length }, ..promising(*length, &response) }
        }
        Some(Action::Drip(pause)) => Delivery { pause: Some(*pause), ..whole(keep_alive) },
        Some(Action::Interim) => {
            Delivery { bytes: b"HTTP/1.1 100 Continue\r\n\r\n".repeat(1000), ending: Ending::Again, ..nothing }
        }
        Some(Action::Unannounced) => Delivery { ending: Ending::Close, ..whole(true) },
        Some(Action::Unmeasured) => {
            let Response { body, .. } = &response;
            let length = format!("Content-Length: {}\r\n", body.len());
            let text = String::from_utf8_lossy(&whole(false).bytes).replacen(&length, "", 1);
            Delivery { bytes: text.into_bytes(), ending: Ending::Close, ..whole(false) }
        }
        Some(Action::Http10) => {
            let text = String::from_utf8_lossy(&whole(false).bytes).replacen("HTTP/1.1", "HTTP/1.0", 1).replacen(
                "Connection: close\r\n",
                "",
                1,
            );
            Delivery { bytes: text.into_bytes(), ending: Ending::Close, ..whole(false) }
        }
        Some(
            Action::Status(_)
            | Action::Delay(_)
            | Action::NotUtf8
            | Action::Body(_)
            | Action::Redirect(_)
            | Action::ExpireToken
            | Action::Stale,
        )
        | None => whole(keep_alive),
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Response {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Response {
    fn text(body: String) -> Response {
        let headers = vec![("content-type", "text/plain".to_string()), ("accept-ranges", "none".to_string())];
        Response { status: 200, headers, body: body.into_bytes() }
    }

    /// A status with the page that EC2 sends along.
    fn of_status(status: u16) -> Response {
        let title = format!("{status} - {}", reason(status));
        let page = format!(
            "<?xml version=\"1.0\" encoding=\"iso-8859-1\"?>\n\
             <!DOCTYPE html PUBLIC \"-//W3C//DTD XHTML 1.0 Transitional//EN\"\n\
             \t\"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd\">\n\
             <html xmlns=\"http://www.w3.org/1999/xhtml\" xml:lang=\"en\" lang=\"en\">\n \
             <head>\n  <title>{title}</title>\n </head>\n <body>\n  <h1>{title}</h1>\n </body>\n</html>\n"
        );
        // Neither may have a body.
        let body = if matches!(status, 100..=199 | 204 | 304) { Vec::new() } else { page.into_bytes() };
        Response { status, headers: vec![("content-type", "text/html".to_string())], body }
    }

    fn with(mut self, name: &'static str, value: String) -> Response {
        self.headers.push((name, value));
        self
    }
}

fn encode(response: &Response, is_head: bool, keep_alive: bool) -> Vec<u8> {
    encode_promising(response.body.len() as u64, response, is_head, keep_alive)
}

fn encode_promising(length: u64, response: &Response, is_head: bool, keep_alive: bool) -> Vec<u8> {
    let Response { status, headers, body } = response;
    let mut head = format!("HTTP/1.1 {status} {}\r\n", reason(*status));
    for (name, value) in headers {
        head += &format!("{}: {value}\r\n", capitalised(name));
    }
    let connection = if keep_alive { "keep-alive" } else { "close" };
    head += &format!("Content-Length: {length}\r\nServer: EC2ws\r\nConnection: {connection}\r\n\r\n");
    let mut bytes = head.into_bytes();
    if !is_head {
        bytes.extend_from_slice(body);
    }
    bytes
}

/// `X-Aws-Ec2-Metadata-Token-Ttl-Seconds`, as EC2 writes header names.
fn capitalised(name: &str) -> String {
    let words = name.split('-').map(|word| format!("{}{}", word[..1].to_uppercase(), &word[1..]));
    words.collect::<Vec<_>>().join("-")
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        302 => "Found",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Not Allowed",
        413 => "Content Too Large",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        _ => "Status",
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Request {
    method: Method,
    /// Without the query.
    path: String,
    /// Names in lower case.
    headers: Vec<(String, String)>,
    keep_alive: bool,
    body_length: usize,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn is_read(&self) -> bool {
        matches!(self.method, Method::Get | Method::Head)
    }
}

enum Received {
    Request(Request),
    /// The client has left, or was silent for too long.
    End,
    Refused(u16),
}

/// Reads one request; what follows it stays in the buffer.
fn read_request(connection: &TcpStream, buffer: &mut Vec<u8>) -> io::Result<Received> {
    let head_length = loop {
        match buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            Some(position) => break position + 4,
            None if buffer.len() > HEAD_LIMIT => return Ok(Received::Refused(431)),
            None if !read_more(connection, buffer)? => return Ok(Received::End),
            None => {}
        }
    };
    if head_length > HEAD_LIMIT {
        return Ok(Received::Refused(431));
    }
    let request = match parse(&buffer[..head_length]) {
        Ok(request) => request,
        Err(status) => return Ok(Received::Refused(status)),
    };
    while buffer.len() < head_length + request.body_length {
        if !read_more(connection, buffer)? {
            return Ok(Received::End);
        }
    }
    buffer.drain(..head_length + request.body_length);
    Ok(Received::Request(request))
}

fn read_more(mut connection: &TcpStream, buffer: &mut Vec<u8>) -> io::Result<bool> {
    let mut bytes = [0; 4096];
    let count = connection.read(&mut bytes)?;
    buffer.extend_from_slice(&bytes[..count]);
    Ok(count > 0)
}

/// The head of a request, or the status that refuses it.
fn parse(head: &[u8]) -> Result<Request, u16> {
    let text = std::str::from_utf8(head).map_err(|_| 400u16)?;
    let mut lines = text.trim_end_matches("\r\n").split("\r\n");
    let words: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
    let [method, target, version] = words[..] else { return Err(400) };
    let method = match method {
        "GET" => Method::Get,
        "HEAD" => Method::Head,
        "PUT" => Method::Put,
        "" => return Err(400),
        _ => Method::Other,
    };
    let headers = lines.map(parse_header).collect::<Option<Vec<_>>>().ok_or(400u16)?;
    let header = |name: &str| headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());

    let asks_to_close = header("connection").is_some_and(|value| has_token(value, "close"));
    let asks_to_keep = header("connection").is_some_and(|value| has_token(value, "keep-alive"));
    let keep_alive = match version {
        "HTTP/1.1" if header("host").is_none() => return Err(400),
        "HTTP/1.1" => !asks_to_close,
        "HTTP/1.0" => asks_to_keep,
        _ => return Err(505),
    };
    if header("transfer-encoding").is_some() {
        return Err(400);
    }
    let body_length = header("content-length").map_or(Ok(0), str::parse).map_err(|_| 400u16)?;
    if body_length > BODY_LIMIT {
        return Err(413);
    }
    let path = target.split('?').next().filter(|path| path.starts_with('/')).ok_or(400u16)?.to_string();
    Ok(Request { method, path, headers, keep_alive, body_length })
}

fn parse_header(line: &str) -> Option<(String, String)> {
    let (name, value) = line.split_once(':')?;
    let is_name = !name.is_empty() && !name.contains([' ', '\t']);
    is_name.then(|| (name.to_ascii_lowercase(), value.trim().to_string()))
}

fn has_token(value: &str, token: &str) -> bool {
    value.split(',').any(|word| word.trim().eq_ignore_ascii_case(token))
}

/// To close with unread bytes would send RST, and the client might never see the refusal.
fn refuse(mut connection: &TcpStream, refusal: &[u8]) -> io::Result<()> {
    connection.write_all(refusal)?;
    connection.shutdown(Shutdown::Write)?;
    connection.set_read_timeout(Some(Duration::from_secs(1)))?;
    io::copy(&mut connection.take(1 << 20), &mut io::sink()).map(drop)
}

/// Its bytes do not matter, only that it has gone; the end of the service counts as that.
fn wait_for_the_client_to_leave(mut connection: &TcpStream) {
    let _ = connection.set_read_timeout(None);
    let mut bytes = [0; 4096];
    while connection.read(&mut bytes).is_ok_and(|count| count > 0) {}
}

fn write_padding(mut connection: &TcpStream, mut length: u64) -> io::Result<()> {
    let block = [b'a'; 64 * 1024];
    while length > 0 {
        let count = length.min(block.len() as u64);
        connection.write_all(&block[..count as usize])?;
        length -= count;
    }
    Ok(())
}

/// With a linger time of zero, close() sends RST (socket(7)).
fn reset_on_close(connection: &TcpStream) -> io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let size = size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: the descriptor is open for as long as `connection` lives, and `linger` is of the size that is given.
    let result = unsafe {
        libc::setsockopt(connection.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), size)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_token_from_the_service_reads_a_key() {
        let lab = Lab::new();
        let mut client = lab.client();
        let response = client.send("PUT /latest/api/token", &[("X-AWS-EC2-Metadata-Token-TTL-Seconds", "60")]);
        assert_eq!((response.status, response.body.len()), (200, TOKEN_LENGTH));
        assert_eq!(response.header("X-Aws-Ec2-Metadata-Token-Ttl-Seconds"), Some("60"));

        let token = response.text();
        let response = client.send("GET /latest/meta-data/mac", &[("x-aws-ec2-METADATA-token", &token)]);
        assert_eq!((response.status, response.text().as_str()), (200, MAC));
        assert_eq!(response.header("Content-Type"), Some("text/plain"));
        assert_eq!(response.header("Server"), Some("EC2ws"));
        assert_eq!(response.header("Content-Length"), Some("17"));
    }

    #[test]
    fn reads_without_a_valid_token_are_unauthorized() {
        let lab = Lab::new();
        let mut client = lab.client();
        assert_eq!(client.send("GET /latest/meta-data/mac", &[]).status, 401);
        assert_eq!(client.send("GET /latest/meta-data/mac", &[("X-aws-ec2-metadata-token", "AQAEAL==")]).status, 401);
        assert_eq!(client.send("GET /latest/meta-data/none", &[]).status, 401);
        let token = client.token();
        lab.service.forget_tokens();
        assert_eq!(client.get("mac", &token).status, 401);
    }

    #[test]
    fn a_token_outlives_its_seconds_by_nothing() {
        let (mut tokens, start) = (Tokens::default(), Instant::now());
        let token = tokens.issue(Duration::from_secs(60), start);
        let after = |milliseconds| start + Duration::from_millis(milliseconds);
        assert_eq!(tokens.time_left(&token, after(59_000)), Some(Duration::from_secs(1)));
        assert_eq!(tokens.time_left(&token, after(60_000)), None);
        assert_eq!(tokens.time_left(&token, after(61_000)), None);
        let second = tokens.issue(Duration::from_secs(60), after(61_000));
        assert_ne!(second, token);
        assert_eq!(tokens.0.len(), 1, "expired tokens are not kept");
    }

    #[test]
    fn bad_token_requests_are_refused_as_ec2_refuses_them() {
        let lab = Lab::new();
        let mut client = lab.client();
        for ttl in ["0", "21601", "-1", "abc", "", "1.5"] {
            let status = client.send("PUT /latest/api/token", &[("X-aws-ec2-metadata-token-ttl-seconds", ttl)]).status;
            assert_eq!(status, 400, "ttl {ttl:?}");
        }
        let ttl = ("X-aws-ec2-metadata-token-ttl-seconds", "21600");
        assert_eq!(client.send("PUT /latest/api/token", &[]).status, 400);
        assert_eq!(client.send("PUT /latest/api/token", &[ttl]).status, 200);
        assert_eq!(client.send("PUT /latest/api/token", &[ttl, ("x-forwarded-for", "10.0.0.9")]).status, 403);
        assert_eq!(client.send("PUT /2021-03-23/api/token", &[ttl]).status, 403);
        assert_eq!(client.send("PUT /latest/meta-data/mac", &[ttl]).status, 405);
        assert_eq!(client.send("POST /latest/api/token", &[ttl]).status, 405);
        assert_eq!(client.send("DELETE /latest/meta-data/mac", &[]).status, 405);
        assert_eq!(client.send("GET /latest/api/token", &[ttl]).status, 405);
        assert_eq!(lab.service.requests().tokens, 1);
    }

    #[test]
    fn directories_list_with_and_without_slash_and_unknown_keys_answer_the_404_page() {
        let lab = Lab::new();
        let mut client = lab.client();
        let token = client.token();
        for path in ["network/interfaces/macs/", "network/interfaces/macs"] {
            assert_eq!(client.get(path, &token).text(), format!("{MAC}/"));
        }
        assert_eq!(client.get("", &token).text(), "mac\nnetwork/");
        let response = client.send("GET /latest/meta-data", &[("X-aws-ec2-metadata-token", &token)]);
        assert_eq!(response.text(), "mac\nnetwork/");
        let response = client.get("network/interfaces/macs/none/", &token);
        assert_eq!(response.status, 404);
        assert!(response.text().contains("<h1>404 - Not Found</h1>"), "{}", response.text());
        let response = client.send("GET /latest/meta-datamac", &[("X-aws-ec2-metadata-token", &token)]);
        assert_eq!(response.status, 404);
    }

    #[test]
    fn head_has_the_length_of_get_and_no_body() {
        let lab = Lab::new();
        let mut client = lab.client();
        let token = client.token();
        let response = client.send("HEAD /latest/meta-data/mac", &[("X-aws-ec2-metadata-token", &token)]);
        assert_eq!((response.status, response.header("Content-Length")), (200, Some("17")));
        assert!(response.body.is_empty());
        assert_eq!(client.get("mac", &token).text(), MAC);
    }

    #[test]
    fn a_connection_is_kept_unless_one_side_will_not() {
        let lab = Lab::new();
        let mut client = lab.client();
        let token = client.token();
        for _ in 0..10 {
            client.get("mac", &token);
        }
        assert_eq!(lab.service.requests().connections, 1);
        let asks_to_close = [("X-aws-ec2-metadata-token", token.as_str()), ("cOnnection", "Close")];
        let response = client.send("GET /latest/meta-data/mac", &asks_to_close);
        assert_eq!(response.header("Connection"), Some("close"));
        assert_eq!(client.rest().unwrap(), b"");

        lab.service.set_keep_alive(false);
        let mut client = lab.client();
        assert_eq!(client.get("mac", &token).header("Connection"), Some("close"));
        assert_eq!(client.rest().unwrap(), b"");
    }

    #[test]
    fn requests_in_one_packet_are_answered_in_order() {
        let lab = Lab::new();
        let mut client = lab.client();
        let token = client.token();
        let one =
            |path: &str| format!("GET /latest/meta-data/{path} HTTP/1.1\r\nhost: x\r\n{TOKEN_HEADER}: {token}\r\n\r\n");
        client.write(format!("{}{}", one("mac"), one("none")).as_bytes());
        assert_eq!(client.read(false).unwrap().status, 200);
        assert_eq!(client.read(false).unwrap().status, 404);
    }

    #[test]
    fn what_is_not_a_request_is_refused_with_a_reason() {
        let lab = Lab::new();
        let long = format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "a".repeat(20_000));
        let cases = [
            ("GET /\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\n\r\n", 400),
            ("GET mac HTTP/1.1\r\nHost: x\r\n\r\n", 400),
            ("GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
            ("GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n", 413),
            ("PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            (&long, 431),
        ];
        for (request, status) in cases {
            let mut client = lab.client();
            client.write(request.as_bytes());
            assert_eq!(client.read(false).unwrap().status, status, "{:.60}", request);
            assert_eq!(client.rest().unwrap(), b"");
        }
    }

    #[test]
    fn a_disabled_service_forbids_everything() {
        let lab = Lab::new();
        let mut client = lab.client();
        let token = client.token();
        lab.service.set_disabled(true);
        assert_eq!(client.send("PUT /latest/api/token", &[(TTL_HEADER, "60")]).status, 403);
        assert_eq!(client.get("mac", &token).status, 403);
        assert_eq!(client.send("GET /latest/meta-data/mac", &[]).status, 403);
        lab.service.set_disabled(false);
        assert_eq!(client.get("mac", &token).status, 200);
    }

    #[test]
    fn counters_say_what_was_asked_and_forget_on_reset() {
        let lab = Lab::new();
        let (mut client, mut second) = (lab.client(), lab.client());
        let token = client.token();
        second.get("mac", &token);
        client.get("none", &token);
        client.send("GET /latest/meta-data/mac?x=1", &[]);
        let counters = lab.service.requests();
        assert_eq!(counters.tokens, 1);
        assert_eq!(counters.gets_by_status, BTreeMap::from([(200, 1), (401, 1), (404, 1)]));
        assert_eq!(counters.gets_by_path["/latest/meta-data/mac"], 2);
        assert_eq!((counters.connections, counters.max_concurrent, counters.max_in_flight), (2, 2, 1));
        assert_eq!(counters.bytes, client.received + second.received);

        lab.service.reset_counters();
        assert_eq!(lab.service.requests(), Counters { max_concurrent: 2, ..Counters::default() });
    }

    #[test]
    fn waiting_requests_are_counted_as_in_flight() {
        let lab = Lab::new();
        lab.service.set_latency(Duration::from_secs(60));
        let mut clients = [lab.client(), lab.client(), lab.client()];
        for client in &mut clients {
            client.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while lab.service.requests().max_in_flight < 3 {
            assert!(Instant::now() < deadline, "{:?}", lab.service.requests());
            std::thread::yield_now();
        }
    }

    #[test]
    fn latency_holds_every_answer_back() {
        let lab = Lab::new();
        lab.service.set_latency(Duration::from_millis(50));
        let (mut client, start) = (lab.client(), Instant::now());
        client.token();
        assert!(start.elapsed() >= Duration::from_millis(50));
    }

    #[test]
    fn a_dropped_service_refuses_connections_and_leaves_no_client_waiting() {
        // An address of its own: no port of another test, and no connection to itself, can be mistaken for the service.
        let listener = TcpListener::bind((Ipv4Addr::new(127, 53, 0, 1), 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let lab = Lab { service: Service::start(vec![listener], tree()), address };
        let (mut idle, mut hanging, mut delayed) = (lab.client(), lab.client(), lab.client());
        let token = idle.token();
        lab.service.set_faults(Faults {
            rules: vec![
                Rule::new("hang", Occurrences::Always, Action::Hang),
                Rule::new("delay", Occurrences::Always, Action::Delay(Duration::from_secs(3600))),
            ],
            ..Faults::default()
        });
        hanging.write_get("hang", &token);
        delayed.write_get("delay", &token);
        let deadline = Instant::now() + Duration::from_secs(10);
        while lab.service.requests().max_in_flight < 2 {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        let start = Instant::now();
        drop(lab);
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        for client in [&mut idle, &mut hanging, &mut delayed] {
            assert!(client.read(false).is_err());
        }
        assert_eq!(TcpStream::connect(address).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        TcpListener::bind(address).expect("the port is free again");
    }

    #[test]
    fn an_occurrence_is_counted_per_rule_over_what_it_matches() {
        let turns = |occurrences| {
            let rules = vec![Rule::new("*/mac", occurrences, Action::Close).only(Method::Get)];
            let mut state = FaultState::new(Faults { seed: 7, rules, well_after: Some(9) });
            assert_eq!(state.next(Method::Put, "/latest/meta-data/mac", 0), None);
            assert_eq!(state.next(Method::Get, "/latest/api/token", 0), None);
            let of_turn = |_| if state.next(Method::Get, "/latest/meta-data/mac", 0).is_some() { 'x' } else { '.' };
            (0..8).map(of_turn).collect::<String>()
        };
        assert_eq!(turns(Occurrences::FirstN(2)), "xx......");
        assert_eq!(turns(Occurrences::EveryNth(3)), "..x..x..");
        assert_eq!(turns(Occurrences::Always), "xxxxxxx.", "all is well after nine requests");
        assert_eq!(turns(Occurrences::Probability(0.0)), "........");
        assert_eq!(turns(Occurrences::Probability(1.0)), "xxxxxxx.");
        assert_eq!(turns(Occurrences::Probability(0.5)), turns(Occurrences::Probability(0.5)));
    }

    #[test]
    fn every_second_connection_can_be_another_service() {
        let lab = Lab::new();
        lab.service.remember();
        let by_now = BTreeMap::from([("mac".to_string(), "06:00:00:00:00:02".to_string())]);
        *lab.service.shared.tree.lock().unwrap() = Published::raw(by_now, BTreeMap::new());
        let rule = Rule::new("*", Occurrences::OnEveryNthConnection(2), Action::Stale);
        lab.service.set_faults(Faults { rules: vec![rule], ..Faults::default() });
        let mut clients = [lab.client(), lab.client()];
        let token = clients[0].token();
        let of_each = |_| clients.each_mut().map(|client| client.get("mac", &token).text());
        let read: Vec<[String; 2]> = (0..2).map(of_each).collect();
        assert_eq!(read, vec![["06:00:00:00:00:02", MAC].map(String::from); 2]);
        // A token is no tree's: the second connection takes the first one's.
        assert_eq!(lab.service.requests().tokens, 1);
    }

    #[test]
    fn the_first_rule_whose_turn_it_is_acts() {
        let rules = vec![
            Rule::new("mac", Occurrences::FirstN(1), Action::Close),
            Rule::new("/latest/meta-data/*", Occurrences::FirstN(1), Action::Reset),
        ];
        let mut state = FaultState::new(Faults { rules, ..Faults::default() });
        let mut next = || state.next(Method::Get, "/latest/meta-data/mac", 0);
        assert_eq!([next(), next(), next()], [Some(Action::Close), Some(Action::Reset), None]);
    }

    #[test]
    fn each_fault_looks_on_the_wire_as_it_says() {
        let answer = |action| Lab::new().get_with_fault(action);
        assert_eq!(answer(Action::Status(503)).unwrap().status, 503);
        assert_eq!(answer(Action::Status(429)).unwrap().status, 429);
        assert_eq!(answer(Action::Body("0\n".to_string())).unwrap().text(), "0\n");
        assert!(String::from_utf8(answer(Action::NotUtf8).unwrap().body).is_err());
        assert_eq!(answer(Action::Drip(Duration::from_micros(1))).unwrap().text(), MAC);
        assert_eq!(answer(Action::HugeBody(3_000_000)).unwrap().body.len(), 3_000_000);
        assert_eq!(answer(Action::ExpireToken).unwrap().status, 401);
        let redirect = answer(Action::Redirect("http://127.0.0.1:1/".to_string())).unwrap();
        assert_eq!((redirect.status, redirect.header("Location")), (302, Some("http://127.0.0.1:1/")));

        assert_eq!(answer(Action::Reset).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(answer(Action::Close).unwrap_err().to_string(), "0 bytes of a head");
        assert_eq!(answer(Action::Truncate(3)).unwrap_err().to_string(), "3 of 17 bytes of a body");
        assert_eq!(answer(Action::Garbage).unwrap_err().to_string(), "200 bytes of a head");
        assert_eq!(answer(Action::WrongContentLength).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(answer(Action::Hang).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(answer(Action::Interim).unwrap().status, 100);
        assert_eq!(answer(Action::Unannounced).unwrap().text(), MAC);
        assert_eq!(answer(Action::Http10).unwrap().text(), MAC);
        assert_eq!(answer(Action::Unmeasured).unwrap_err().to_string(), "no length");
    }

    #[test]
    fn an_expired_token_stays_expired_and_another_reads_again() {
        let lab = Lab::new();
        let mut client = lab.client();
        let token = client.token();
        lab.service.set_faults(once("mac", Action::ExpireToken));
        assert_eq!(client.get("mac", &token).status, 401);
        assert_eq!(client.get("mac", &token).status, 401);
        let token = client.token();
        assert_eq!(client.get("mac", &token).status, 200);

        lab.service.set_faults(once("/latest/api/token", Action::ExpireToken));
        let stillborn = client.token();
        assert_eq!(client.get("mac", &stillborn).status, 401);
    }

    #[test]
    fn random_faults_follow_from_the_seed_and_end() {
        assert_eq!(Faults::random(1), Faults::random(1));
        let different: BTreeSet<String> = (0..100).map(|seed| format!("{:?}", Faults::random(seed))).collect();
        assert_eq!(different.len(), 100);
        for seed in 0..100 {
            let faults = Faults::random(seed);
            let well_after = faults.well_after.unwrap();
            let mut state = FaultState::new(faults);
            (0..well_after).for_each(|_| drop(state.next(Method::Get, "/latest/meta-data/mac", 0)));
            assert!((0..100).all(|_| state.next(Method::Get, "/latest/meta-data/mac", 0).is_none()), "seed {seed}");
        }
    }

    #[test]
    fn a_client_that_tries_again_gets_through_random_faults() {
        let lab = Lab::new();
        for seed in 0..20 {
            lab.service.set_faults(Faults::random(seed));
            let right_answers = (0..130).filter(|_| lab.try_mac().is_some_and(|mac| mac == MAC)).count();
            assert!(right_answers >= 10, "seed {seed}: {right_answers}");
        }
    }

    #[test]
    fn several_listeners_serve_one_tree() {
        let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let listeners = vec![bind(), bind()];
        let addresses: Vec<SocketAddr> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
        let service = Service::start(listeners, tree());
        let token = Client::connect(addresses[0]).token();
        assert_eq!(Client::connect(addresses[1]).get("mac", &token).text(), MAC);
        assert_eq!(service.requests().connections, 2);
    }

    #[test]
    fn a_test_that_holds_the_tree_can_still_use_the_service() {
        let lab = Lab::new();
        let tree = lab.service.shared.tree.clone();
        let mut client = lab.client();
        let token = client.token();
        let held = tree.lock().unwrap();
        client.write_get("mac", &token);
        let deadline = Instant::now() + Duration::from_secs(10);
        while lab.service.requests().gets_by_path.is_empty() {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        lab.service.reset_counters();
        drop(held);
        assert_eq!(client.read(false).unwrap().status, 200);
    }

    const MAC: &str = "06:00:00:00:00:01";

    struct Lab {
        service: Service,
        address: SocketAddr,
    }

    impl Lab {
        fn new() -> Lab {
            let (service, address) = serve_on_loopback(tree()).unwrap();
            Lab { service, address }
        }

        fn client(&self) -> Client {
            Client::connect(self.address)
        }

        fn get_with_fault(&self, action: Action) -> io::Result<Answered> {
            let mut client = self.client();
            let token = client.token();
            if matches!(action, Action::Hang | Action::WrongContentLength) {
                client.connection.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            }
            self.service.set_faults(once("mac", action));
            client.write_get("mac", &token);
            client.read(false)
        }

        /// A fresh token and connection for each read; impatient, so that a fault costs little.
        fn try_mac(&self) -> Option<String> {
            let mut client = self.client();
            client.connection.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            client.try_write(format!("PUT {TOKEN_PATH} HTTP/1.1\r\nHost: x\r\n{TTL_HEADER}: 60\r\n\r\n").as_bytes())?;
            let token = client.read(false).ok().filter(|answered| answered.status == 200)?;
            let token = String::from_utf8(token.body).ok().filter(|token| token.len() == TOKEN_LENGTH)?;
            client.try_write(request("GET /latest/meta-data/mac", &[(TOKEN_HEADER, &token)]).as_bytes())?;
            let answered = client.read(false).ok().filter(|answered| answered.status == 200)?;
            String::from_utf8(answered.body).ok()
        }
    }

    fn tree() -> Arc<Mutex<Published>> {
        let leaves = [("mac", MAC), ("network/interfaces/macs/06:00:00:00:00:01/device-number", "0")];
        let leaves = leaves.map(|(path, value)| (path.to_string(), value.to_string()));
        Arc::new(Mutex::new(Published::raw(leaves.into(), BTreeMap::new())))
    }

    fn once(path: &str, action: Action) -> Faults {
        Faults { rules: vec![Rule::new(path, Occurrences::FirstN(1), action)], ..Faults::default() }
    }

    fn request(line: &str, headers: &[(&str, &str)]) -> String {
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        format!("{line} HTTP/1.1\r\nHost: 169.254.169.254\r\n{headers}\r\n")
    }

    /// Reads bytes as they come and believes nothing but `Content-Length`.
    struct Client {
        connection: TcpStream,
        buffer: Vec<u8>,
        received: u64,
    }

    #[derive(Debug)]
    struct Answered {
        status: u16,
        headers: Vec<(String, String)>,
        body: Vec<u8>,
    }

    impl Answered {
        fn header(&self, name: &str) -> Option<&str> {
            self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
        }

        fn text(&self) -> String {
            String::from_utf8(self.body.clone()).unwrap()
        }
    }

    impl Client {
        fn connect(address: SocketAddr) -> Client {
            let connection = TcpStream::connect(address).unwrap();
            connection.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            Client { connection, buffer: Vec::new(), received: 0 }
        }

        fn token(&mut self) -> String {
            self.send("PUT /latest/api/token", &[(TTL_HEADER, "21600")]).text()
        }

        fn get(&mut self, path: &str, token: &str) -> Answered {
            self.write_get(path, token);
            self.read(false).unwrap()
        }

        fn write_get(&mut self, path: &str, token: &str) {
            self.write(request(&format!("GET /latest/meta-data/{path}"), &[(TOKEN_HEADER, token)]).as_bytes());
        }

        fn send(&mut self, line: &str, headers: &[(&str, &str)]) -> Answered {
            self.write(request(line, headers).as_bytes());
            self.read(line.starts_with("HEAD")).unwrap()
        }

        fn write(&mut self, bytes: &[u8]) {
            self.connection.write_all(bytes).unwrap();
        }

        fn try_write(&mut self, bytes: &[u8]) -> Option<()> {
            self.connection.write_all(bytes).ok()
        }

        fn rest(&mut self) -> io::Result<Vec<u8>> {
            let mut bytes = std::mem::take(&mut self.buffer);
            self.connection.read_to_end(&mut bytes)?;
            Ok(bytes)
        }

        fn read(&mut self, is_head: bool) -> io::Result<Answered> {
            let cut = |what: String| io::Error::new(io::ErrorKind::UnexpectedEof, what);
            let end = loop {
                match self.buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                    Some(position) => break position,
                    None if self.more()? == 0 => return Err(cut(format!("{} bytes of a head", self.buffer.len()))),
                    None => {}
                }
            };
            let head = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
            self.buffer.drain(..end + 4);
            let (status_line, headers) = head.split_once("\r\n").unwrap_or((&head, ""));
            let status = status_line.split(' ').nth(1).unwrap().parse().unwrap();
            let split =
                |line: &str| line.split_once(": ").map(|(name, value)| (name.to_string(), value.to_string())).unwrap();
            let headers = headers.split_terminator("\r\n").map(split).collect();
            let mut answered = Answered { status, headers, body: Vec::new() };
            let is_interim = answered.status < 200;
            let length = if is_interim { Some("0") } else { answered.header("Content-Length") };
            let length: usize = length.ok_or_else(|| cut("no length".into()))?.parse().unwrap();
            while !is_head && self.buffer.len() < length {
                if self.more()? == 0 {
                    return Err(cut(format!("{} of {length} bytes of a body", self.buffer.len())));
                }
            }
            answered.body = self.buffer.drain(..if is_head { 0 } else { length }).collect();
            Ok(answered)
        }

        fn more(&mut self) -> io::Result<usize> {
            let mut bytes = [0; 64 * 1024];
            let count = self.connection.read(&mut bytes)?;
            self.buffer.extend_from_slice(&bytes[..count]);
            self.received += count as u64;
            Ok(count)
        }
    }
}
