//! Where labs live: a child process in namespaces of its own, so that nothing is left behind however it ends, nothing of
//! the machine is touched, and many run side by side. As root plain namespaces, else a user namespace around them.

use std::ffi::CString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Tells the child that it is one.
const INSIDE: &str = "VPC_LAB_INSIDE";

/// Whether this process is inside a sandbox.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Lets the command run in new namespaces: network, mounts with an empty `/run`, processes, and as an ordinary user also a
/// user namespace in which it is root. It ends with the thread that starts it, and everything that it has started ends
/// with it.
pub fn prepare(command: &mut Command) {
    // SAFETY: geteuid and getegid always succeed.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    let is_root = uid == 0;
    // Made here, since a child between fork and exec must not allocate.
    let uid_map = format!("0 {uid} 1\n").into_bytes();
    let gid_map = format!("0 {gid} 1\n").into_bytes();
    let path = |path: &str| CString::new(path).unwrap_or_default();
    let (setgroups, uid_path, gid_path) =
        (path("/proc/self/setgroups"), path("/proc/self/uid_map"), path("/proc/self/gid_map"));
    let (root, run, tmpfs, proc_directory, proc) =
        (path("/"), path("/run"), path("tmpfs"), path("/proc"), path("proc"));
    command.env(INSIDE, "1");
    // SAFETY: only system calls on memory that was made before the fork.
    unsafe {
        command.pre_exec(move || {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            raise_file_limit()?;
            let user = if is_root { 0 } else { libc::CLONE_NEWUSER };
            check(libc::unshare(user | libc::CLONE_NEWNET | libc::CLONE_NEWNS | libc::CLONE_NEWPID))?;
            if !is_root {
                write(&setgroups, b"deny")?;
                write(&uid_path, &uid_map)?;
                write(&gid_path, &gid_map)?;
            }
            let none = std::ptr::null();
            check(libc::mount(none, root.as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none.cast()))?;
            check(libc::mount(tmpfs.as_ptr(), run.as_ptr(), tmpfs.as_ptr(), 0, none.cast()))?;
            enter_process_namespace()?;
            // Refused where a container hides parts of the machine's own; then processes have the numbers of outside there.
            libc::mount(proc.as_ptr(), proc_directory.as_ptr(), proc.as_ptr(), 0, none.cast());
            Ok(())
        });
    }
}

/// Goes on in a grandchild. Between the two stands the first process of the new namespace, which only waits: when it ends, the
/// kernel ends all others in it. This process stays outside and ends as the grandchild does.
///
/// # Safety
/// Only between fork and exec.
unsafe fn enter_process_namespace() -> io::Result<()> {
    // SAFETY: system calls alone; each process but the last ends in here.
    unsafe {
        for _ in 0..2 {
            let child = libc::fork();
            check(child)?;
            if child > 0 {
                wait_and_end_like(child);
            }
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        }
        Ok(())
    }
}

/// # Safety
/// Ends the process.
unsafe fn wait_and_end_like(child: libc::pid_t) -> ! {
    // SAFETY: system calls alone.
    unsafe {
        // Whoever started this waits until nobody holds the pipe by which a failed exec would be told.
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0);
        let mut status = 0;
        // The first process of a namespace inherits those whose parents have ended; they are of no interest.
        while libc::waitpid(-1, &mut status, 0) != child {}
        libc::_exit(if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) })
    }
}

/// A lab has a few sockets for each node and one for each conversation: as many as the user may have.
fn raise_file_limit() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls are system calls on memory that lives as long as they take.
    unsafe {
        check(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit))?;
        limit.rlim_cur = limit.rlim_max;
        check(libc::setrlimit(libc::RLIMIT_NOFILE, &limit))
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// # Safety
/// None beyond open, write and close being called with what is passed.
unsafe fn write(path: &CString, bytes: &[u8]) -> io::Result<()> {
    unsafe {
        let file = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        check(file)?;
        let written = libc::write(file, bytes.as_ptr().cast(), bytes.len());
        let result = if written == bytes.len() as isize { Ok(()) } else { Err(io::Error::last_os_error()) };
        libc::close(file);
        result
    }
}

/// Says what the machine lacks when a sandbox cannot be made, and how to give it.
pub fn explain(error: io::Error) -> anyhow::Error {
    let is_refused =
        matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::ENOSPC | libc::EINVAL | libc::EUSERS));
    match is_refused {
        true => anyhow::anyhow!(
            "the lab needs namespaces, and this machine refuses them ({error}): run it as root, or allow user namespaces \
             (sysctl -w kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0 \
             user.max_user_namespaces=10000, as far as the kernel has them)"
        ),
        false => anyhow::Error::new(error).context("starting the lab's own process"),
    }
}

/// Runs a test in a sandbox: outside, this very test again as a process of its own inside; inside, the test.
///
/// # Panics
/// When the test fails, or could not be run: it never passes without having run.
pub fn inside(test: impl FnOnce() -> Result<()>) {
    let result = if is_inside() { test() } else { run_again() };
    if let Err(error) = result {
        panic!("{error:?}");
    }
}

fn run_again() -> Result<()> {
    let thread = std::thread::current();
    let name = thread.name().context("a test's thread has its name")?;
    let mut command = Command::new(std::env::current_exe()?);
    // Outside it was not ignored.
    command.args([name, "--exact", "--include-ignored", "--nocapture", "--test-threads=1"]);
    prepare(&mut command);
    let output = command.output().map_err(explain)?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() || !stdout.contains("1 passed") {
        bail!("{name} inside its sandbox ({}):\n{stdout}\n{stderr}", output.status);
    }
    print!("{stdout}");
    eprint!("{stderr}");
    Ok(())
}
