//! Applying, by eniup's own code and as bare messages.
#![allow(dead_code)] // Each benchmark uses its own part.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use eniup::netlink::Netlink;
use eniup::netlink::apply::Outcome;
use eniup::plan::Plan;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};
use vpc_lab::interposer;

use super::lab::block_on;

#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    pub wall: Duration,
    pub cpu: Duration,
}

impl Cpu {
    /// Of what this thread does.
    pub fn of(work: impl FnOnce() -> Result<()>) -> Result<Cpu> {
        let (started, before) = (Instant::now(), thread_time()?);
        work()?;
        Ok(Cpu { wall: started.elapsed(), cpu: thread_time()?.saturating_sub(before) })
    }

    /// Of children, whose CPU time the work adds up.
    pub fn of_children(work: impl FnOnce() -> Result<Duration>) -> Result<Cpu> {
        let started = Instant::now();
        let cpu = work()?;
        Ok(Cpu { wall: started.elapsed(), cpu })
    }
}

pub fn thread_time() -> io::Result<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes to a structure that lives as long as the call takes.
    match unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) } {
        0 => Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// As eniup does it, the plan being made.
pub fn apply(plan: &Plan) -> Result<Cpu> {
    Cpu::of(|| {
        let outcomes = block_on(async { Netlink::open()?.apply(&plan.steps).await })?;
        let undone = plan.steps.iter().zip(outcomes).find(|(_, outcome)| !matches!(outcome, Outcome::Done));
        undone.map_or(Ok(()), |(step, outcome)| bail!("{step}: {outcome:?}"))
    })
}

/// The same messages, ready made, in the same batches.
pub fn replay(datagrams: &[Vec<u8>]) -> Result<Cpu> {
    Cpu::of(|| {
        let socket = socket()?;
        let mut answer = Vec::with_capacity(64 * 1024);
        for datagram in datagrams {
            let mut left = interposer::messages(&mut datagram.clone()).len();
            ensure!(socket.send(datagram, 0)? == datagram.len(), "a datagram was cut");
            while left > 0 {
                answer.clear();
                socket.recv(&mut answer, 0)?;
                for message in interposer::messages(&mut answer) {
                    ensure!(is_acknowledgement(message.0), "a change was refused");
                    left -= 1;
                }
            }
        }
        Ok(())
    })
}

/// A conversation with the kernel whose acknowledgements hold no copy of the request.
pub fn socket() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.set_cap_ack(true)?;
    Ok(socket)
}

/// `NLMSG_ERROR` with errno 0.
fn is_acknowledgement(message: &[u8]) -> bool {
    message[4..6] == 2u16.to_ne_bytes() && message[16..20] == [0; 4]
}
