//! One request and its answer, typed: no proxy, no redirect, nothing without bounds. The token stays in here.

use std::error::Error;
use std::io;
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, HOST, HeaderValue, TRANSFER_ENCODING};
use hyper::{Method, Request, Response, StatusCode};
use tokio::time::{Instant, timeout_at};

use super::connections::{Connections, Failure, Question};
use super::pace::{Pace, Turn};
use crate::metadata::{Fault, INSTANCE_TAGS};
use crate::tally::{self, Event};

/// One answer is waited for this long; the service is on the same host and answers within milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Seconds that a token lives: longer than most runs, and renewed in the others.
const TOKEN_LIFETIME: &str = "300";

/// Bytes of a token, which goes out with every request. Real ones have 56.
const LONGEST_TOKEN: usize = 512;

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

/// A new token.
pub async fn token(connections: &Connections, pace: &Pace, deadline: Instant) -> Attempt<HeaderValue> {
    let lifetime = HeaderValue::from_static(TOKEN_LIFETIME);
    let header = ("X-aws-ec2-metadata-token-ttl-seconds", lifetime);
    let body = match exchange(connections, Method::PUT, "latest/api/token", header, pace, deadline).await {
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
        Ok(token) if token.len() > LONGEST_TOKEN => {
            not_metadata(format!("its token is longer than {LONGEST_TOKEN} bytes"))
        }
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
    connections: &Connections,
    token: &HeaderValue,
    path: &str,
    pace: &Pace,
    deadline: Instant,
) -> Attempt<String> {
    let is_repeated = |body: &str| token.to_str().is_ok_and(|token| body.contains(token));
    let header = ("X-aws-ec2-metadata-token", token.clone());
    match exchange(connections, Method::GET, &format!("latest/meta-data/{path}"), header, pace, deadline).await {
        // It would be shown, saved and logged.
        Attempt::Body(body) if is_repeated(&body) => Attempt::Useless("it repeats the session's token".into()),
        // No value may hold it but a tag's, security groups' names included: it is the page of a proxy or portal.
        Attempt::Body(body) if body.contains('<') && !path.starts_with(INSTANCE_TAGS) => {
            not_metadata("the answer is a page, not metadata".into())
        }
        attempt => attempt,
    }
}

/// One request, one answer, all of it before the deadline.
async fn exchange(
    connections: &Connections,
    method: Method,
    path: &str,
    (name, value): (&'static str, HeaderValue),
    pace: &Pace,
    deadline: Instant,
) -> Attempt<String> {
    let endpoint = &connections.endpoint;
    let question = Request::builder()
        .method(method)
        .uri(endpoint.path_to(path))
        .header(HOST, endpoint.authority())
        .header(name, value)
        .body(Empty::new());
    let question = match question {
        Ok(question) => question,
        Err(error) => return Attempt::Useless(format!("it cannot be asked for `{}`: {error}", path.escape_debug())),
    };
    let paced = async {
        let mut turn = pace.turn().await;
        let until = deadline.min(Instant::now() + ANSWER_TIMEOUT);
        answer(connections, question, &mut turn, until).await
    };
    match timeout_at(deadline, paced).await {
        Ok(attempt) => attempt,
        Err(_) => Attempt::NoWay { fault: Fault::NoAnswer, why: "the deadline passed before an answer came".into() },
    }
}

async fn answer(connections: &Connections, question: Question, turn: &mut Turn<'_>, until: Instant) -> Attempt<String> {
    let asked = timeout_at(until, connections.ask(question, turn)).await;
    let status = asked.as_ref().ok().and_then(|asked| Some(asked.as_ref().ok()?.0.status()));
    tally::count(Event::Request(status.map(|status| status.as_u16())));
    let (response, connection) = match asked {
        Ok(Ok(answered)) => answered,
        Ok(Err(failure)) => return failed(&failure),
        Err(_) => return Attempt::NoWay { fault: Fault::NoAnswer, why: "timed out".into() },
    };
    let attempt = match response.status() {
        // It ends with the connection, so nobody can tell whether that was its end.
        StatusCode::OK if !has_length(&response) => not_metadata("its answer does not say how long it is".into()),
        StatusCode::OK => timeout_at(until, body(response.into_body()))
            .await
            .unwrap_or_else(|_| Attempt::Passing { fault: Fault::NoAnswer, why: "timed out".into() }),
        StatusCode::NOT_FOUND => Attempt::NotFound,
        StatusCode::UNAUTHORIZED => Attempt::Unauthorized,
        StatusCode::FORBIDDEN => Attempt::Forbidden,
        StatusCode::TOO_MANY_REQUESTS => {
            Attempt::Passing { fault: Fault::Overloaded, why: "429, too many requests".into() }
        }
        status if status.is_server_error() => Attempt::Passing { fault: Fault::Overloaded, why: status.to_string() },
        status => Attempt::Useless(format!("status {status}")),
    };
    // One whose answer was not read to its end is found to be closed when it is needed.
    connections.keep(connection);
    attempt
}

fn has_length(response: &Response<Incoming>) -> bool {
    [CONTENT_LENGTH, TRANSFER_ENCODING].iter().any(|name| response.headers().contains_key(name))
}

/// A body that can be metadata's. One that cannot is asked for again: who answered with it may be gone a moment later.
async fn body(mut incoming: Incoming) -> Attempt<String> {
    let mut body = Vec::new();
    while let Some(frame) = incoming.frame().await {
        match frame.map(|frame| frame.into_data()) {
            Ok(Ok(data)) if body.len() + data.len() > LONGEST_BODY => {
                return not_metadata(format!("the answer is longer than {LONGEST_BODY} bytes"));
            }
            Ok(Ok(data)) => body.extend_from_slice(&data),
            Ok(Err(_trailers)) => {}
            Err(error) => return Attempt::Passing { fault: Fault::NoAnswer, why: innermost(&error) },
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
    Attempt::Body(body)
}

fn failed<T>(failure: &Failure) -> Attempt<T> {
    let errno = causes(failure).find_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error());
    let why = innermost(failure);
    let fault = match errno {
        Some(libc::EACCES) => return Attempt::Prohibited,
        Some(libc::ECONNREFUSED) => Fault::Refused,
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => Fault::Unreachable,
        _ => Fault::NoAnswer,
    };
    match failure {
        Failure::Connecting(_) => Attempt::NoWay { fault, why },
        Failure::Asking(_) => Attempt::Passing { fault, why },
    }
}

/// Who answers so may be gone a moment later.
fn not_metadata<T>(why: String) -> Attempt<T> {
    Attempt::Passing { fault: Fault::NotMetadata, why }
}

fn innermost(error: &(dyn Error + 'static)) -> String {
    causes(error).last().map(|cause| cause.to_string()).unwrap_or_default()
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let first: &'a (dyn Error + 'static) = error;
    std::iter::successors(Some(first), |cause| (*cause).source())
}
