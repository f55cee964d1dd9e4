//! Between a program and the kernel's rtnetlink: what the program says can be changed or refused before the kernel hears it,
//! and so can what it is told. The program is a process like any other; a seccomp filter hands its messages to the thread
//! that has started it (`seccomp_unotify(2)`, Linux 5.6).

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use anyhow::{Context, Result};

/// One datagram. An error takes its place: the program's call ends with it, and the datagram is lost.
pub enum Datagram<'a> {
    Said(&'a mut Vec<u8>),
    /// The program wants to be told something; an error loses nothing.
    Awaited,
    Told(&'a mut Vec<u8>),
}

/// Runs the program to its end with this in between.
///
/// # Errors
/// It could not be started, or the kernel refuses to let it be supervised.
pub fn output(command: &mut Command, between: impl FnMut(Datagram) -> io::Result<()>) -> Result<Output> {
    // SAFETY: only system calls, on memory of their own.
    unsafe { command.pre_exec(supervise_me) };
    command.stdin(std::process::Stdio::null());
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let child = command.spawn().context("starting a supervised program")?;
    let mut supervisor = Supervisor::of(child.id(), between).context("supervising a program")?;
    std::thread::scope(|scope| {
        let ended = scope.spawn(move || child.wait_with_output());
        let result = supervisor.run().context("supervising a program");
        if result.is_err() {
            supervisor.kill();
        }
        let output = ended.join().expect("waiting does not panic")?;
        result.map(|()| output)
    })
}

/// Where the program leaves the other end of its filter until it is fetched.
const LISTENER: i32 = 200;

/// Calls by which datagrams are sent and received.
const CALLS: [libc::c_long; 4] = [libc::SYS_sendto, libc::SYS_recvfrom, libc::SYS_sendmsg, libc::SYS_recvmsg];

fn supervise_me() -> io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let is_call = |call: libc::c_long, to_the_end: u8| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: to_the_end,
        jf: 0,
        k: call as u32,
    };
    // The number of the call is the first field of `struct seccomp_data`.
    let filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        is_call(CALLS[0], 4),
        is_call(CALLS[1], 3),
        is_call(CALLS[2], 2),
        is_call(CALLS[3], 1),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the filter lives as long as the call takes.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
        let listener = check(libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program))?;
        check(libc::dup2(listener as i32, LISTENER).into())?;
        check(libc::close(listener as i32).into())?;
    }
    Ok(())
}

struct Supervisor<F> {
    process: OwnedFd,
    listener: OwnedFd,
    between: F,
}

impl<F: FnMut(Datagram) -> io::Result<()>> Supervisor<F> {
    fn of(id: u32, between: F) -> io::Result<Supervisor<F>> {
        // SAFETY: a descriptor that the kernel gives is nobody else's.
        let process = unsafe { OwnedFd::from_raw_fd(check(libc::syscall(libc::SYS_pidfd_open, id, 0))? as i32) };
        let listener = fetch(&process, LISTENER)?;
        Ok(Supervisor { process, listener, between })
    }

    /// Until the program has ended.
    fn run(&mut self) -> io::Result<()> {
        loop {
            let mut poll = libc::pollfd { fd: self.listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one entry, which lives as long as the call takes.
            check(unsafe { libc::poll(&mut poll, 1, -1) }.into())?;
            if poll.revents & libc::POLLIN == 0 {
                return Ok(());
            }
            // SAFETY: zeros are a valid value of both structures, and the kernel wants them.
            let (mut call, mut answer): (libc::seccomp_notif, libc::seccomp_notif_resp) =
                unsafe { (zeroed(), zeroed()) };
            // SAFETY: the kernel writes a structure of this size.
            let received = unsafe { libc::ioctl(self.listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &mut call) };
            if received == -1 {
                // The program was killed meanwhile.
                continue;
            }
            answer.id = call.id;
            match self.answer(&call) {
                Ok(Some(value)) => answer.val = value as i64,
                Ok(None) => answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
                Err(error) => answer.error = -error.raw_os_error().unwrap_or(libc::EIO),
            }
            // SAFETY: the kernel reads a structure of this size. It refuses only when the program is gone.
            unsafe { libc::ioctl(self.listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &answer) };
        }
    }

    /// It waits for an answer that nobody will give.
    fn kill(&self) {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: a system call on a descriptor that is open.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.process.as_raw_fd(), libc::SIGKILL, none, 0) };
    }

    /// What the call comes to; none when it is no matter of ours.
    fn answer(&mut self, call: &libc::seccomp_notif) -> io::Result<Option<usize>> {
        let [descriptor, address, length, flags, ..] = call.data.args;
        let socket = fetch(&self.process, descriptor as i32)?;
        if !is_rtnetlink(&socket)? {
            return Ok(None);
        }
        let mut datagram = vec![0; length as usize];
        let memory = |datagram: &[u8]| {
            let local = libc::iovec { iov_base: datagram.as_ptr().cast_mut().cast(), iov_len: datagram.len() };
            (local, libc::iovec { iov_base: address as *mut libc::c_void, iov_len: datagram.len() })
        };
        // SAFETY: the calls read and write `datagram` and memory of the program, which waits meanwhile.
        match libc::c_long::from(call.data.nr) {
            libc::SYS_sendto => {
                let (local, remote) = memory(&datagram);
                check(unsafe { libc::process_vm_readv(call.pid as i32, &local, 1, &remote, 1, 0) } as i64)?;
                (self.between)(Datagram::Said(&mut datagram))?;
                let bytes = datagram.as_ptr().cast();
                check(unsafe { libc::send(socket.as_raw_fd(), bytes, datagram.len(), flags as i32) } as i64)?;
                Ok(Some(length as usize))
            }
            libc::SYS_recvfrom => {
                (self.between)(Datagram::Awaited)?;
                let bytes = datagram.as_mut_ptr().cast();
                let received = unsafe { libc::recv(socket.as_raw_fd(), bytes, datagram.len(), flags as i32) };
                datagram.truncate(check(received as i64)? as usize);
                (self.between)(Datagram::Told(&mut datagram))?;
                let (local, remote) = memory(&datagram);
                check(unsafe { libc::process_vm_writev(call.pid as i32, &local, 1, &remote, 1, 0) } as i64)?;
                Ok(Some(datagram.len()))
            }
            // The program under test is known not to use them for netlink.
            _ => Err(io::Error::from_raw_os_error(libc::ENOSYS)),
        }
    }
}

