//! One rtnetlink socket: dumps that are whole or an error, and batches of which every acknowledgement is counted.
//!
//! rtnetlink's own connection task logs and drops messages that it cannot parse, and gives an empty `Ok` for a dump that
//! ended with an error; both would make a failed read look like an empty one. So its sockets and messages are used here,
//! and the conversation is ours.

use std::io;
use std::time::Duration;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};

use super::Error;

/// The kernel answers a request before the send returns, but for the dump's later parts; this is for a kernel in trouble.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A dump that a change has interrupted is asked for again, this often.
const DUMP_ATTEMPTS: usize = 10;

/// Requests in one send. Above about 256 unread acknowledgements the kernel drops some, and a waiter would hang.
const BATCH: usize = 128;

/// Bytes. The kernel fills a dump's datagrams up to 32 KiB when the reader has room for them.
const DATAGRAM: usize = 64 * 1024;

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;

/// A message to change something, without its header.
pub struct Request {
    pub message: RouteNetlinkMessage,
    /// `NLM_F_CREATE` and the like; `NLM_F_REQUEST` and `NLM_F_ACK` are added.
    pub flags: u16,
}

/// A conversation with the kernel's rtnetlink, in the network namespace in which it was opened.
pub struct Netlink {
    socket: TokioSocket,
    sequence: u32,
}

