//! The only place that knows netlink. The kernel's habits are written down here.

pub mod apply;
pub mod ask;
pub mod events;
pub mod observe;
mod socket;

pub use socket::Netlink;

use std::fmt;
use std::io;

/// A request that the kernel refused, or an answer that cannot be trusted.
#[derive(Debug)]
pub enum Error {
    /// An errno.
    Refused(io::Error),
    /// The answer did not come in time: nothing may be assumed of what was done.
    TimedOut,
    /// An answer that does not parse, or does not fit the question.
    Garbled(String),
}

impl Error {
    /// The errno, when the kernel gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Refused(error) => error.raw_os_error(),
            Error::TimedOut | Error::Garbled(_) => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Error::Refused(error) => write!(f, "{error}"),
            Error::TimedOut => write!(f, "the kernel did not answer in time"),
            Error::Garbled(what) => write!(f, "the kernel's answer cannot be used: {what}"),
        }
    }
}

impl std::error::Error for Error {}
