//! How fast the service is asked. EC2 lets an ENI send 1,024 packets a second to all link-local services together (this
//! one, DNS, time) and drops the rest silently, so what is sent here leaves the others their part.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Packets that are paid for in any second, at most. 600 may be sent; the difference is for acknowledgements of answers that no
/// other request takes along. The peak is in `tests/imds.rs` and `tests/bench/metadata.rs`.
const PACKETS: u32 = 500;

/// A request on a connection that is there: the acknowledgement of the answer goes with the next one.
const REQUEST: u32 = 1;

/// A connection: SYN, ACK, and at its end ACK and FIN.
const CONNECTION: u32 = 4;

/// How long a packet counts, from the end of its request.
const WINDOW: Duration = Duration::from_secs(1);

/// The packets of the last second.
#[derive(Default)]
pub struct Pace {
    /// When a request ended, and the packets that it cost; in order of time.
    recent: RefCell<VecDeque<(Instant, u32)>>,
    under_way: Cell<u32>,
}

/// The right to send what it has paid for.
pub struct Turn<'a> {
    pace: &'a Pace,
    packets: u32,
}

impl Pace {
    /// Waits until one more request is within the limit.
    pub async fn turn(&self) -> Turn<'_> {
        let mut turn = Turn { pace: self, packets: 0 };
        turn.pay_for_request().await;
        turn
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

impl Turn<'_> {
    pub async fn pay_for_request(&mut self) {
        self.pay(REQUEST).await;
    }

    pub async fn pay_for_connection(&mut self) {
        self.pay(CONNECTION).await;
    }

    async fn pay(&mut self, packets: u32) {
        while let Some(until) = self.pace.full_until(packets) {
            sleep_until(until).await;
        }
        self.pace.under_way.set(self.pace.under_way.get() + packets);
        self.packets += packets;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.pace.under_way.set(self.pace.under_way.get() - self.packets);
        self.pace.recent.borrow_mut().push_back((Instant::now(), self.packets));
    }
}
