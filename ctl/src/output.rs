//! How answers are printed: a table for people, JSON or YAML for programs.

use std::io::{IsTerminal as _, Write as _};

use anyhow::Result;
use comfy_table::{Attribute, Cell, ContentArrangement, Table, presets};
use serde::Serialize;

/// What `-o` chooses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// A table with the columns that matter most.
    #[default]
    Table,
    /// A table with every column.
    Wide,
    /// One JSON document.
    Json,
    /// One YAML document.
    Yaml,
}

/// A column: its title and whether only `wide` shows it.
pub(crate) struct Column {
    title: &'static str,
    wide: bool,
}

/// A column that every table shows.
pub(crate) const fn column(title: &'static str) -> Column {
    Column { title, wide: false }
}

/// A column that only `-o wide` shows.
pub(crate) const fn wide(title: &'static str) -> Column {
    Column { title, wide: true }
}

/// `items`: as they are for programs, through `row` (one text per column) for people.
pub(crate) fn list<T: Serialize>(
    format: Format,
    columns: &[Column],
    items: &[T],
    row: impl Fn(&T) -> Vec<String>,
) -> Result<String> {
    one(format, &items, || {
        let rows: Vec<Vec<String>> = items.iter().map(row).collect();
        table(columns, &rows, format == Format::Wide)
    })
}

/// `item`: as it is for programs, as `text` for people.
pub(crate) fn one<T: Serialize>(format: Format, item: &T, text: impl FnOnce() -> String) -> Result<String> {
    Ok(match format {
        Format::Table | Format::Wide => text(),
        Format::Json => serde_json::to_string_pretty(item)?,
        Format::Yaml => serde_saphyr::to_string(item)?.trim_end().to_owned(),
    })
}

/// Prints a text and a line's end. A reader that has gone (`| head`) is no failure.
pub(crate) fn print(text: &str) -> Result<()> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// A table with `columns`, those marked wide only when `all`.
pub(crate) fn table(columns: &[Column], rows: &[Vec<String>], all: bool) -> String {
    let shown = |index: &usize| all || !columns[*index].wide;
    let indices: Vec<usize> = (0..columns.len()).filter(shown).collect();
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if std::io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    table
        .set_header(indices.iter().map(|&i| Cell::new(columns[i].title.to_uppercase()).add_attribute(Attribute::Bold)));
    for row in rows {
        table.add_row(indices.iter().map(|&i| row[i].as_str()));
    }
    table.trim_fmt()
}

/// `names` with commas between, or a dash when there are none.
pub(crate) fn names(names: &[String]) -> String {
    if names.is_empty() { "-".to_owned() } else { names.join(", ") }
}

/// A count with its noun.
pub(crate) fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// How uneven a load is: 1 is perfect, and 0 says that it is not known.
pub(crate) fn imbalance(value: f64) -> String {
    if value > 0.0 { format!("{value:.2}") } else { "-".to_owned() }
}

/// A rate: to a tenth while it is small.
pub(crate) fn rate(value: f64) -> String {
    if value < 99.95 { format!("{value:.1}") } else { format!("{value:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_columns_show_only_when_asked_for() {
        let columns = [column("id"), wide("zone")];
        let rows = [vec!["expert-0".into(), "eu-1".into()]];
        assert!(!table(&columns, &rows, false).contains("eu-1"));
        assert!(table(&columns, &rows, true).contains("eu-1"));
    }
}
