//! Logs to standard error: readable on a terminal, JSON otherwise. `RUST_LOG` chooses what is logged.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// What a server logs unless `RUST_LOG` says otherwise.
pub const SERVER: &str = "warn,sirocco=info,sirocco_coordinator=info,sirocco_expert_node=info,sirocco_router_node=info,\
                          sirocco_process=info,sirocco_store=info,sirocco_model=info";

/// What a command that a person waits for logs unless `RUST_LOG` says otherwise.
pub const COMMAND: &str = "warn";

/// Starts logging with `default` as the filter. Later calls change nothing.
pub fn init(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let result = if std::io::stderr().is_terminal() {
        builder.compact().try_init()
    } else {
        builder.json().flatten_event(true).try_init()
    };
    // A second call finds the first one's subscriber in place, which is as good.
    drop(result);
}
