//! What a program's run costs, as the kernel counts it.

use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

#[derive(Clone, Copy, Debug)]
pub struct Cost {
    pub wall: Duration,
    /// Of the program and of the children it has waited for, in user and kernel mode.
    pub cpu: Duration,
    /// KiB, at most resident.
    pub peak: u64,
}

impl Cost {
    /// Runs the program to its end, its output thrown away. It is stopped as it begins and as it ends, which takes some 50 us.
    ///
    /// # Errors
    /// It cannot be started, or fails.
    pub fn of(command: &mut Command) -> Result<Cost> {
        let name = command.get_program().to_string_lossy().into_owned();
        // SAFETY: a system call on nothing.
        unsafe { command.pre_exec(|| check(libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0)).map(drop)) };
        let started = Instant::now();
        let child = command.stdout(Stdio::null()).spawn().with_context(|| format!("starting {name}"))?;
        let (status, usage, peak) = follow(child.id() as libc::pid_t).with_context(|| format!("following {name}"))?;
        let wall = started.elapsed();
        ensure!(status.success(), "{command:?}: {status}");
        Ok(Cost { wall, cpu: cpu(&usage), peak })
    }
}

/// Wall and CPU time of a program that nothing stops, its output thrown away.
///
/// # Errors
/// It cannot be started, or fails.
pub fn times(command: &mut Command) -> Result<(Duration, Duration)> {
    let name = command.get_program().to_string_lossy().into_owned();
    let started = Instant::now();
    let child = command.stdout(Stdio::null()).spawn().with_context(|| format!("starting {name}"))?;
    let (status, usage) = wait(child.id() as libc::pid_t).with_context(|| format!("waiting for {name}"))?;
    let wall = started.elapsed();
    let status = ExitStatus::from_raw(status);
    ensure!(status.success(), "{command:?}: {status}");
    Ok((wall, cpu(&usage)))
}

fn cpu(usage: &libc::rusage) -> Duration {
    let time = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Lets a child that is traced go its way, and gives what it used. Its peak is read when it is about to end: `ru_maxrss` begins
/// with what its parent had at most, as the kernel keeps that mark across exec.
fn follow(child: libc::pid_t) -> Result<(ExitStatus, libc::rusage, u64)> {
    let mut peak = None;
    loop {
        let (status, usage) = wait(child)?;
        if !libc::WIFSTOPPED(status) {
            return Ok((ExitStatus::from_raw(status), usage, peak.context("it has ended unseen")?));
        }
        // SAFETY: system calls on a child that is stopped.
        match (status >> 8, libc::WSTOPSIG(status)) {
            (EXITS, _) => {
                peak = Some(high_water_mark(child)?);
                check(unsafe { libc::ptrace(libc::PTRACE_DETACH, child, 0, 0) })?;
            }
            (_, libc::SIGTRAP) => {
                check(unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, child, 0, libc::PTRACE_O_TRACEEXIT) })?;
                check(unsafe { libc::ptrace(libc::PTRACE_CONT, child, 0, 0) })?;
            }
            (_, signal) => drop(check(unsafe { libc::ptrace(libc::PTRACE_CONT, child, 0, signal) })?),
        }
    }
}

/// How a child stops that is about to end.
const EXITS: libc::c_int = libc::SIGTRAP | libc::PTRACE_EVENT_EXIT << 8;

/// KiB.
fn high_water_mark(process: libc::pid_t) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Waits until a child stops or ends, and gives what it has used.
fn wait(process: libc::pid_t) -> io::Result<(libc::c_int, libc::rusage)> {
    let mut status = 0;
    // SAFETY: all zeros is a valid rusage.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers live as long as the call, and the child is this process's own.
    check(unsafe { libc::wait4(process, &mut status, 0, &mut usage) }.into())?;
    Ok((status, usage))
}

fn check(result: i64) -> io::Result<i64> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
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
