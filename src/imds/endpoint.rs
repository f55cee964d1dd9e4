//! Where the service is, as an URL says it.

use std::fmt;
use std::net::Ipv4Addr;

use hyper::Uri;

use super::Error;

/// `http://HOST[:PORT][/PATH]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// As the `Host` field and people get it.
    authority: String,
    host: String,
    port: u16,
    /// Begins and ends with a slash.
    path: String,
}

impl Endpoint {
    /// # Errors
    /// [`Error::BadEndpoint`], without what may be a password.
    pub fn parse(endpoint: &str) -> Result<Endpoint, Error> {
        let bad = |why: String| Error::BadEndpoint { endpoint: endpoint.into(), why };
        if let Some((_, host)) = endpoint.rsplit_once('@') {
            let why = "it has to be without a user name and password, which metadata does not ask for".into();
            return Err(Error::BadEndpoint { endpoint: format!("http://…@{host}"), why });
        }
        if !endpoint.is_ascii() {
            return Err(bad("it has to be ASCII; an international name has a form that begins with xn--".into()));
        }
        if !endpoint.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("http://")) {
            return Err(bad("it has to begin with http://".into()));
        }
        let uri: Uri = endpoint.parse().map_err(|error: hyper::http::uri::InvalidUri| bad(error.to_string()))?;
        let authority = uri.authority().map(|authority| authority.as_str()).unwrap_or_default();
        let host = uri.host().unwrap_or_default();
        if host.is_empty() || uri.query().is_some() || endpoint.contains('#') {
            return Err(bad("it has to be a host with an optional port".into()));
        }
        let port = match authority[host.len()..].strip_prefix(':') {
            Some(port) => port.parse().map_err(|_| bad(format!("`{port}` is no port (1 to 65535)")))?,
            None => 80,
        };
        if port == 0 {
            return Err(bad("`0` is no port (1 to 65535)".into()));
        }
        let slash = if uri.path().ends_with('/') { "" } else { "/" };
        let path = format!("{}{slash}", uri.path());
        let name = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        Ok(Endpoint { authority: authority.into(), host: name.into(), port, path })
    }

    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// Below `/`, whatever stands before.
    pub fn path_to(&self, path: &str) -> String {
        format!("{}{path}", self.path)
    }

    pub fn is_ipv4(&self) -> bool {
        self.host.parse::<Ipv4Addr>().is_ok()
    }

    /// An address without brackets, or a name.
    pub fn host_and_port(&self) -> (&str, u16) {
        (&self.host, self.port)
    }
}

/// Without a slash at the end, as people write it.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "http://{}{}", self.authority, self.path.trim_end_matches('/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_refused_and_not_shown() {
        for endpoint in ["http://me:secret@127.0.0.1:1", "http://secret@127.0.0.1:1/"] {
            let error = Endpoint::parse(endpoint).unwrap_err().to_string();
            assert!(error.contains("password") && error.contains("127.0.0.1:1"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn the_parts_are_where_they_belong() {
        let parts = |text| {
            let endpoint = Endpoint::parse(text).unwrap();
            let (host, port) = endpoint.host_and_port();
            (host.to_string(), port, endpoint.path_to("latest"), endpoint.to_string())
        };
        let expected = |host: &str, port, path: &str, shown: &str| (host.into(), port, path.into(), shown.into());
        assert_eq!(parts("http://127.0.0.1:8080"), expected("127.0.0.1", 8080, "/latest", "http://127.0.0.1:8080"));
        assert_eq!(
            parts("HTTP://[fd00:ec2::254]/"),
            expected("fd00:ec2::254", 80, "/latest", "http://[fd00:ec2::254]")
        );
        assert_eq!(
            parts("http://imds.example/a/b"),
            expected("imds.example", 80, "/a/b/latest", "http://imds.example/a/b")
        );
    }

    #[test]
    fn what_is_no_endpoint_is_told_apart() {
        for bad in [
            "",
            "169.254.169.254",
            "https://169.254.169.254",
            "http://x/?a",
            "http://",
            "ftp://x",
            "http://x:0",
            "http://x:",
            "http://x:65536",
            "http://x/#a",
            "http://a b",
            "http://[::1",
            "http://ü",
            "http:///",
            "http://:80",
        ] {
            assert!(matches!(Endpoint::parse(bad), Err(Error::BadEndpoint { .. })), "{bad}");
        }
    }
}
