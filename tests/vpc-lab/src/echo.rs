//! The other side of every probe: a server in each node that answers UDP and TCP with the address it saw, and notes who
//! pinged. It answers a datagram from the address at which it was asked, as a DNS server on many addresses does.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::kernel;
use crate::node::Node;

/// Where every node listens, UDP and TCP.
pub const PORT: u16 = 7007;
/// Where every node sends back all that comes by TCP, for as long as the client likes.
pub const FLOW_PORT: u16 = 7008;

/// Bytes of datagrams that wait for their answer.
const QUEUE: usize = 4 << 20;

/// Datagrams of one socket before the others have their turn.
const TURN: usize = 64;

/// What tells one probe from every other.
pub const NONCE: usize = 8;
pub type Nonce = [u8; NONCE];

/// How long a TCP client may take.
const PATIENCE: Duration = Duration::from_secs(5);

type Pings = Mutex<HashMap<Nonce, IpAddr>>;

pub struct Echo {
    sockets: Arc<Sockets>,
    /// The thread ends when this is closed.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

struct Sockets {
    udp: [Socket; 2],
    tcp: [TcpListener; 2],
    flows: [TcpListener; 2],
    icmp: [Socket; 2],
    /// Who sent which ping. Its lock is held while one is read from a socket.
    pings: Pings,
    /// How many streams are sent back at this moment: one for each clone but this.
    streams: Arc<()>,
}

impl Echo {
    pub fn start(node: &Node) -> Result<Echo> {
        let sockets =
            node.enter(Sockets::open).map(Arc::new).with_context(|| format!("starting the server on {}", node.name))?;
        let (stop, stopped) = UnixStream::pair()?;
        let thread = std::thread::spawn({
            let sockets = sockets.clone();
            move || sockets.serve(&stopped)
        });
        Ok(Echo { sockets, stop: Some(stop), thread: Some(thread) })
    }

    /// From which address a ping with this payload came. The kernel hands a ping to the sockets before it answers, so
    /// whoever has the answer finds it here.
    pub fn pinged_by(&self, nonce: &Nonce) -> Option<IpAddr> {
        self.sockets.note_pings().get(nonce).copied()
    }

    /// Streams that are sent back at this moment.
    pub fn streams(&self) -> usize {
        Arc::strong_count(&self.sockets.streams) - 1
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed already.
            let _ = thread.join();
        }
    }
}

impl Sockets {
    fn open() -> Result<Sockets> {
        let any: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        let listener = |any: IpAddr, port: u16| {
            let socket = Socket::new(domain(any), Type::STREAM, Some(Protocol::TCP))?;
            listen_on_one_family(&socket, any, port)?;
            socket.listen(1024)?;
            io::Result::Ok(TcpListener::from(socket))
        };
        let [tcp4, tcp6] = any.map(|any| listener(any, PORT));
        let [flows4, flows6] = any.map(|any| listener(any, FLOW_PORT));
        let [udp4, udp6] = any.map(|any| {
            let socket = Socket::new(domain(any), Type::DGRAM, Some(Protocol::UDP))?;
            match any {
                IpAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?,
                IpAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?,
            }
            kernel::set_receive_queue(&socket, QUEUE)?;
            listen_on_one_family(&socket, any, PORT)?;
            io::Result::Ok(socket)
        });
        let [icmp4, icmp6] = any.map(|any| {
            let protocol = if any.is_ipv4() { Protocol::ICMPV4 } else { Protocol::ICMPV6 };
            let socket = Socket::new(domain(any), Type::RAW, Some(protocol))?;
            socket.set_nonblocking(true)?;
            io::Result::Ok(socket)
        });
        Ok(Sockets {
            udp: [udp4?, udp6?],
            tcp: [tcp4?, tcp6?],
            flows: [flows4?, flows6?],
            icmp: [icmp4?, icmp6?],
            pings: Pings::default(),
            streams: Arc::default(),
        })
    }

    fn serve(&self, stopped: &UnixStream) {
        let datagrams = self.udp.iter().chain(&self.icmp).map(AsFd::as_fd);
        let listeners = self.tcp.iter().chain(&self.flows).map(AsFd::as_fd);
        let descriptors: Vec<BorrowedFd> = std::iter::once(stopped.as_fd()).chain(datagrams).chain(listeners).collect();
        loop {
            let mut polled: Vec<PollFd> = descriptors.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
            if poll(&mut polled, PollTimeout::NONE).is_err() {
                continue;
            }
            if polled[0].revents().is_none_or(|flags| !flags.is_empty()) {
                return;
            }
            for socket in &self.udp {
                // A few of each, so that none of the others starves.
                let _ = (0..TURN).try_for_each(|_| answer_datagram(socket));
            }
            drop(self.note_pings());
            for listener in &self.tcp {
                while let Ok((stream, from)) = listener.accept() {
                    std::thread::spawn(move || answer_stream(stream, from.ip()));
                }
            }
            for listener in &self.flows {
                while let Ok((stream, _)) = listener.accept() {
                    let counted = self.streams.clone();
                    std::thread::spawn(move || {
                        send_back(stream);
                        drop(counted);
                    });
                }
            }
        }
    }
}

