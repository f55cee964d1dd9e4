//! One request and its answer, typed: no proxy, no redirect, nothing without bounds. The token stays in here.

use std::io;
use std::time::Duration;

use reqwest::header::{CONNECTION, HeaderValue};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode, Url, Version, redirect};
use tokio::task::yield_now;
use tokio::time::{Instant, timeout_at};

use super::pace::Pace;
use crate::metadata::Fault;
use crate::tally::{self, Event};

/// One answer is waited for this long; the service is on the same host and answers within milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Seconds that a token lives: longer than most runs, and renewed in the others.
const TOKEN_LIFETIME: &str = "300";

/// Bytes of one body. The longest real one, the list of 64 IPv6 addresses, has 2,560.
const LONGEST_BODY: usize = 64 * 1024;

/// Lines of one body. The longest real list has 80 (ENIs).
const MOST_LINES: usize = 1024;

/// What one attempt came to.
#[derive(Debug)]
pub enum Attempt<T> {
    Body(T),
    NotFound,
    Unauthorized,
    Forbidden,
    /// No connection, or no answer on it.
    NoWay {
        fault: Fault,
        why: String,
    },
    /// `connect` was refused by the routing table: EACCES, what a `prohibit` route or rule gives.
    Prohibited,
    /// It may be different a moment later.
    Passing {
        fault: Fault,
        why: String,
    },
    /// Asking again would not help.
    Useless(String),
}

impl<T> Attempt<T> {
    /// What that is called when nothing better comes of it.
    pub fn fault(&self) -> Fault {
        match self {
            Attempt::NoWay { fault, .. } | Attempt::Passing { fault, .. } => *fault,
            Attempt::Prohibited => Fault::Locked,
            Attempt::Forbidden => Fault::Forbidden,
            Attempt::Unauthorized => Fault::Unauthorized,
            Attempt::NotFound | Attempt::Useless(_) => Fault::NotMetadata,
            Attempt::Body(_) => Fault::NoAnswer,
        }
    }

    /// Why there is no body.
    pub fn shown(&self) -> String {
        match self {
            Attempt::Body(_) => "answered".into(),
            Attempt::NotFound => "not found (404)".into(),
            Attempt::Unauthorized => "the token is refused (401)".into(),
            Attempt::Forbidden => "refused (403)".into(),
            Attempt::Prohibited => "prohibited by the routing table".into(),
            Attempt::NoWay { why, .. } | Attempt::Passing { why, .. } | Attempt::Useless(why) => why.clone(),
        }
    }
}

/// A client whose connections leave by this link, or as the routing table says.
pub fn client(link: Option<&str>) -> reqwest::Result<Client> {
    let builder = Client::builder()
        // reqwest honours http_proxy without being asked, and metadata must never go there.
        .no_proxy()
        .redirect(redirect::Policy::none())
        .timeout(ANSWER_TIMEOUT)
        .tcp_nodelay(true);
    match link {
        // SO_BINDTODEVICE; needs no privilege on a socket that is not bound yet (Linux 5.7).
        Some(link) => builder.interface(link).build(),
        None => builder.build(),
    }
}

/// A new token.
pub async fn token(client: &Client, endpoint: &Url, pace: &Pace, deadline: Instant) -> Attempt<HeaderValue> {
    let request = client
        .request(Method::PUT, format!("{endpoint}latest/api/token"))
        .header("X-aws-ec2-metadata-token-ttl-seconds", TOKEN_LIFETIME);
    let body = match send(request, pace, deadline).await {
        Attempt::Body(body) => body,
        Attempt::NotFound => return Attempt::Useless("it has no /latest/api/token (404)".into()),
        Attempt::Unauthorized => return Attempt::Unauthorized,
        Attempt::Forbidden => return Attempt::Forbidden,
        Attempt::NoWay { fault, why } => return Attempt::NoWay { fault, why },
        Attempt::Prohibited => return Attempt::Prohibited,
        Attempt::Passing { fault, why } => return Attempt::Passing { fault, why },
        Attempt::Useless(why) => return Attempt::Useless(why),
    };
    match HeaderValue::from_str(body.trim()) {
        Ok(mut token) if !token.is_empty() => {
            // Never in a log or an error message.
            token.set_sensitive(true);
            Attempt::Body(token)
        }
        _ => not_metadata("its token is no header value".into()),
    }
}

