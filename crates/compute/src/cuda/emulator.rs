//! The kernels' own source, run lane by lane on the CPU: `kernels/emulated.cpp`, which stands in for a GPU in tests.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{BufWriter, Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use super::kernels::SOURCE;
use super::launch::Argument;

/// Where its memory begins; no pointer of this process.
pub(super) const BASE: u64 = 0x7000_0000_0000;

/// A device of some memory, zero at first.
#[derive(Debug)]
pub(super) struct Emulator {
    child: Child,
    input: Option<BufWriter<ChildStdin>>,
    output: ChildStdout,
    bytes: usize,
}

impl Emulator {
    pub(super) fn new(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(16);
        let mut child =
            Command::new(program()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it was compiled");
        let input = child.stdin.take().map(BufWriter::new);
        let output = child.stdout.take().unwrap();
        let mut emulator = Self { child, input, output, bytes };
        emulator.send(&[BASE, bytes as u64].map(u64::to_le_bytes).concat());
        emulator
    }

    pub(super) fn write(&mut self, at: usize, bytes: &[u8]) {
        self.name(b'w', at, bytes.len());
        self.send(bytes);
    }

    pub(super) fn read(&mut self, at: usize, bytes: usize) -> Vec<u8> {
        self.name(b'r', at, bytes);
        self.input.as_mut().unwrap().flush().unwrap();
        let mut read = vec![0; bytes];
        self.output.read_exact(&mut read).expect("the emulator goes on");
        read
    }

    /// Runs a kernel that asks for `shared` bytes of shared memory.
    pub(super) fn launch(&mut self, kernel: &str, grid: (usize, usize), shared: usize, arguments: &[Argument]) {
        let head = [grid.0, grid.1, shared, kernel.len(), arguments.len()];
        self.send(b"l");
        self.send(&head.map(|number| (number as u32).to_le_bytes()).concat());
        self.send(kernel.as_bytes());
        self.send(&arguments.iter().flat_map(|argument| argument.bytes()).collect::<Vec<_>>());
    }

    fn name(&mut self, what: u8, at: usize, bytes: usize) {
        assert!(at + bytes <= self.bytes, "{bytes} bytes from {at} on, of {}", self.bytes);
        self.send(&[what]);
        self.send(&[BASE + at as u64, bytes as u64].map(u64::to_le_bytes).concat());
    }

    fn send(&mut self, bytes: &[u8]) {
        self.input.as_mut().unwrap().write_all(bytes).expect("the emulator goes on");
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // It ends where its input does.
        drop(self.input.take());
        let status = self.child.wait().unwrap();
        assert!(status.success() || std::thread::panicking(), "the emulator ended with {status}");
    }
}

/// The program, compiled beside this test's, once for each of its sources, by the C++ compiler that `SIROCCO_CXX_BIN` names, else by
/// `c++`.
fn program() -> &'static PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let mut hasher = DefaultHasher::new();
        (SOURCE, include_str!("kernels/emulated.cpp"), FLAGS).hash(&mut hasher);
        let own = std::env::current_exe().unwrap();
        let out = own.with_file_name(format!("sirocco-emulated-{:016x}", hasher.finish()));
        if !out.is_file() {
            let new = out.with_extension(format!("{}.new", std::process::id()));
            let compiler = std::env::var_os("SIROCCO_CXX_BIN").map_or_else(|| "c++".into(), PathBuf::from);
            let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/cuda/kernels/emulated.cpp");
            let mut command = Command::new(&compiler);
            let status = command.args(FLAGS).arg(&source).arg("-o").arg(&new).status().unwrap_or_else(|error| {
                panic!("{}: {error}; a C++ compiler is needed, or SIROCCO_CXX_BIN names one", compiler.display())
            });
            assert!(status.success(), "{} ended with {status}", compiler.display());
            std::fs::rename(&new, &out).unwrap();
        }
        out
    })
}

/// Multiplications and additions are fused only where the source says so, as NVRTC is told too.
const FLAGS: [&str; 7] =
    ["-std=c++17", "-O2", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-Werror"];
