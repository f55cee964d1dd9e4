//! The only place that speaks to the metadata service: token, one GET, a snapshot of what is needed. Faults are typed;
//! what the answers mean is for `metadata`.

use std::fmt;
use std::time::Duration;

use futures::StreamExt;
use reqwest::header::HeaderValue;
use reqwest::{Client, Method, StatusCode, Url, redirect};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::metadata::{ASSOCIATIONS, Answer, DETAIL_KEYS, INTERFACES, PRIMARY_MAC, ROUTING_KEYS, Tree};
use crate::metadata::{eni_directory, lines, listed_macs};

/// The service's addresses: IPv4 on every instance, IPv6 on Nitro where it is enabled (the one that works in an
/// IPv6-only subnet).
pub const ENDPOINTS: [&str; 2] = ["http://169.254.169.254", "http://[fd00:ec2::254]"];

/// Seconds that a token lives: longer than any run.
const TOKEN_LIFETIME: &str = "300";

/// One answer is waited for this long; the service is on the same host and answers within milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Between attempts, doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A single key is asked for this often; then it is unknown, and its ENI waits.
const KEY_ATTEMPTS: u32 = 4;

/// Requests in flight, and so connections. An ENI may send 1,024 packets a second to all link-local services together.
const IN_FLIGHT: usize = 8;

/// Bytes of one body. The longest real one, a list of 80 interfaces, has 1,440.
const LONGEST_BODY: usize = 64 * 1024;

/// Why no snapshot could be had. Each is its own message, since each has its own remedy.
#[derive(Debug)]
pub enum Error {
    /// `AWS_EC2_METADATA_DISABLED=true`.
    Disabled,
    /// The given endpoint is no URL that can be used.
    BadEndpoint { endpoint: String, why: String },
    /// 403: metadata is turned off for this instance, or not allowed here.
    Forbidden { endpoint: String },
    /// 401 also with a new token.
    Unauthorized { endpoint: String },
    /// The answers are not the metadata service's.
    NotMetadata { endpoint: String, what: String },
    /// No usable answer before the deadline; the last thing that went wrong.
    NoAnswer { endpoints: String, last: String, waited: Duration },
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
            Error::NoAnswer { endpoints, last, waited } => write!(
                f,
                "no answer from instance metadata at {endpoints} within {:.1} s ({last}); nothing was changed. Is this \
                 an EC2 instance, is IMDSv2 enabled, and is the hop limit large enough if this runs in a container?",
                waited.as_secs_f64()
            ),
        }
    }
}

impl std::error::Error for Error {}

/// How much of the tree is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// What routing needs.
    Routing,
    /// What `status` shows besides.
    Details,
}

/// A session with the service: one token, few connections.
pub struct Imds {
    client: Client,
    endpoint: Url,
    token: HeaderValue,
    deadline: Instant,
}

/// What one attempt came to.
enum Attempt {
    Body(String),
    NotFound,
    Unauthorized,
    Forbidden,
    /// It may be different a moment later.
    Passing(String),
    /// Asking again would not help.
    Useless(String),
}

