//! What a node computes with: as it is asked for, and how a GPU fares.

use std::fmt;
use std::str::FromStr;

/// What a node computes with, as it is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The CPU.
    #[default]
    Cpu,
    /// The NVIDIA GPU of this number, from 0 on, as the driver counts them.
    Cuda(usize),
    /// The first NVIDIA GPU when it can be used, else the CPU.
    Auto,
}

impl DeviceChoice {
    /// The number of the GPU that is used or tried.
    pub fn ordinal(self) -> Option<usize> {
        match self {
            Self::Cpu => None,
            Self::Cuda(ordinal) => Some(ordinal),
            Self::Auto => Some(0),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Auto => f.write_str("auto"),
        }
    }
}

/// A device that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no device, must be cpu, cuda:0 (or another number) or auto")]
pub struct UnknownDevice(String);

impl FromStr for DeviceChoice {
    type Err = UnknownDevice;

    fn from_str(text: &str) -> Result<Self, UnknownDevice> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("cpu", _) => Ok(Self::Cpu),
            ("auto", _) => Ok(Self::Auto),
            (_, Some(Ok(ordinal))) => Ok(Self::Cuda(ordinal)),
            _ => Err(UnknownDevice(text.to_owned())),
        }
    }
}

/// How a GPU fares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GpuReadings {
    /// Share of time in which a kernel ran, 0 to 1.
    pub utilisation: f64,
    /// Memory in use, by whomever.
    pub memory_bytes: u64,
    /// All of its memory.
    pub memory_total_bytes: u64,
    /// Of the die.
    pub temperature_celsius: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_reads_as_it_is_written_and_what_is_none_is_named() {
        for (text, choice, ordinal) in [
            ("cpu", DeviceChoice::Cpu, None),
            ("auto", DeviceChoice::Auto, Some(0)),
            ("cuda:3", DeviceChoice::Cuda(3), Some(3)),
        ] {
            assert_eq!((text.parse(), choice.to_string().as_str()), (Ok(choice), text));
            assert_eq!(choice.ordinal(), ordinal);
        }
        for text in ["", "cuda", "cuda:", "cuda:-1", "gpu", "CPU", "cuda:0 "] {
            let error = text.parse::<DeviceChoice>().unwrap_err().to_string();
            assert_eq!(error, format!("{text:?} is no device, must be cpu, cuda:0 (or another number) or auto"));
        }
    }
}
