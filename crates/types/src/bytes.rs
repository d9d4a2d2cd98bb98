//! Amounts of memory.

use std::fmt;

/// A number of bytes, shown in the unit a person would choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
        if self.0 < 1024 {
            return f.pad(&format!("{} B", self.0));
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        f.pad(&format!("{value:.1} {}", UNITS[unit]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_in_a_unit_a_person_would_choose() {
        let cases = [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (21_269_896, "20.3 MiB"), (5 << 40, "5.0 TiB")];
        for (count, text) in cases {
            assert_eq!(Bytes(count).to_string(), text);
        }
        assert_eq!(format!("{:>9}", Bytes(0)), "      0 B");
    }
}
