//! What a program's run costs, as the kernel counts it.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

#[derive(Clone, Copy, Debug)]
pub struct Cost {
    pub wall: Duration,
    /// Of the program and of the children it has waited for, in user and kernel mode.
    pub cpu: Duration,
    /// KiB, at most resident.
    pub peak: i64,
}

impl Cost {
    /// Runs the program to its end, its output thrown away.
    ///
    /// # Errors
    /// It cannot be started, or fails.
    pub fn of(command: &mut Command) -> Result<Cost> {
        let name = command.get_program().to_string_lossy().into_owned();
        let started = Instant::now();
        let child = command.stdout(Stdio::null()).spawn().with_context(|| format!("starting {name}"))?;
        let (status, usage) = wait(child.id())?;
        let wall = started.elapsed();
        ensure!(status.success(), "{command:?}: {status}");
        let time = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
        Ok(Cost { wall, cpu: time(usage.ru_utime) + time(usage.ru_stime), peak: usage.ru_maxrss })
    }
}

/// Waits for a child and gives what it used.
fn wait(process: u32) -> Result<(ExitStatus, libc::rusage)> {
    let mut status = 0;
    // SAFETY: all zeros is a valid rusage.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers live as long as the call, and the child is this process's own.
    match unsafe { libc::wait4(process as libc::pid_t, &mut status, 0, &mut usage) } {
        -1 => Err(std::io::Error::last_os_error()).context("waiting for a child"),
        _ => Ok((ExitStatus::from_raw(status), usage)),
    }
}

/// Times of the same work.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    pub least: Duration,
    pub median: Duration,
    pub most: Duration,
}

impl Spread {
    /// # Panics
    /// Of nothing.
    pub fn of(times: impl IntoIterator<Item = Duration>) -> Spread {
        let mut times: Vec<Duration> = times.into_iter().collect();
        times.sort();
        Spread { least: times[0], median: times[times.len() / 2], most: times[times.len() - 1] }
    }
}

pub fn milliseconds(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64() * 1000.0)
}