/// One key or listing, by its path below `/latest/meta-data/`.
pub async fn get(
    client: &Client,
    endpoint: &Url,
    token: &HeaderValue,
    path: &str,
    pace: &Pace,
    deadline: Instant,
) -> Attempt<String> {
    let url = format!("{endpoint}latest/meta-data/{path}");
    let request = client.request(Method::GET, url).header("X-aws-ec2-metadata-token", token.clone());
    let is_repeated = |body: &str| token.to_str().is_ok_and(|token| body.contains(token));
    match send(request, pace, deadline).await {
        // It would be shown, saved and logged.
        Attempt::Body(body) if is_repeated(&body) => Attempt::Useless("it repeats the session's token".into()),
        attempt => attempt,
    }
}

/// One request, one answer, all of it before the deadline.
async fn send(request: RequestBuilder, pace: &Pace, deadline: Instant) -> Attempt<String> {
    let exchange = async {
        let _turn = pace.turn().await;
        // The connection of the answer that has just been read gets a moment to become idle, or another would be opened.
        yield_now().await;
        receive(request, pace).await
    };
    match timeout_at(deadline, exchange).await {
        Ok(attempt) => attempt,
        Err(_) => Attempt::NoWay { fault: Fault::NoAnswer, why: "the deadline passed before an answer came".into() },
    }
}

async fn receive(request: RequestBuilder, pace: &Pace) -> Attempt<String> {
    let sent = request.send().await;
    tally::count(Event::Request(sent.as_ref().ok().map(|response| response.status().as_u16())));
    let response = match sent {
        Ok(response) => response,
        Err(error) => return failure(&error),
    };
    let connection = response.headers().get(CONNECTION).map(|value| value.as_bytes());
    let is_closing = match response.version() {
        Version::HTTP_10 => !connection.is_some_and(|value| value.eq_ignore_ascii_case(b"keep-alive")),
        _ => connection.is_some_and(|value| value.eq_ignore_ascii_case(b"close")),
    };
    pace.note(is_closing);
    match response.status() {
        StatusCode::OK => body(response).await,
        StatusCode::NOT_FOUND => Attempt::NotFound,
        StatusCode::UNAUTHORIZED => Attempt::Unauthorized,
        StatusCode::FORBIDDEN => Attempt::Forbidden,
        StatusCode::TOO_MANY_REQUESTS => {
            Attempt::Passing { fault: Fault::Overloaded, why: "429, too many requests".into() }
        }
        status if status.is_server_error() => Attempt::Passing { fault: Fault::Overloaded, why: status.to_string() },
        status => Attempt::Useless(format!("status {status}")),
    }
}

/// A body that can be metadata's. One that cannot is asked for again: who answered with it may be gone a moment later.
async fn body(mut response: Response) -> Attempt<String> {
    let mut body = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) if body.len() + chunk.len() > LONGEST_BODY => {
                return not_metadata(format!("the answer is longer than {LONGEST_BODY} bytes"));
            }
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Ok(None) => break,
            Err(error) => return Attempt::Passing { fault: Fault::NoAnswer, why: describe(&error) },
        }
    }
    let body = match String::from_utf8(body) {
        Ok(body) => body,
        Err(error) => {
            return not_metadata(format!("the answer is not UTF-8 (byte {})", error.utf8_error().valid_up_to()));
        }
    };
    if body.lines().nth(MOST_LINES).is_some() {
        return not_metadata(format!("the answer has more than {MOST_LINES} lines"));
    }
    // No value may hold it, security groups' names included: it is the page of a proxy or portal.
    if body.contains('<') {
        return not_metadata("the answer is a page, not metadata".into());
    }
    Attempt::Body(body)
}

fn failure<T>(error: &reqwest::Error) -> Attempt<T> {
    let errno = causes(error).find_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error());
    let why = describe(error);
    let fault = match errno {
        Some(libc::EACCES) => return Attempt::Prohibited,
        Some(libc::ECONNREFUSED) => Fault::Refused,
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => Fault::Unreachable,
        _ => Fault::NoAnswer,
    };
    match error.is_connect() || error.is_timeout() {
        true => Attempt::NoWay { fault, why },
        false => Attempt::Passing { fault, why },
    }
}

/// Who answers so may be gone a moment later.
fn not_metadata<T>(why: String) -> Attempt<T> {
    Attempt::Passing { fault: Fault::NotMetadata, why }
}

/// An error's innermost cause, without the URL: the paths are ours to name.
fn describe(error: &reqwest::Error) -> String {
    match causes(error).last() {
        _ if error.is_timeout() => "timed out".into(),
        Some(cause) => cause.to_string(),
        None => error.to_string(),
    }
}

fn causes<'a>(error: &'a reqwest::Error) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    let first: &'a (dyn std::error::Error + 'static) = error;
    std::iter::successors(Some(first), |cause| cause.source())
}