impl Imds {
    /// Finds an endpoint that answers and gets a token from it. `endpoint` overrides the two well-known ones.
    ///
    /// # Errors
    /// As [`Error`] says; by `deadline` at the latest.
    pub async fn connect(endpoint: Option<&str>, deadline: Instant) -> Result<Imds, Error> {
        if std::env::var("AWS_EC2_METADATA_DISABLED").is_ok_and(|value| value.eq_ignore_ascii_case("true")) {
            return Err(Error::Disabled);
        }
        let endpoints = match endpoint {
            Some(endpoint) => vec![parse_endpoint(endpoint)?],
            None => ENDPOINTS.iter().map(|endpoint| parse_endpoint(endpoint)).collect::<Result<_, _>>()?,
        };
        let client = Client::builder()
            // reqwest honours http_proxy without being asked, and metadata must never go there.
            .no_proxy()
            .redirect(redirect::Policy::none())
            .timeout(ANSWER_TIMEOUT)
            .tcp_nodelay(true)
            .build()
            .map_err(|error| Error::BadEndpoint { endpoint: shown(&endpoints), why: describe(&error) })?;
        let started = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            let mut last = String::new();
            for endpoint in &endpoints {
                match token(&client, endpoint, deadline).await? {
                    Ok(token) => return Ok(Imds { client, endpoint: endpoint.clone(), token, deadline }),
                    Err(why) if last.is_empty() || last == why => last = why,
                    Err(why) => last = format!("{last}; {why}"),
                }
            }
            if Instant::now() + pause >= deadline {
                let waited = started.elapsed();
                return Err(Error::NoAnswer { endpoints: shown(&endpoints), last, waited });
            }
            if pause == FIRST_PAUSE {
                tracing::info!("waiting for instance metadata at {} ({last})", shown(&endpoints));
            }
            sleep_until(Instant::now() + with_jitter(pause)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// The interface subtree of this moment. A key that cannot be read is unknown in it.
    ///
    /// # Errors
    /// The list of interfaces or the primary's MAC cannot be read: without them nothing can be concluded.
    pub async fn snapshot(&mut self, scope: Scope) -> Result<Tree, Error> {
        let started = Instant::now();
        let mut tree = Tree::default();
        for (path, answer) in self.get_all(&[PRIMARY_MAC.into(), INTERFACES.into()], u32::MAX).await? {
            if let Answer::Unknown(why) = &answer {
                return Err(Error::NoAnswer {
                    endpoints: shown(std::slice::from_ref(&self.endpoint)),
                    last: format!("{path}: {why}"),
                    waited: started.elapsed(),
                });
            }
            tree.insert(path, answer);
        }
        let Answer::Present(listing) = tree.get(INTERFACES) else { return Ok(tree) };
        let (macs, _) = listed_macs(&listing);
        let directories: Vec<String> = macs.into_iter().map(eni_directory).collect();
        self.read(&mut tree, &directories).await?;
        let is_wanted = |key: &str| {
            let is_detail = DETAIL_KEYS.contains(&key) || key == ASSOCIATIONS;
            ROUTING_KEYS.contains(&key) || scope == Scope::Details && is_detail
        };
        let keys = listed_below(&tree, &directories, is_wanted);
        self.read(&mut tree, &keys).await?;
        let associations: Vec<String> = keys.into_iter().filter(|path| path.ends_with(ASSOCIATIONS)).collect();
        let publics = listed_below(&tree, &associations, |_| true);
        self.read(&mut tree, &publics).await?;
        Ok(tree)
    }

    async fn read(&mut self, tree: &mut Tree, paths: &[String]) -> Result<(), Error> {
        for (path, answer) in self.get_all(paths, KEY_ATTEMPTS).await? {
            tree.insert(path, answer);
        }
        Ok(())
    }

    /// Reads these paths, a few at a time. A token that is refused is renewed once.
    async fn get_all(&mut self, paths: &[String], attempts: u32) -> Result<Vec<(String, Answer)>, Error> {
        let mut answers = Vec::with_capacity(paths.len());
        let mut refused = Vec::new();
        for (path, attempt) in self.try_all(paths, attempts).await {
            match attempt {
                Attempt::Unauthorized => refused.push(path),
                attempt => answers.push((path, self.answer(attempt)?)),
            }
        }
        if !refused.is_empty() {
            self.renew_token().await?;
            for (path, attempt) in self.try_all(&refused, attempts).await {
                answers.push((path, self.answer(attempt)?));
            }
        }
        Ok(answers)
    }

    async fn try_all(&self, paths: &[String], attempts: u32) -> Vec<(String, Attempt)> {
        let gets = paths.iter().map(|path| async move { (path.clone(), self.get(path, attempts).await) });
        futures::stream::iter(gets).buffered(IN_FLIGHT).collect().await
    }

    fn answer(&self, attempt: Attempt) -> Result<Answer, Error> {
        let endpoint = || shown(std::slice::from_ref(&self.endpoint));
        match attempt {
            Attempt::Body(body) => Ok(Answer::Present(body)),
            Attempt::NotFound => Ok(Answer::Absent),
            Attempt::Passing(why) | Attempt::Useless(why) => Ok(Answer::Unknown(why)),
            Attempt::Unauthorized => Err(Error::Unauthorized { endpoint: endpoint() }),
            Attempt::Forbidden => Err(Error::Forbidden { endpoint: endpoint() }),
        }
    }

    async fn renew_token(&mut self) -> Result<(), Error> {
        let started = Instant::now();
        self.token = token(&self.client, &self.endpoint, self.deadline).await?.map_err(|last| Error::NoAnswer {
            endpoints: shown(std::slice::from_ref(&self.endpoint)),
            last,
            waited: started.elapsed(),
        })?;
        Ok(())
    }

    /// One path, asked for again while that may help.
    async fn get(&self, path: &str, attempts: u32) -> Attempt {
        let mut pause = FIRST_PAUSE;
        let mut made = 0;
        loop {
            let url = format!("{}latest/meta-data/{path}", self.endpoint);
            let request = self.client.request(Method::GET, url).header("X-aws-ec2-metadata-token", self.token.clone());
            let attempt = send(request, self.deadline).await;
            made += 1;
            let is_last = made >= attempts || Instant::now() + pause >= self.deadline;
            if !matches!(attempt, Attempt::Passing(_)) || is_last {
                return attempt;
            }
            sleep_until(Instant::now() + with_jitter(pause)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// A new token, or why there is none at this moment.
async fn token(client: &Client, endpoint: &Url, deadline: Instant) -> Result<Result<HeaderValue, String>, Error> {
    let request = client
        .request(Method::PUT, format!("{endpoint}latest/api/token"))
        .header("X-aws-ec2-metadata-token-ttl-seconds", TOKEN_LIFETIME);
    let shown = shown(std::slice::from_ref(endpoint));
    match send(request, deadline).await {
        Attempt::Body(body) => match HeaderValue::from_str(body.trim()) {
            Ok(mut token) if !token.is_empty() => {
                // Never in a log or an error message.
                token.set_sensitive(true);
                Ok(Ok(token))
            }
            _ => Err(Error::NotMetadata { endpoint: shown, what: "its token is no header value".into() }),
        },
        Attempt::Forbidden => Err(Error::Forbidden { endpoint: shown }),
        Attempt::Unauthorized => Err(Error::Unauthorized { endpoint: shown }),
        Attempt::NotFound => {
            Err(Error::NotMetadata { endpoint: shown, what: "it has no /latest/api/token (404)".into() })
        }
        Attempt::Passing(why) => Ok(Err(why)),
        Attempt::Useless(what) => Err(Error::NotMetadata { endpoint: shown, what }),
    }
}

/// One request, one answer, all of it before the deadline.
async fn send(request: reqwest::RequestBuilder, deadline: Instant) -> Attempt {
    match timeout_at(deadline, receive(request)).await {
        Ok(attempt) => attempt,
        Err(_) => Attempt::Passing("the deadline passed before an answer came".into()),
    }
}

async fn receive(request: reqwest::RequestBuilder) -> Attempt {
    let mut response = match request.send().await {
        Ok(response) => response,
        Err(error) => return Attempt::Passing(describe(&error)),
    };
    match response.status() {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND => return Attempt::NotFound,
        StatusCode::UNAUTHORIZED => return Attempt::Unauthorized,
        StatusCode::FORBIDDEN => return Attempt::Forbidden,
        StatusCode::TOO_MANY_REQUESTS => return Attempt::Passing("429, too many requests".into()),
        status if status.is_server_error() => return Attempt::Passing(status.to_string()),
        status => return Attempt::Useless(format!("status {status}")),
    }
    let mut body = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) if body.len() + chunk.len() > LONGEST_BODY => {
                return Attempt::Useless(format!("the answer is longer than {LONGEST_BODY} bytes"));
            }
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Ok(None) => break,
            Err(error) => return Attempt::Passing(describe(&error)),
        }
    }
    match String::from_utf8(body) {
        Ok(body) => Attempt::Body(body),
        Err(error) => Attempt::Useless(format!("the answer is not UTF-8 (byte {})", error.utf8_error().valid_up_to())),
    }
}

/// The wanted entries of these directories, as far as their listings are known.
fn listed_below(tree: &Tree, directories: &[String], is_wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let mut paths = Vec::new();
    for directory in directories {
        if let Answer::Present(listing) = tree.get(directory) {
            let names = lines(&listing).filter(|name| is_wanted(name));
            paths.extend(names.map(|name| format!("{directory}{name}")));
        }
    }
    paths
}

fn parse_endpoint(endpoint: &str) -> Result<Url, Error> {
    let bad = |why: String| Error::BadEndpoint { endpoint: endpoint.into(), why };
    let mut url = Url::parse(endpoint).map_err(|error| bad(error.to_string()))?;
    if url.scheme() != "http" {
        return Err(bad("it has to begin with http://".into()));
    }
    if url.host().is_none() || url.query().is_some() || url.fragment().is_some() {
        return Err(bad("it has to be a host with an optional port".into()));
    }
    if !url.path().ends_with('/') {
        url.set_path(&format!("{}/", url.path()));
    }
    Ok(url)
}

fn shown(endpoints: &[Url]) -> String {
    let shown: Vec<&str> = endpoints.iter().map(|endpoint| endpoint.as_str().trim_end_matches('/')).collect();
    shown.join(" and ")
}

/// An error with its causes, without the URL: the paths are ours to name.
fn describe(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "timed out".into();
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Between half and the whole of the pause, so that many hosts (and runs) do not ask in step.
fn with_jitter(pause: Duration) -> Duration {
    let nanos = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.subsec_nanos());
    pause / 2 + pause / 2 * (nanos % 1024) / 1024
}
