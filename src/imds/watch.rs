//! Whether the service is still reached by the way that led there before.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::Error;
use super::http::{self, Attempt};
use super::pace::Pace;
use super::way::{self, Surroundings, Way};

/// How long each way is tried: the service has just answered, and by the same way it does so within milliseconds. After a
/// hiccup both are tried for longer.
const TIMES: [Duration; 3] = [Duration::from_millis(500), Duration::from_secs(1), Duration::from_secs(2)];

/// Of the time that is left a try takes no more than one such part: the run itself needs some, too.
const PARTS: u32 = 4;

/// A way to the service that is looked at again and again.
pub struct Watch {
    way: Way,
    pace: Pace,
}

impl Watch {
    /// The way by this link if it leads to the service, else the plain one; none if neither does.
    ///
    /// # Errors
    /// As of [`Imds::connect`](super::Imds::connect), but for an answer that does not come.
    pub async fn find(
        endpoint: Option<&str>,
        surroundings: &Surroundings,
        link: &str,
        deadline: Instant,
    ) -> Result<Option<Watch>, Error> {
        let endpoints = way::endpoints(endpoint, surroundings)?;
        for (time, link) in TIMES.into_iter().flat_map(|time| [(time, Some(link)), (time, None)]) {
            let (ways, pace) = (way::ways(&endpoints, link), Pace::default());
            let left = deadline.saturating_duration_since(Instant::now());
            let until = Instant::now() + time.min(left / PARTS);
            if let Ok(Ok((way, _))) = way::race(&ways, &pace, until).await {
                return Ok(Some(Watch { way, pace }));
            }
        }
        Ok(None)
    }

    /// Looks until nothing has come back this often in a row, and says why. An answer of whatever sort is one: that the
    /// service is in trouble is not the network's fault.
    pub async fn lost(&self, pause: Duration, failures: u32) -> String {
        let mut failed = 0;
        loop {
            let next = Instant::now() + pause;
            let attempt = http::token(&self.way.0, &self.pace, next + pause).await;
            match attempt {
                Attempt::NoWay { .. } | Attempt::Prohibited => failed += 1,
                Attempt::Body(_)
                | Attempt::NotFound
                | Attempt::Unauthorized
                | Attempt::Forbidden
                | Attempt::Passing { .. }
                | Attempt::Useless(_) => failed = 0,
            }
            if failed >= failures {
                return format!("metadata is not reached any more at {}: {}", self.way.shown(), attempt.shown());
            }
            sleep_until(next).await;
        }
    }
}
