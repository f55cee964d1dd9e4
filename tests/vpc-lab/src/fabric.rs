//! The VPC's fabric: one thread that reads the frames of all ports, lets `forward` decide, and delivers or counts.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result};

use crate::forward::{Reason, Verdict, forward};
use crate::kernel;
use crate::vpc::{Port, World};
use crate::wire;

/// The longest frame: Ethernet's header and the longest IP packet.
const LONGEST: usize = wire::ETHERNET + 65_535;
/// Frames of one port before the others have their turn.
const TURN: usize = 64;
/// Dropped packets that are remembered word for word.
const REMEMBERED: usize = 64;

/// The fabric's end of what connects it with a guest's link, where whole frames are read and written.
pub trait End: AsFd + Send + Sync {
    /// The next frame's length, or `WouldBlock`.
    fn read(&self, frame: &mut [u8]) -> io::Result<usize>;

    fn write(&self, frame: &[u8]) -> io::Result<()>;
}

/// What the VPC dropped, by the port at which the packet came in.
pub type Drops = BTreeMap<(Port, Reason), u64>;

pub struct Fabric {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    epoll: OwnedFd,
    /// Readable when the thread has to end.
    stop: OwnedFd,
}

#[derive(Default)]
struct State {
    world: World,
    ports: BTreeMap<Port, Plug>,
    by_number: BTreeMap<u64, Port>,
    next_number: u64,
    drops: Drops,
    delivered: u64,
    last_drops: VecDeque<String>,
    losses: BTreeMap<Port, Loss>,
}

/// What is lost of all that comes from a port and goes to it.
struct Loss {
    /// 0 to 1.
    share: f64,
    random: fastrand::Rng,
    lost: u64,
}

#[derive(Clone)]
struct Plug {
    number: u64,
    end: Arc<dyn End>,
}

/// The event of the stop descriptor; ports begin above it.
const STOP: u64 = 0;

impl Fabric {
    pub fn start() -> Result<Fabric> {
        // The fabric's ends of the cables have nothing to say of their own.
        kernel::sysctl("ipv6/conf/default/disable_ipv6", "1")?;
        // SAFETY: both calls give new descriptors, checked below.
        let (epoll, stop) = unsafe { (libc::epoll_create1(libc::EPOLL_CLOEXEC), libc::eventfd(0, libc::EFD_CLOEXEC)) };
        if epoll == -1 || stop == -1 {
            return Err(io::Error::last_os_error()).context("starting the fabric");
        }
        // SAFETY: they were opened here and belong to nobody else.
        let (epoll, stop) = unsafe { (OwnedFd::from_raw_fd(epoll), OwnedFd::from_raw_fd(stop)) };
        let shared = Arc::new(Shared { state: Mutex::default(), epoll, stop });
        shared.watch(shared.stop.as_raw_fd(), STOP)?;
        let thread = std::thread::spawn({
            let shared = shared.clone();
            move || shared.run()
        });
        Ok(Fabric { shared, thread: Some(thread) })
    }

    /// Reads or changes EC2's truth between two frames.
    pub fn world<T>(&self, act: impl FnOnce(&mut World) -> T) -> T {
        act(&mut self.shared.state().world)
    }

    /// Connects a port by its cable or card.
    pub fn plug(&self, port: Port, end: impl End + 'static) -> Result<()> {
        let mut state = self.shared.state();
        state.next_number += 1;
        let number = state.next_number;
        self.shared.watch(end.as_fd().as_raw_fd(), number)?;
        state.by_number.insert(number, port.clone());
        state.ports.insert(port, Plug { number, end: Arc::new(end) });
        Ok(())
    }

    /// Takes a port away; its link is gone with it.
    pub fn unplug(&self, port: &Port) {
        let mut state = self.shared.state();
        if let Some(plug) = state.ports.remove(port) {
            state.by_number.remove(&plug.number);
        }
    }

    /// Carries all that waits at the ports, so that what was sent is judged by the truth of this moment and no later one.
    pub fn drain(&self) {
        let mut state = self.shared.state();
        let mut frame = vec![0; LONGEST];
        for (port, Plug { number: _, end }) in state.ports.clone() {
            while let Ok(length) = end.read(&mut frame) {
                state.handle(&port, &*end, &frame[..length]);
            }
        }
    }

    /// Hands a guest a frame that nobody sent: what the VPC itself says without being asked.
    ///
    /// # Errors
    /// The port is not plugged, or its link is down.
    pub fn inject(&self, port: &Port, frame: &[u8]) -> Result<()> {
        let state = self.shared.state();
        let plug = state.ports.get(port).with_context(|| format!("{port:?} is not plugged"))?;
        plug.end.write(frame).with_context(|| format!("handing {port:?} a frame"))
    }

