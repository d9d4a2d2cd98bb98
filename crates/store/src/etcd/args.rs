//! The flags with which every program is told where etcd is.

use std::path::PathBuf;
use std::time::Duration;

use super::EtcdOptions;

/// Flags for [`EtcdOptions`].
#[derive(Clone, Debug, clap::Args)]
pub struct EtcdArgs {
    /// etcd endpoints as URLs, with commas between
    #[arg(
        long,
        env = "SIROCCO_ETCD",
        value_name = "URL",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:2379"
    )]
    pub etcd: Vec<String>,
    /// etcd user
    #[arg(long, env = "SIROCCO_ETCD_USER", value_name = "NAME")]
    pub etcd_user: Option<String>,
    /// Password of the etcd user
    #[arg(long, env = "SIROCCO_ETCD_PASSWORD", value_name = "PASSWORD", hide_env_values = true)]
    pub etcd_password: Option<String>,
    /// Authority that signed etcd's certificate, PEM; needed for https
    #[arg(long, env = "SIROCCO_ETCD_CA", value_name = "FILE")]
    pub etcd_ca: Option<PathBuf>,
    /// Certificate to show to etcd, PEM
    #[arg(long, env = "SIROCCO_ETCD_CERT", value_name = "FILE")]
    pub etcd_cert: Option<PathBuf>,
    /// Private key of --etcd-cert, PEM
    #[arg(long, env = "SIROCCO_ETCD_KEY", value_name = "FILE")]
    pub etcd_key: Option<PathBuf>,
    /// Name in etcd's certificate when it is not the endpoint's host
    #[arg(long, env = "SIROCCO_ETCD_DOMAIN", value_name = "NAME")]
    pub etcd_domain: Option<String>,
    /// Longest wait for one answer of etcd, in milliseconds
    #[arg(long, env = "SIROCCO_ETCD_TIMEOUT_MS", value_name = "MS", default_value_t = 2000)]
    pub etcd_timeout_ms: u64,
}

impl From<EtcdArgs> for EtcdOptions {
    fn from(args: EtcdArgs) -> Self {
        Self {
            endpoints: args.etcd,
            timeout: Duration::from_millis(args.etcd_timeout_ms),
            connect_timeout: None,
            username: args.etcd_user,
            password: args.etcd_password,
            ca_file: args.etcd_ca,
            cert_file: args.etcd_cert,
            key_file: args.etcd_key,
            domain: args.etcd_domain,
        }
    }
}
