//! End-to-end tests: real processes, a real etcd, real clients.
#![forbid(unsafe_code)]

mod callers;
mod chaos;
mod clients;
mod commands;
mod control;
mod goldens;
mod lifecycle;
mod metrics;
mod openai;
mod operations;
mod page;
mod parameters;
mod routers;
mod services;
mod storm;
mod support;
