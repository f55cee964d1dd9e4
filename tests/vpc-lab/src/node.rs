//! A node: a network namespace with a name and, for the programs that run in it, a `/run` of its own. It lives as long as
//! its file descriptor, so nothing of it is left when the lab's process ends, however that ends.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::kernel;

pub struct Node {
    pub name: String,
    namespace: File,
    run: PathBuf,
}

impl Node {
    /// A new network namespace with its loopback up. Must be called inside the sandbox.
    pub fn create(name: &str) -> Result<Node> {
        ensure!(crate::sandbox::is_inside(), "a lab's nodes are made inside its sandbox only");
        let make = || -> Result<File> {
            // SAFETY: moves this thread alone into a new network namespace.
            check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).context("making a network namespace")?;
            kernel::set_up("lo")?;
            // Pings of programs without privilege, as distributions allow them.
            kernel::sysctl("ipv4/ping_group_range", "0 0")?;
            // An answer that was lost is not sent again a second later, into whatever is being watched then.
            kernel::sysctl("ipv4/tcp_synack_retries", "0")?;
            Ok(File::open("/proc/thread-self/ns/net")?)
        };
        let namespace = on_a_thread(make).with_context(|| format!("making the node {name}"))?;
        let run = Path::new("/run/nodes").join(name);
        fs::create_dir_all(&run).with_context(|| format!("making {}", run.display()))?;
        Ok(Node { name: name.into(), namespace, run })
    }

    /// Runs a function on a thread inside the namespace. Sockets that it opens stay there wherever they are used.
    pub fn enter<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_a_thread(|| {
            // SAFETY: moves this thread alone; the descriptor is open.
            check(unsafe { libc::setns(self.namespace.as_raw_fd(), libc::CLONE_NEWNET) })
                .with_context(|| format!("entering {}", self.name))?;
            act()
        })
    }

    /// A program to run inside the namespace; it is killed when the thread that started it ends.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let namespace = self.namespace.as_raw_fd();
        let run = CString::new(self.run.as_os_str().as_bytes()).unwrap_or_default();
        // SAFETY: only system calls, on memory that was made before the fork.
        unsafe { command.pre_exec(move || settle(namespace, &run)) };
        command
    }

    /// What programs see as `/run`.
    pub fn run_directory(&self) -> &Path {
        &self.run
    }

    /// Sets `/proc/sys/net/<path>` of this namespace.
    pub fn sysctl(&self, path: &str, value: &str) -> Result<()> {
        self.enter(|| {
            let file = format!("/proc/sys/net/{path}");
            fs::write(&file, value).with_context(|| format!("writing {value} to {file}"))
        })
    }

    pub(crate) fn namespace(&self) -> RawFd {
        self.namespace.as_raw_fd()
    }
}

fn settle(namespace: RawFd, run: &CString) -> io::Result<()> {
    let (run_directory, none) = (c"/run", std::ptr::null());
    // SAFETY: all pointers are to strings that end in zero, or null where that is allowed.
    unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        check(libc::setns(namespace, libc::CLONE_NEWNET))?;
        check(libc::unshare(libc::CLONE_NEWNS))?;
        check(libc::mount(run.as_ptr(), run_directory.as_ptr(), none, libc::MS_BIND, none.cast()))
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A network namespace belongs to a thread, and a thread that changed it must not be used for anything else.
fn on_a_thread<T: Send>(act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| match scope.spawn(act).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