impl Sockets {
    fn note_pings(&self) -> MutexGuard<'_, HashMap<Nonce, IpAddr>> {
        let mut pings = self.pings.lock().unwrap_or_else(PoisonError::into_inner);
        for (socket, has_ip_header) in self.icmp.iter().zip([true, false]) {
            while let Ok((nonce, from)) = read_ping(socket, has_ip_header) {
                pings.extend(nonce.zip(from));
            }
        }
        pings
    }
}

fn domain(address: IpAddr) -> Domain {
    if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 }
}

fn listen_on_one_family(socket: &Socket, any: IpAddr, port: u16) -> io::Result<()> {
    if any.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::new(any, port).into())
}

fn answer_datagram(socket: &Socket) -> io::Result<()> {
    let mut payload = [0; 2048];
    let mut control = nix::cmsg_space!(libc::in6_pktinfo);
    let (length, from, asked) = {
        let mut buffers = [IoSliceMut::new(&mut payload)];
        let message =
            recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut buffers, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
        (message.bytes, message.address, message.cmsgs()?.next())
    };
    let Some(from) = from else { return Ok(()) };
    let mut answer = payload[..length.min(NONCE)].to_vec();
    answer.extend(peer(&from).to_string().bytes());
    let (info4, info6);
    let control = match asked {
        Some(ControlMessageOwned::Ipv4PacketInfo(info)) => {
            info4 = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: info.ipi_addr, ipi_addr: info.ipi_addr };
            vec![ControlMessage::Ipv4PacketInfo(&info4)]
        }
        Some(ControlMessageOwned::Ipv6PacketInfo(info)) => {
            info6 = libc::in6_pktinfo { ipi6_ifindex: 0, ..info };
            vec![ControlMessage::Ipv6PacketInfo(&info6)]
        }
        _ => Vec::new(),
    };
    let send = || sendmsg(socket.as_raw_fd(), &[IoSlice::new(&answer)], &control, MsgFlags::MSG_DONTWAIT, Some(&from));
    // A busy machine's queue is no loss of the network's: the answer waits for its room.
    while send() == Err(Errno::EAGAIN) {
        let _ = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE);
    }
    // An answer that finds no way out is the client's silence: that is what is being measured.
    Ok(())
}

fn peer(address: &SockaddrStorage) -> IpAddr {
    match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(v4), _) => SocketAddrV4::from(*v4).ip().to_owned().into(),
        (_, Some(v6)) => SocketAddrV6::from(*v6).ip().to_owned().into(),
        (None, None) => Ipv4Addr::UNSPECIFIED.into(),
    }
}

/// One ICMP message, with the nonce if it is an echo request that has one. Raw IPv4 sockets show the IP header too.
fn read_ping(socket: &Socket, has_ip_header: bool) -> io::Result<(Option<Nonce>, Option<IpAddr>)> {
    let mut buffer = [std::mem::MaybeUninit::<u8>::uninit(); 2048];
    let (length, from) = socket.recv_from(&mut buffer)?;
    // SAFETY: the kernel has written this many bytes.
    let bytes: Vec<u8> = buffer[..length].iter().map(|byte| unsafe { byte.assume_init() }).collect();
    let header = if has_ip_header { bytes.first().map_or(0, |first| usize::from(first & 0x0f) * 4) } else { 0 };
    let request = if has_ip_header { 8 } else { 128 };
    let icmp = bytes.get(header..).unwrap_or_default();
    let nonce = icmp.get(8..8 + NONCE).filter(|_| icmp.first() == Some(&request));
    Ok((nonce.and_then(|nonce| nonce.try_into().ok()), from.as_socket().map(|from| from.ip())))
}

fn answer_stream(mut stream: TcpStream, from: IpAddr) {
    let mut talk = || -> io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut nonce = [0; NONCE];
        stream.read_exact(&mut nonce)?;
        stream.write_all(&[&nonce[..], from.to_string().as_bytes()].concat())
    };
    // A client that went away has seen what it wanted, or reports it itself.
    let _ = talk();
}

/// All that comes, until the client ends it.
fn send_back(mut stream: TcpStream) {
    let mut talk = || -> io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(()),
                length => stream.write_all(&buffer[..length])?,
            }
        }
    };
    // The client counts what came back, and so sees it if this ends early.
    let _ = talk();
}