    /// Loses this share (0 to 1) of the frames that come from a port and go to it, from here on; which of them follows from
    /// the seed.
    pub fn set_loss(&self, port: Port, share: f64, seed: u64) {
        let loss = Loss { share, random: fastrand::Rng::with_seed(seed), lost: 0 };
        self.shared.state().losses.insert(port, loss);
    }

    /// Frames of a port that were lost since [`Self::set_loss`].
    pub fn lost(&self, port: &Port) -> u64 {
        self.shared.state().losses.get(port).map_or(0, |loss| loss.lost)
    }

    pub fn end_loss(&self, port: &Port) {
        self.shared.state().losses.remove(port);
    }

    pub fn drops(&self) -> Drops {
        self.shared.state().drops.clone()
    }

    /// Packets dropped by the source check, of all ENIs.
    pub fn source_drops(&self) -> u64 {
        self.dropped_for(&[Reason::WrongEni, Reason::OthersAddress, Reason::SourceAddress])
    }

    /// Of those, the ones that are not of another instance: an instance that forwards sends on what it gets.
    pub fn own_source_drops(&self) -> u64 {
        self.dropped_for(&[Reason::WrongEni, Reason::SourceAddress])
    }

    fn dropped_for(&self, reasons: &[Reason]) -> u64 {
        let state = self.shared.state();
        state.drops.iter().filter(|((_, reason), _)| reasons.contains(reason)).map(|(_, count)| count).sum()
    }

    /// The last dropped packets, each with its reason.
    pub fn last_drops(&self) -> Vec<String> {
        self.shared.state().last_drops.iter().cloned().collect()
    }

    pub fn delivered(&self) -> u64 {
        self.shared.state().delivered
    }

    pub fn forget_drops(&self) {
        let mut state = self.shared.state();
        state.drops.clear();
        state.last_drops.clear();
    }
}

impl Drop for Fabric {
    fn drop(&mut self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes to an open eventfd, which always takes them.
        unsafe { libc::write(self.shared.stop.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed; there is nothing to add to it here.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self, fd: i32, number: u64) -> Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: number };
        // SAFETY: both descriptors are open and the event lives as long as the call.
        match unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) } {
            -1 => Err(io::Error::last_os_error()).context("watching a port"),
            _ => Ok(()),
        }
    }

    fn run(&self) {
        let mut frame = vec![0; LONGEST];
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
        loop {
            // SAFETY: the array has room for as many events as are asked for.
            let count =
                unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), events.len() as i32, -1) };
            if count == -1 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return;
            }
            for event in events.iter().take(usize::try_from(count).unwrap_or(0)) {
                if event.u64 == STOP {
                    return;
                }
                self.take_turn(event.u64, &mut frame);
            }
        }
    }

    fn take_turn(&self, number: u64, frame: &mut [u8]) {
        for _ in 0..TURN {
            let mut state = self.state();
            let Some(port) = state.by_number.get(&number).cloned() else { return };
            let Some(end) = state.ports.get(&port).map(|plug| plug.end.clone()) else { return };
            // Not ready, or the link is gone: either way there is nothing to read.
            let Ok(length) = end.read(frame) else { return };
            state.handle(&port, &*end, &frame[..length]);
        }
    }
}

impl State {
    fn handle(&mut self, port: &Port, end: &dyn End, frame: &[u8]) {
        let dropped = match forward(&self.world, port, frame) {
            Verdict::Ignore => None,
            Verdict::Drop(reason) => Some(reason),
            Verdict::Reply(reply) => put(end, &reply),
            Verdict::Deliver { to, .. } if self.is_lost(port) || self.is_lost(&to) => Some(Reason::Loss),
            Verdict::Deliver { to, frame } => match self.ports.get(&to) {
                Some(plug) => put(&*plug.end, &frame),
                None => Some(Reason::NotAttached),
            },
        };
        match dropped {
            Some(reason) => {
                *self.drops.entry((port.clone(), reason)).or_default() += 1;
                if self.last_drops.len() == REMEMBERED {
                    self.last_drops.pop_front();
                }
                self.last_drops.push_back(format!("{reason}: {} from {port:?}", wire::describe(frame)));
            }
            None => self.delivered += 1,
        }
    }

    fn is_lost(&mut self, port: &Port) -> bool {
        let Some(loss) = self.losses.get_mut(port) else { return false };
        let is_lost = loss.random.f64() < loss.share;
        loss.lost += u64::from(is_lost);
        is_lost
    }
}

/// Hands a frame to a guest. A link that is down takes none.
fn put(end: &dyn End, frame: &[u8]) -> Option<Reason> {
    end.write(frame).err().map(|_| Reason::LinkDown)
}