impl Netlink {
    /// Needs a running tokio runtime, and no privilege: only changes do.
    ///
    /// # Errors
    /// The kernel has no rtnetlink socket to give.
    pub fn open() -> io::Result<Netlink> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        let inner = socket.socket_mut();
        inner.bind_auto()?;
        inner.connect(&SocketAddr::new(0, 0))?;
        // Acknowledgements without a copy of the request: 128 of them always fit the socket's buffer.
        inner.set_cap_ack(true)?;
        Ok(Netlink { socket, sequence: 0 })
    }

    /// Everything that a dump request yields.
    ///
    /// # Errors
    /// Any doubt: an errno (also one that comes with the end of the dump), a message that does not parse, no end in
    /// time, or a dump that changes or a lack of buffers kept interrupting.
    pub async fn dump(&mut self, request: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, Error> {
        for _ in 0..DUMP_ATTEMPTS {
            let sequence = self.send(&[Request { message: request.clone(), flags: NLM_F_DUMP }], 0).await?;
            match self.receive_dump(sequence).await {
                Ok((messages, false)) => return Ok(messages),
                Ok((_, true)) => {}
                // Something of the dump may be lost, and the kernel takes no other request while one is under way.
                Err(error) if error.errno() == Some(libc::ENOBUFS) => {
                    *self = Netlink::open().map_err(Error::Refused)?;
                }
                Err(error) => return Err(error),
            }
        }
        let why = "interrupted by a change or a lack of buffers";
        Err(Error::Garbled(format!("{DUMP_ATTEMPTS} dumps were each {why}")))
    }

    async fn receive_dump(&mut self, sequence: u32) -> Result<(Vec<RouteNetlinkMessage>, bool), Error> {
        let mut messages = Vec::new();
        let mut is_interrupted = false;
        loop {
            for message in self.receive().await? {
                if message.header.sequence_number != sequence {
                    continue;
                }
                is_interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => messages.push(inner),
                    NetlinkPayload::Done(done) if done.code == 0 => return Ok((messages, is_interrupted)),
                    NetlinkPayload::Done(done) => {
                        return Err(Error::Refused(io::Error::from_raw_os_error(done.code.abs())));
                    }
                    NetlinkPayload::Error(error) => return Err(Error::Refused(error.to_io())),
                    other => return Err(Error::Garbled(format!("{other:?} in a dump"))),
                }
            }
        }
    }

    /// The one answer to a question.
    ///
    /// # Errors
    /// An errno, or no answer that can be used.
    pub async fn request(&mut self, question: RouteNetlinkMessage) -> Result<RouteNetlinkMessage, Error> {
        let sequence = self.send(&[Request { message: question, flags: 0 }], 0).await?;
        loop {
            for message in self.receive().await? {
                match message.payload {
                    _ if message.header.sequence_number != sequence => {}
                    NetlinkPayload::InnerMessage(inner) => return Ok(inner),
                    NetlinkPayload::Error(error) => return Err(Error::Refused(error.to_io())),
                    other => return Err(Error::Garbled(format!("{other:?} in answer to a question"))),
                }
            }
        }
    }

    /// Sends changes, in order, and gives each one's result. The kernel goes on after one that it refuses.
    ///
    /// # Errors
    /// The conversation itself broke: then it is not known which of the changes were made.
    pub async fn change(&mut self, requests: &[Request]) -> Result<Vec<Result<(), Error>>, Error> {
        let mut results = Vec::with_capacity(requests.len());
        for batch in requests.chunks(BATCH) {
            let first = self.send(batch, NLM_F_ACK).await?;
            let mut answers: Vec<Option<Result<(), Error>>> = batch.iter().map(|_| None).collect();
            while answers.iter().any(Option::is_none) {
                for message in self.receive().await? {
                    let answer = message.header.sequence_number.wrapping_sub(first) as usize;
                    let Some(slot) = answers.get_mut(answer) else { continue };
                    if let NetlinkPayload::Error(error) = message.payload {
                        *slot = Some(error.code.map_or(Ok(()), |_| Err(Error::Refused(error.to_io()))));
                    }
                }
            }
            results.extend(answers.into_iter().flatten());
        }
        Ok(results)
    }

    /// Each with these flags beside its own. Gives the sequence number of the first; the others follow.
    async fn send(&mut self, requests: &[Request], flags: u16) -> Result<u32, Error> {
        let first = self.sequence.wrapping_add(1);
        let mut buffer = Vec::new();
        for request in requests {
            self.sequence = self.sequence.wrapping_add(1);
            let mut message = NetlinkMessage::from(request.message.clone());
            message.header.flags = request.flags | NLM_F_REQUEST | flags;
            message.header.sequence_number = self.sequence;
            message.finalize();
            let start = buffer.len();
            buffer.resize(start + message.buffer_len(), 0);
            message.serialize(&mut buffer[start..]);
        }
        let sent = within(self.socket.send(&buffer)).await?;
        if sent != buffer.len() {
            return Err(Error::Garbled(format!("{sent} of {} bytes were taken", buffer.len())));
        }
        Ok(first)
    }

    /// The messages of one datagram.
    async fn receive(&mut self) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, Error> {
        let mut datagram = Vec::with_capacity(DATAGRAM);
        within(self.socket.recv(&mut datagram)).await?;
        let mut messages = Vec::new();
        let mut rest = datagram.as_slice();
        while let Some(&[a, b, c, d]) = rest.get(..4).filter(|_| rest.len() >= HEADER) {
            // Messages are padded to four bytes; one that is shorter than its header would not move on.
            let length = (u32::from_ne_bytes([a, b, c, d]) as usize).max(HEADER).next_multiple_of(4);
            if !is_of_another_family(rest) {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| Error::Garbled(error.to_string()))?;
                messages.push(message);
            }
            rest = rest.get(length..).unwrap_or_default();
        }
        Ok(messages)
    }
}

/// Whether a message tells of an address, route or rule that is neither IPv4's nor IPv6's. A dump may hold such ones (MCTP's,
/// Phonet's), and they need not look like those: MCTP's addresses are one byte.
fn is_of_another_family(message: &[u8]) -> bool {
    let kind = u16::from_ne_bytes([message[4], message[5]]);
    let family = message.get(HEADER).copied().map(i32::from);
    let has_family = [libc::RTM_NEWADDR, libc::RTM_NEWROUTE, libc::RTM_NEWRULE].contains(&kind);
    has_family && family.is_some_and(|family| ![libc::AF_INET, libc::AF_INET6].contains(&family))
}

async fn within<T>(answer: impl Future<Output = io::Result<T>>) -> Result<T, Error> {
    match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
        Ok(answer) => answer.map_err(Error::Refused),
        Err(_) => Err(Error::TimedOut),
    }
}
