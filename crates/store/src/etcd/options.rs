//! How to reach etcd, checked before anything is sent.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};

use crate::{Result, StoreError};

/// How often a connection with a silent watch on it is checked, so that a hung etcd is noticed. etcd closes connections that do so more often than every 5 s.
const PING_INTERVAL: Duration = Duration::from_secs(6);
/// How long such a check may take.
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// Where etcd is, how to be let in, and how long to wait.
#[derive(Clone)]
pub struct EtcdOptions {
    /// `http://host:port` or `https://host:port`, all members of one etcd cluster.
    pub endpoints: Vec<String>,
    /// For each try of each call.
    pub timeout: Duration,
    /// How long [`EtcdStore::connect`](super::EtcdStore::connect) tries; none: until it succeeds.
    pub connect_timeout: Option<Duration>,
    /// The etcd user; needs `password`.
    pub username: Option<String>,
    /// The user's password; never logged.
    pub password: Option<String>,
    /// PEM certificates of the authority that signed etcd's; needed for `https`.
    pub ca_file: Option<PathBuf>,
    /// PEM certificate this process shows to etcd; needs `key_file`.
    pub cert_file: Option<PathBuf>,
    /// PEM private key of `cert_file`.
    pub key_file: Option<PathBuf>,
    /// The name to expect in etcd's certificate when it is not the endpoint's host.
    pub domain: Option<String>,
}

impl EtcdOptions {
    /// Plain options for `endpoints`: 2 s for each try, trying to connect until it succeeds.
    pub fn new(endpoints: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            timeout: Duration::from_secs(2),
            connect_timeout: None,
            username: None,
            password: None,
            ca_file: None,
            cert_file: None,
            key_file: None,
            domain: None,
        }
    }

    /// Checks every option and reads the files; the user is left out. Errors: `Options`, naming option, value and problem.
    pub(super) fn check(&self) -> Result<ConnectOptions> {
        if self.endpoints.is_empty() {
            return Err(wrong("etcd endpoints", "", "must name at least one http://host:port"));
        }
        for endpoint in &self.endpoints {
            self.check_endpoint(endpoint)?;
        }
        if self.timeout.is_zero() {
            return Err(wrong("etcd timeout", "0s", "must be above 0"));
        }
        let mut options = ConnectOptions::new()
            .with_connect_timeout(self.timeout)
            .with_keep_alive(PING_INTERVAL, PING_TIMEOUT)
            .with_keep_alive_while_idle(false)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        match (&self.username, &self.password) {
            (Some(_), Some(_)) | (None, None) => {}
            (Some(username), None) => return Err(wrong("etcd username", username, "needs a password")),
            (None, Some(_)) => return Err(wrong("etcd password", "(hidden)", "needs a username")),
        }
        if let Some(tls) = self.tls()? {
            options = options.with_tls(tls);
        }
        Ok(options)
    }

    pub(super) fn with_user(&self, options: ConnectOptions) -> ConnectOptions {
        match (&self.username, &self.password) {
            (Some(username), Some(password)) => options.with_user(username, password),
            _ => options,
        }
    }

    fn check_endpoint(&self, endpoint: &str) -> Result<()> {
        let refuse = |problem| Err(wrong("etcd endpoint", endpoint, problem));
        let (secure, address) = match (endpoint.strip_prefix("http://"), endpoint.strip_prefix("https://")) {
            (Some(address), _) => (false, address),
            (_, Some(address)) => (true, address),
            _ => return refuse("must start with http:// or https://"),
        };
        let valid_host = |host: &str| {
            !host.is_empty()
                && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | ':' | '[' | ']'))
        };
        match address.rsplit_once(':') {
            Some((host, port)) if valid_host(host) && port.parse::<u16>().is_ok_and(|port| port > 0) => {}
            _ => return refuse("must be http(s)://host:port with a port from 1 to 65535 and nothing after it"),
        }
        match (secure, &self.ca_file) {
            (true, None) => refuse("is https, which needs the CA file that etcd's certificate is signed with"),
            (false, Some(_)) => refuse("is http, but a CA file is given: use https or leave the file out"),
            _ => Ok(()),
        }
    }

    fn tls(&self) -> Result<Option<TlsOptions>> {
        let Some(ca_file) = &self.ca_file else {
            let alone = self.cert_file.as_ref().map(|f| ("etcd cert file", f));
            return match alone.or(self.key_file.as_ref().map(|f| ("etcd key file", f))) {
                Some((option, file)) => Err(wrong(option, &file.display().to_string(), "needs a CA file and https")),
                None => Ok(None),
            };
        };
        let ca = read_pem("etcd CA file", ca_file, "CERTIFICATE-----")?;
        let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(ca));
        match (&self.cert_file, &self.key_file) {
            (Some(cert), Some(key)) => {
                let cert = read_pem("etcd cert file", cert, "CERTIFICATE-----")?;
                let key = read_pem("etcd key file", key, "PRIVATE KEY-----")?;
                tls = tls.identity(Identity::from_pem(cert, key));
            }
            (None, None) => {}
            (Some(cert), None) => return Err(wrong("etcd cert file", &cert.display().to_string(), "needs a key file")),
            (None, Some(key)) => return Err(wrong("etcd key file", &key.display().to_string(), "needs a cert file")),
        }
        if let Some(domain) = &self.domain {
            tls = tls.domain_name(domain);
        }
        Ok(Some(tls))
    }
}

impl fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdOptions")
            .field("endpoints", &self.endpoints)
            .field("username", &self.username)
            .field("ca_file", &self.ca_file)
            .finish_non_exhaustive()
    }
}

fn read_pem(option: &'static str, path: &Path, label: &str) -> Result<String> {
    let shown = path.display().to_string();
    let pem = std::fs::read(path).map_err(|error| wrong(option, &shown, &format!("cannot be read: {error}")))?;
    match String::from_utf8(pem) {
        Ok(pem) if pem.contains(label) => Ok(pem),
        _ => Err(wrong(option, &shown, &format!("holds no PEM block that ends in \"{label}\""))),
    }
}

pub(super) fn wrong(option: &'static str, value: &str, problem: &str) -> StoreError {
    StoreError::Options { option, value: value.to_owned(), problem: problem.to_owned() }
}