fn fetch(process: &OwnedFd, descriptor: i32) -> io::Result<OwnedFd> {
    // SAFETY: a descriptor that the kernel gives is nobody else's.
    unsafe {
        let own = check(libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), descriptor, 0))?;
        Ok(OwnedFd::from_raw_fd(own as i32))
    }
}

fn is_rtnetlink(socket: &OwnedFd) -> io::Result<bool> {
    let option = |name| {
        let mut value: libc::c_int = 0;
        let mut size = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `size` bytes to `value`.
        let result =
            unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, (&raw mut value).cast(), &mut size) };
        check(result.into()).map(|_| value)
    };
    Ok(option(libc::SO_DOMAIN)? == libc::AF_NETLINK && option(libc::SO_PROTOCOL)? == libc::NETLINK_ROUTE)
}

fn check(result: i64) -> io::Result<i64> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// One netlink message of a datagram, its header and all.
pub struct Message<'a>(pub &'a mut [u8]);

/// Bytes of `struct nlmsghdr` and `struct ifaddrmsg`.
const HEADER: usize = 16;
const ADDRESS: usize = 8;

/// `IFA_PROTO`, since Linux 5.18.
const ADDRESS_PROTOCOL: u16 = 11;

impl Message<'_> {
    pub fn kind(&self) -> u16 {
        u16::from_ne_bytes([self.0[4], self.0[5]])
    }

    pub fn set_kind(&mut self, kind: u16) {
        self.0[4..6].copy_from_slice(&kind.to_ne_bytes());
    }

    pub fn flags(&self) -> u16 {
        u16::from_ne_bytes([self.0[6], self.0[7]])
    }

    pub fn set_flags(&mut self, flags: u16) {
        self.0[6..8].copy_from_slice(&flags.to_ne_bytes());
    }

    pub fn sequence(&self) -> u32 {
        u32::from_ne_bytes([self.0[8], self.0[9], self.0[10], self.0[11]])
    }

    /// Of an acknowledgement: the errno instead of 0.
    pub fn set_errno(&mut self, errno: i32) {
        self.0[HEADER..HEADER + 4].copy_from_slice(&(-errno).to_ne_bytes());
    }
}

/// The messages of a datagram, each with its padding.
pub fn messages(mut datagram: &mut [u8]) -> Vec<Message<'_>> {
    let mut messages = Vec::new();
    while datagram.len() >= HEADER {
        let length = u32::from_ne_bytes([datagram[0], datagram[1], datagram[2], datagram[3]]) as usize;
        let (message, rest) = datagram.split_at_mut(length.next_multiple_of(4).clamp(HEADER, datagram.len()));
        messages.push(Message(message));
        datagram = rest;
    }
    messages
}

/// A kernel before Linux 5.18: it takes `IFA_PROTO` without an error, and forgets it.
pub fn forget_address_protocols(datagram: Datagram) -> io::Result<()> {
    let Datagram::Told(datagram) = datagram else { return Ok(()) };
    let mut told = Vec::new();
    for message in messages(datagram) {
        match message.kind() {
            libc::RTM_NEWADDR => told.extend(without_attribute(message.0, HEADER + ADDRESS, ADDRESS_PROTOCOL)),
            _ => told.extend_from_slice(message.0),
        }
    }
    *datagram = told;
    Ok(())
}

