//! How fast the service is asked. EC2 lets an ENI send 1,024 packets a second to all link-local services together (this
//! one, DNS, time) and drops the rest silently, so what is sent here leaves the others their part.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Packets sent to the service in any second, at most. 600 is the promise; the difference is for the handshakes of the
/// kept connections and for the token.
const PACKETS: u32 = 530;

/// Sent for one request on a connection that is kept: the request, and an acknowledgement of the answer when no other
/// request carries it.
const KEPT: u32 = 2;

/// Sent for one request on a connection of its own: SYN, ACK, request, ACK, FIN, and one to spare.
const CLOSED: u32 = 6;

/// How long a packet counts, from the end of its request.
const WINDOW: Duration = Duration::from_secs(1);

/// The packets of the last second, as far as they can be foreseen.
#[derive(Default)]
pub struct Pace {
    /// When a request ended, and the packets that it cost; in order of time.
    recent: RefCell<VecDeque<(Instant, u32)>>,
    under_way: Cell<u32>,
    is_closing: Cell<bool>,
}

/// The right to make one request.
pub struct Turn<'a> {
    pace: &'a Pace,
    packets: u32,
}

impl Pace {
    /// Whether the service ends the connection after an answer, as EC2's does (`Connection: close`).
    pub fn note(&self, is_closing: bool) {
        self.is_closing.set(is_closing);
    }

    /// Waits until one more request is within the limit.
    pub async fn turn(&self) -> Turn<'_> {
        let packets = if self.is_closing.get() { CLOSED } else { KEPT };
        while let Some(until) = self.full_until(packets) {
            sleep_until(until).await;
        }
        self.under_way.set(self.under_way.get() + packets);
        Turn { pace: self, packets }
    }

    /// When to look again, if there is no room at this moment.
    fn full_until(&self, packets: u32) -> Option<Instant> {
        let now = Instant::now();
        let mut recent = self.recent.borrow_mut();
        while recent.front().is_some_and(|(end, _)| *end + WINDOW <= now) {
            recent.pop_front();
        }
        let spent: u32 = recent.iter().map(|(_, packets)| packets).sum();
        let is_full = self.under_way.get() + spent + packets > PACKETS;
        recent.front().filter(|_| is_full).map(|(end, _)| *end + WINDOW)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.pace.under_way.set(self.pace.under_way.get() - self.packets);
        self.pace.recent.borrow_mut().push_back((Instant::now(), self.packets));
    }
}
