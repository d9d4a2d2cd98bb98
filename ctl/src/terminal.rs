//! What is known of the terminal: whether there is one, how large it is, what may be drawn on it.

use std::io::IsTerminal as _;

use rustix::termios::tcgetwinsize;

/// What shades and bars are drawn with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Paint {
    /// ASCII, for files, pipes and whoever sets `NO_COLOR`.
    Plain,
    /// Blocks in colours, for terminals.
    Blocks,
}

impl Paint {
    /// What suits standard output.
    pub(crate) fn here() -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if std::io::stdout().is_terminal() && !unwanted { Self::Blocks } else { Self::Plain }
    }

    /// A bar of `width` characters, filled up to `share` (from 0 to 1).
    pub(crate) fn bar(self, share: f64, width: usize) -> String {
        let (full, empty) = match self {
            Self::Plain => ('#', '.'),
            Self::Blocks => ('█', '░'),
        };
        let filled = (share.clamp(0.0, 1.0) * width as f64).round() as usize;
        std::iter::repeat_n(full, filled).chain(std::iter::repeat_n(empty, width - filled)).collect()
    }
}

/// Columns of a line; none when standard output is no terminal.
pub(crate) fn width() -> Option<usize> {
    size().map(|(columns, _)| columns)
}

/// Lines of a screen; none when standard output is no terminal.
pub(crate) fn height() -> Option<usize> {
    size().map(|(_, rows)| rows)
}

/// Columns and rows of the terminal that standard output is; none when it is none or does not know its size.
fn size() -> Option<(usize, usize)> {
    let size = tcgetwinsize(std::io::stdout()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col.into(), size.ws_row.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_share_and_never_longer_than_told() {
        let cases = [(0.0, "...."), (0.5, "##.."), (1.0, "####"), (7.0, "####"), (f64::NAN, "....")];
        for (share, text) in cases {
            assert_eq!(Paint::Plain.bar(share, 4), text, "{share}");
        }
        assert_eq!(Paint::Blocks.bar(0.25, 4), "█░░░");
    }
}