/// The message without its attributes of this type; they begin after so many bytes.
fn without_attribute(message: &[u8], start: usize, unwanted: u16) -> Vec<u8> {
    let mut left = message[..start].to_vec();
    for (kind, payload) in attributes_of(&message[start..]).into_iter().filter(|(kind, _)| *kind != unwanted) {
        push_attribute(&mut left, kind, payload);
    }
    with_length(left)
}

/// Type and payload of each attribute.
fn attributes_of(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut attributes = Vec::new();
    while bytes.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([bytes[0], bytes[1]])).clamp(4, bytes.len());
        attributes.push((u16::from_ne_bytes([bytes[2], bytes[3]]), &bytes[4..length]));
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    attributes
}

fn push_attribute(bytes: &mut Vec<u8>, kind: u16, payload: &[u8]) {
    bytes.extend((4 + payload.len() as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend_from_slice(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// The message with its length in its header.
fn with_length(mut message: Vec<u8>) -> Vec<u8> {
    let length = (message.len() as u32).to_ne_bytes();
    message[..4].copy_from_slice(&length);
    message
}

/// A kernel of tomorrow: each message has an attribute that nobody knows yet, what grows from release to release is longer,
/// and each list of addresses has one of a family of which only the number is known.
pub fn tell_of_tomorrow(datagram: Datagram) -> io::Result<()> {
    let Datagram::Told(datagram) = datagram else { return Ok(()) };
    let mut told = Vec::new();
    for message in messages(datagram) {
        let fixed = match message.kind() {
            libc::RTM_NEWLINK => 16,
            libc::RTM_NEWADDR => ADDRESS,
            libc::RTM_NEWROUTE | libc::RTM_NEWRULE => 12,
            _ => {
                told.extend_from_slice(message.0);
                continue;
            }
        };
        let grows: &[u16] = match message.kind() {
            libc::RTM_NEWLINK => &[libc::IFLA_STATS, libc::IFLA_STATS64, libc::IFLA_MAP],
            libc::RTM_NEWADDR => &[libc::IFA_CACHEINFO],
            libc::RTM_NEWROUTE => &[libc::RTA_CACHEINFO],
            _ => &[],
        };
        let start = HEADER + fixed;
        let mut attributes = Vec::new();
        for (kind, payload) in attributes_of(&message.0[start..]) {
            let payload = match kind {
                libc::IFLA_AF_SPEC if message.kind() == libc::RTM_NEWLINK => families_of_tomorrow(payload),
                kind if grows.contains(&kind) => [payload, &[0; 8]].concat(),
                _ => payload.to_vec(),
            };
            push_attribute(&mut attributes, kind, &payload);
        }
        if message.kind() == libc::RTM_NEWRULE {
            // A selector that nobody has set; with a value the rule would be another one.
            push_attribute(&mut attributes, UNKNOWN, &[0; 4]);
        } else {
            push_attribute(&mut attributes, UNKNOWN, b"whatever it is");
            push_attribute(&mut attributes, UNKNOWN | libc::NLA_F_NESTED as u16, &[8, 0, 1, 0, 1, 2, 3, 4]);
        }
        told.extend(with_length([&message.0[..start], &attributes].concat()));
        if message.kind() == libc::RTM_NEWADDR {
            // MCTP's addresses are one byte.
            let mut other = message.0[..start].to_vec();
            other[HEADER] = MCTP;
            push_attribute(&mut other, libc::IFA_LOCAL, &[8]);
            told.extend(with_length(other));
        }
    }
    *datagram = told;
    Ok(())
}

/// `AF_MCTP`, since Linux 5.15, and a number of an attribute that is far from being given.
const MCTP: u8 = 45;
const UNKNOWN: u16 = 0x3f00;

/// `IFLA_INET6_CONF` gets longer with each sysctl, and a family more may have something to say.
fn families_of_tomorrow(payload: &[u8]) -> Vec<u8> {
    const INET6_CONF: u16 = 2;
    let mut families = Vec::new();
    for (family, payload) in attributes_of(payload) {
        let mut inner = Vec::new();
        for (kind, payload) in attributes_of(payload) {
            let more: &[u8] = if (i32::from(family), kind) == (libc::AF_INET6, INET6_CONF) { &[0; 16] } else { &[] };
            push_attribute(&mut inner, kind, &[payload, more].concat());
        }
        push_attribute(&mut inner, UNKNOWN, &[1]);
        push_attribute(&mut families, family, &inner);
    }
    push_attribute(&mut families, MCTP.into(), &[8, 0, 1, 0, 1, 0, 0, 0]);
    families
}
