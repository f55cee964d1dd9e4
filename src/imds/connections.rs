//! HTTP/1.1 connections to one of the service's addresses: kept as long as the service keeps them, bounded in what they take
//! in, and paid for in packets before they are opened.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpSocket, TcpStream, lookup_host};

use super::endpoint::Endpoint;
use super::pace::Turn;

/// Bytes that may come for one request, heads and interim answers (1xx) included; of those a service may send any number.
const MOST_BYTES: usize = 128 * 1024;

/// A request of this client: none has a body.
pub type Question = Request<Empty<Bytes>>;

/// One connection, as far as requests are concerned; tokio has a task that reads and writes.
pub struct Connection(SendRequest<Empty<Bytes>>);

/// All that leave by one link, or as the routing table says, to one endpoint.
pub struct Connections {
    pub endpoint: Endpoint,
    pub link: Option<String>,
    idle: RefCell<Vec<Connection>>,
}

/// Why no answer began.
#[derive(Debug)]
pub enum Failure {
    /// There is no connection.
    Connecting(io::Error),
    /// It broke, or what came is no HTTP.
    Asking(hyper::Error),
}

impl Connections {
    pub fn new(endpoint: Endpoint, link: Option<&str>) -> Connections {
        Connections { endpoint, link: link.map(String::from), idle: RefCell::default() }
    }

    /// The head of an answer, and the connection on which its body comes.
    ///
    /// # Errors
    /// As [`Failure`] says.
    pub async fn ask(
        &self,
        question: Question,
        turn: &mut Turn<'_>,
    ) -> Result<(Response<Incoming>, Connection), Failure> {
        while let Some(mut kept) = self.kept().await {
            match kept.0.send_request(question.clone()).await {
                Ok(response) => return Ok((response, kept)),
                Err(error) if error.is_parse() => return Err(Failure::Asking(error)),
                // The service has ended it meanwhile. Nothing that is asked here changes anything, so it is asked once more.
                Err(_) => turn.pay_for_request().await,
            }
        }
        turn.pay_for_connection().await;
        let mut new = self.open().await?;
        let response = new.0.send_request(question).await.map_err(Failure::Asking)?;
        Ok((response, new))
    }

    /// For the next request, once the body has been read.
    pub fn keep(&self, connection: Connection) {
        self.idle.borrow_mut().push(connection);
    }

    async fn kept(&self) -> Option<Connection> {
        loop {
            let mut kept = self.idle.borrow_mut().pop()?;
            if kept.0.ready().await.is_ok() {
                return Some(kept);
            }
        }
    }

    async fn open(&self) -> Result<Connection, Failure> {
        let stream = self.connect().await.map_err(Failure::Connecting)?;
        let bounded = Bounded { stream, taken: 0 };
        let (sender, connection) = handshake(TokioIo::new(bounded)).await.map_err(Failure::Asking)?;
        // What goes wrong on it is told to who has asked; it ends when nobody can ask any more.
        tokio::spawn(connection);
        Ok(Connection(sender))
    }

    async fn connect(&self) -> io::Result<TcpStream> {
        let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in lookup_host(self.endpoint.host_and_port()).await? {
            match self.connect_to(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    async fn connect_to(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if let Some(link) = &self.link {
            // SO_BINDTODEVICE; needs no privilege on a socket that is not bound yet (Linux 5.7).
            socket.bind_device(Some(link.as_bytes()))?;
        }
        socket.set_nodelay(true)?;
        socket.connect(address).await
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Failure::Connecting(error) => write!(f, "{error}"),
            Failure::Asking(error) => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Failure::Connecting(error) => Some(error),
            Failure::Asking(error) => Some(error),
        }
    }
}

/// Takes in so much after each request and no more: hyper itself reads interim answers without end, and without letting
/// anything else have its turn.
struct Bounded {
    stream: TcpStream,
    taken: usize,
}

impl AsyncRead for Bounded {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context, buffer: &mut ReadBuf) -> Poll<io::Result<()>> {
        if self.taken > MOST_BYTES {
            return Poll::Ready(Err(io::Error::other(format!("the answer is longer than {MOST_BYTES} bytes"))));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        self.taken += buffer.filled().len() - before;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.taken = 0;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
