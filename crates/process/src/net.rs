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

/// The addresses at which other nodes reach a node's two listeners: on the host `advertised` (`HOST` or `HOST:PORT`, an IPv6
/// address in brackets, the port being that of gRPC), or where they listen.
///
/// Errors when gRPC listens on every address and nothing is advertised: other nodes could not know which one to use.
pub fn advertised(grpc: SocketAddr, http: SocketAddr, advertised: Option<&str>) -> Result<(String, String), BindError> {
    let Some(advertised) = advertised else {
        if grpc.ip().is_unspecified() {
            let problem = "it is no address others can use; say with --advertise at which host they reach this node";
            return Err(BindError { flag: "--grpc".into(), address: grpc, problem: problem.into() });
        }
        return Ok((grpc.to_string(), http.to_string()));
    };
    let (host, port) = match advertised.rsplit_once(':') {
        Some((host, port)) if port.parse::<u16>().is_ok() => (host, port.to_owned()),
        _ => (advertised, grpc.port().to_string()),
    };
    Ok((format!("{host}:{port}"), format!("{host}:{}", http.port())))
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
    #[test]
    fn others_are_told_the_advertised_host_with_the_right_ports() {
        let told = |grpc: &str, given| {
            advertised(grpc.parse().unwrap(), "0.0.0.0:7501".parse().unwrap(), given).map_err(|error| error.to_string())
        };
        let both = |grpc: &str, http: &str| Ok((grpc.to_owned(), http.to_owned()));
        assert_eq!(told("127.0.0.1:7500", None), both("127.0.0.1:7500", "0.0.0.0:7501"));
        assert_eq!(told("0.0.0.0:7500", Some("pod-7.svc")), both("pod-7.svc:7500", "pod-7.svc:7501"));
        assert_eq!(told("0.0.0.0:7500", Some("[::1]")), both("[::1]:7500", "[::1]:7501"));
        assert_eq!(told("0.0.0.0:7500", Some("lb:443")), both("lb:443", "lb:7501"));
        assert!(told("0.0.0.0:7500", None).unwrap_err().contains("--advertise"));
    }
}
