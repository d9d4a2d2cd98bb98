//! Real processes of the programs under test: their output kept, their end awaited, none left behind.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use tempfile::TempDir;

use crate::{PATIENCE, wait_at_most, wait_for};

/// A running program; killed and reaped when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    output: TempDir,
}

/// The path of a program of this workspace, as built for the tests.
pub fn program(name: &str) -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let folder = test.parent().and_then(Path::parent).context("tests run from target/<profile>/deps")?;
    let path = folder.join(name);
    if !path.is_file() {
        bail!("{} is not built; run `cargo build --workspace --bins`", path.display());
    }
    Ok(path)
}

impl Process {
    /// Starts `program`, one of this workspace, with `args` and environment `envs`.
    pub fn start(program: &str, args: &[&str], envs: &[(&str, &str)]) -> Result<Self> {
        Self::start_at(&self::program(program)?, args, envs)
    }

    /// Starts the program at `path`, or of that name on the path.
    pub fn start_at(path: &Path, args: &[&str], envs: &[(&str, &str)]) -> Result<Self> {
        let output = tempfile::tempdir()?;
        let file = |name: &str| File::create(output.path().join(name));
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut command = Command::new(path);
        // Settings of whoever runs the tests are not the tests'.
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"SIROCCO_") || name == "RUST_LOG" {
                command.env_remove(name);
            }
        }
        let child = command
            .args(args)
            .envs(envs.iter().copied())
            .stdin(Stdio::null())
            .stdout(file("stdout")?)
            .stderr(file("stderr")?)
            .spawn()
            .with_context(|| format!("cannot start {}", path.display()))?;
        Ok(Self { name, child, output })
    }

    /// Memory it has in use, in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("it has ended")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib * 1024)
    }

    /// Everything it has written to standard output.
    pub fn stdout(&self) -> String {
        self.read("stdout")
    }

    /// Everything it has written to standard error.
    pub fn stderr(&self) -> String {
        self.read("stderr")
    }

    /// Waits for a line of its standard output that starts with `start`.
    pub fn wait_for_line(&mut self, start: &str) -> Result<String> {
        let (name, output) = (self.name.clone(), self.output.path().join("stdout"));
        let child = &mut self.child;
        let found = wait_for(&format!("{name} to print {start:?}"), || {
            // Read after looking for its end, so that its last words count.
            let ended = child.try_wait()?;
            let text = std::fs::read_to_string(&output)?;
            let whole = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
            let line = whole.into_iter().find(|line| line.starts_with(start)).map(str::to_owned);
            match (line, ended) {
                (None, Some(status)) => bail!("{name} ended ({status}) before it printed {start:?}"),
                (line, _) => Ok(line),
            }
        });
        found.with_context(|| format!("standard error of {}:\n{}", self.name, self.stderr()))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.pid()?, signal)?)
    }

    /// Has the system give it no more memory than it has now and `bytes` more.
    pub fn limit_memory(&self, bytes: u64) -> Result<()> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).context("it has ended")?;
        let size = size.trim().trim_end_matches(" kB").parse::<u64>()? * 1024;
        let limit = Rlimit { current: Some(size + bytes), maximum: Some(size + bytes) };
        prlimit(Some(self.pid()?), Resource::As, limit)?;
        Ok(())
    }

    fn pid(&self) -> Result<Pid> {
        Pid::from_raw(self.child.id().cast_signed()).context("a process has an id")
    }

    /// Kills it at once, as `kill -9` does, and reaps it.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.wait_at_most(PATIENCE)
    }

    /// Waits for its end as long as `patience`.
    pub fn wait_at_most(&mut self, patience: Duration) -> Result<ExitStatus> {
        let child = &mut self.child;
        wait_at_most(patience, &format!("{} to end", self.name), || Ok(child.try_wait()?))
    }

    fn read(&self, name: &str) -> String {
        // Output that is not UTF-8 or has gone missing shows up in the test that looks for it.
        std::fs::read(self.output.path().join(name))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill and the wait reaps it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
