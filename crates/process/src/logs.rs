//! Logs to standard error: readable on a terminal, JSON otherwise. `RUST_LOG` chooses what is logged.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// What a server logs unless `RUST_LOG` says otherwise.
pub const SERVER: &str = "warn,sirocco=info,sirocco_coordinator=info,sirocco_expert_node=info,sirocco_router_node=info,\
                          sirocco_process=info,sirocco_store=info,sirocco_model=info";

/// What a command that a person waits for logs unless `RUST_LOG` says otherwise.
pub const COMMAND: &str = "warn";

/// Starts logging with `default` as the filter. Later calls change nothing. A `RUST_LOG` that is no filter is logged and ignored.
pub fn init(default: &str) {
    let wanted = std::env::var(EnvFilter::DEFAULT_ENV).ok().map(EnvFilter::try_new).transpose();
    let (filter, problem) = match wanted {
        Ok(wanted) => (wanted.unwrap_or_else(|| EnvFilter::new(default)), None),
        Err(problem) => (EnvFilter::new(default), Some(problem)),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let result = if std::io::stderr().is_terminal() {
        builder.compact().try_init()
    } else {
        builder.json().flatten_event(true).try_init()
    };
    // A second call finds the first one's subscriber in place, which is as good.
    drop(result);
    if let Some(problem) = problem {
        tracing::warn!(%problem, "RUST_LOG is ignored; it must be a filter such as info,sirocco_store=debug");
    }
}
