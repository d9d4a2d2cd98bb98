//! NVIDIA's runtime compiler, a shared library of its own: CUDA C++ to machine code, on any machine, with or without a GPU.
//!
//! Found by our own search and called by nine functions, because cudarc's loader takes no path and panics when the library is
//! missing: [`LIBRARIES`] on the loader's path, or the file that the caller names. Libraries of CUDA 12 come first: what they
//! compile, every driver that we support can load.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;

use libloading::Library;

use super::error::DeviceError;

/// Names that the loader is asked for, one after the other.
const LIBRARIES: [&str; 3] = ["libnvrtc.so.12", "libnvrtc.so", "libnvrtc.so.13"];

/// How to get the library.
const HINT: &str = "`pip install nvidia-cuda-nvrtc-cu12` brings it, or NVIDIA's CUDA toolkit; --nvrtc names the file";

/// A program under compilation, in the library's hands.
type Program = *mut c_void;

/// The compiler.
#[derive(Debug)]
pub(super) struct Compiler {
    library: Library,
}

impl Compiler {
    /// Loads the library `file`, or one that the loader finds.
    pub(super) fn open(file: Option<&Path>) -> Result<Self, DeviceError> {
        let missing = |problem: String| DeviceError::Library { library: "libnvrtc.so.12", problem };
        if let Some(file) = file {
            // SAFETY: the caller names NVIDIA's library, whose initialisers do nothing that a program could notice.
            let library = unsafe { Library::new(file) };
            return library.map(|library| Self { library }).map_err(|error| missing(error.to_string()));
        }
        // SAFETY: as above, under its own name.
        let library = LIBRARIES.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
        library
            .map(|library| Self { library })
            .ok_or_else(|| missing(format!("the loader knows none of {}; {HINT}", LIBRARIES.join(", "))))
    }

    /// Compiles `source`, which needs no header, to a cubin for `architecture`, for example `sm_90`.
    pub(super) fn compile(&self, source: &str, architecture: &str) -> Result<Vec<u8>, DeviceError> {
        let fail = |log: String| DeviceError::Compile { architecture: architecture.to_owned(), log };
        let options = options(architecture).map(|option| CString::new(option).expect("options have no zeros"));
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let source = CString::new(source).map_err(|error| fail(error.to_string()))?;
        let (name, mut program) = (c"sirocco.cu", std::ptr::null_mut());
        // SAFETY: the functions are declared as the library's header of CUDA 12 and 13 has them. Strings end with zero and
        // live until the calls return; `program` is created first and destroyed once; buffers have the sizes that the library
        // asked for.
        unsafe {
            let create: Function<
                unsafe extern "C" fn(
                    *mut Program,
                    *const c_char,
                    *const c_char,
                    c_int,
                    *const *const c_char,
                    *const *const c_char,
                ) -> c_int,
            > = self.function("nvrtcCreateProgram")?;
            let result =
                create(&raw mut program, source.as_ptr(), name.as_ptr(), 0, std::ptr::null(), std::ptr::null());
            if result != 0 {
                return Err(fail(self.message(result)?));
            }
            let compiled = self.compile_program(program, &options, &fail);
            let destroy: Function<unsafe extern "C" fn(*mut Program) -> c_int> =
                self.function("nvrtcDestroyProgram")?;
            destroy(&raw mut program);
            compiled
        }
    }

    /// # Safety
    /// `program` was created and not destroyed; `options` are strings that end with zero.
    unsafe fn compile_program(
        &self,
        program: Program,
        options: &[*const c_char],
        fail: &dyn Fn(String) -> DeviceError,
    ) -> Result<Vec<u8>, DeviceError> {
        // SAFETY: as in `compile`.
        unsafe {
            let compile: Function<unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int> =
                self.function("nvrtcCompileProgram")?;
            let count = c_int::try_from(options.len()).expect("there are three options");
            let result = compile(program, count, options.as_ptr());
            if result != 0 {
                let log = self.text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?;
                let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
                return Err(fail(format!("{}: {log}", self.message(result)?)));
            }
            self.text(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        }
    }

    /// What the function `get` writes, which is as long as `size` says.
    ///
    /// # Safety
    /// `program` was compiled; `size` and `get` are functions of the library that belong together.
    unsafe fn text(&self, program: Program, size: &str, get: &str) -> Result<Vec<u8>, DeviceError> {
        // SAFETY: as in `compile`.
        unsafe {
            let size: Function<unsafe extern "C" fn(Program, *mut usize) -> c_int> = self.function(size)?;
            let get: Function<unsafe extern "C" fn(Program, *mut c_char) -> c_int> = self.function(get)?;
            let mut len = 0;
            let mut result = size(program, &raw mut len);
            let mut bytes = vec![0_u8; len];
            if result == 0 {
                result = get(program, bytes.as_mut_ptr().cast());
            }
            if result != 0 {
                return Err(DeviceError::Compile { architecture: String::new(), log: self.message(result)? });
            }
            Ok(bytes)
        }
    }

    /// What the library calls `result`.
    fn message(&self, result: c_int) -> Result<String, DeviceError> {
        // SAFETY: the function is declared as in the header, and returns a string that is never freed.
        unsafe {
            let message: Function<unsafe extern "C" fn(c_int) -> *const c_char> =
                self.function("nvrtcGetErrorString")?;
            Ok(CStr::from_ptr(message(result)).to_string_lossy().into_owned())
        }
    }

    /// # Safety
    /// `F` is the function's type.
    unsafe fn function<F>(&self, name: &str) -> Result<Function<'_, F>, DeviceError> {
        // SAFETY: the caller vouches for the type.
        unsafe { self.library.get(name) }.map_err(|error| DeviceError::Library {
            library: "libnvrtc.so.12",
            problem: format!("it has no {name}: {error}; {HINT}"),
        })
    }
}

type Function<'a, F> = libloading::Symbol<'a, F>;

/// Multiplications and additions are fused only where the source says so.
pub(super) fn options(architecture: &str) -> [String; 3] {
    [format!("--gpu-architecture={architecture}"), "--std=c++17".into(), "--fmad=false".into()]
}
