//! Listeners whose failure to open says what to do.

use std::io::ErrorKind;
use std::net::SocketAddr;

use tokio::net::TcpListener;

/// A listener that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("{flag} {address}: {problem}")]
pub struct BindError {
    flag: String,
    address: SocketAddr,
    problem: String,
}

/// Listens on `address`, which the user gave with `flag`.
pub async fn bind(flag: &str, address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|error| {
        let problem = match error.kind() {
            ErrorKind::AddrInUse => {
                "the port is in use by another process; choose another, or 0 for any free one".to_owned()
            }
            ErrorKind::AddrNotAvailable => "this machine has no such address".to_owned(),
            ErrorKind::PermissionDenied => "not permitted; ports below 1024 need privileges".to_owned(),
            _ => error.to_string(),
        };
        BindError { flag: flag.to_owned(), address, problem }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_in_use_is_named_with_its_flag() {
        let first = bind("--grpc", "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = first.local_addr().unwrap();
        let error = bind("--grpc", address).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("--grpc {address}: the port is in use")), "{error}");
    }
}
