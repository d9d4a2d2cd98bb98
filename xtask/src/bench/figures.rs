//! Figures beside their bars, as a table for people and as JSON for programs.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// Something measured, over what it is compared with.
#[derive(Clone, Debug)]
pub(crate) struct Figure {
    /// What was measured.
    pub(crate) name: String,
    /// None when it should have been measured and was not.
    pub(crate) measured: Option<Measured>,
    /// None when it is only shown.
    pub(crate) bar: Option<Bar>,
}

/// A value and its floor, from one run.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) value: f64,
    /// What the machine can do, or a peer does; 1 for what has a limit of its own.
    pub(crate) floor: f64,
    /// Of both.
    pub(crate) unit: String,
    /// What else there is to say about it.
    pub(crate) note: String,
}

/// What a ratio must reach.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bar {
    at: f64,
    /// What is wished for.
    stretch: Option<f64>,
    /// Less is better.
    below: bool,
}

impl Bar {
    /// At least `at` times the floor.
    pub(crate) const fn above(at: f64) -> Self {
        Self { at, stretch: None, below: false }
    }

    /// At most `at` times the floor.
    pub(crate) const fn below(at: f64) -> Self {
        Self { at, stretch: None, below: true }
    }

    /// The same, with a wish.
    pub(crate) const fn stretch(self, stretch: f64) -> Self {
        Self { stretch: Some(stretch), ..self }
    }

    fn reached(self, ratio: f64, at: f64) -> bool {
        if self.below { ratio <= at } else { ratio >= at }
    }
}

impl Figure {
    /// What was measured over its floor.
    fn ratio(&self) -> Option<f64> {
        self.measured.as_ref().map(|measured| measured.value / measured.floor)
    }

    /// Whether there is a bar and it was not reached, or nothing was measured.
    pub(crate) fn missed(&self) -> bool {
        let Some(bar) = self.bar else { return false };
        !self.ratio().is_some_and(|ratio| bar.reached(ratio, bar.at))
    }

    fn outcome(&self) -> &'static str {
        match (self.bar, self.ratio()) {
            (None, _) => "",
            (Some(_), None) => "NOT MEASURED",
            (Some(bar), Some(ratio)) => match bar.stretch {
                Some(stretch) if bar.reached(ratio, stretch) => "stretch",
                _ if bar.reached(ratio, bar.at) => "ok",
                _ => "MISSED",
            },
        }
    }
}

/// One line for each figure.
pub(crate) fn table(figures: &[Figure]) -> String {
    let head = ["", "measured", "floor", "unit", "ratio", "bar", "stretch", "", ""].map(str::to_owned);
    let rows: Vec<[String; 9]> = std::iter::once(head).chain(figures.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 9] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            // Numbers to the right, words to the left.
            let _ = if matches!(column, 1 | 2 | 4..=6) {
                write!(line, "{cell:>width$}  ")
            } else {
                write!(line, "{cell:<width$}  ")
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn row(figure: &Figure) -> [String; 9] {
    let measured = figure.measured.as_ref();
    let value = |value: fn(&Measured) -> f64| measured.map(|measured| number(value(measured))).unwrap_or_default();
    let text = |text: fn(&Measured) -> &String| measured.map(text).cloned().unwrap_or_default();
    let bar = figure.bar.map(|bar| format!("{} {}", if bar.below { "<=" } else { ">=" }, bar.at));
    let stretch = figure.bar.and_then(|bar| bar.stretch).map(|stretch| stretch.to_string());
    [
        figure.name.clone(),
        value(|measured| measured.value),
        value(|measured| measured.floor),
        text(|measured| &measured.unit),
        figure.ratio().map(|ratio| format!("{ratio:.3}")).unwrap_or_default(),
        bar.unwrap_or_default(),
        stretch.unwrap_or_default(),
        figure.outcome().to_owned(),
        text(|measured| &measured.note),
    ]
}

/// Three digits or more.
fn number(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// A list of objects; what is not there is null.
pub(crate) fn json(figures: &[Figure]) -> Value {
    let object = |figure: &Figure| {
        let measured = figure.measured.as_ref();
        json!({
            "name": figure.name,
            "measured": measured.map(|measured| measured.value),
            "floor": measured.map(|measured| measured.floor),
            "unit": measured.map(|measured| &measured.unit),
            "ratio": figure.ratio(),
            "bar": figure.bar.map(|bar| bar.at),
            "stretch": figure.bar.and_then(|bar| bar.stretch),
            "less_is_better": figure.bar.map(|bar| bar.below),
            "missed": figure.missed(),
        })
    };
    figures.iter().map(object).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(value: Option<f64>, bar: Option<Bar>) -> Figure {
        let measured = |value| Measured { value, floor: 10.0, unit: "GB/s".into(), note: String::new() };
        Figure { name: "a figure".into(), measured: value.map(measured), bar }
    }

    #[test]
    fn a_bar_is_missed_from_its_own_side_and_when_nothing_was_measured() {
        let above = Some(Bar::above(0.8).stretch(0.9));
        let below = Some(Bar::below(1.5).stretch(1.2));
        for (value, bar, outcome, missed) in [
            (Some(7.9), above, "MISSED", true),
            (Some(8.0), above, "ok", false),
            (Some(9.5), above, "stretch", false),
            (Some(15.1), below, "MISSED", true),
            (Some(15.0), below, "ok", false),
            (Some(3.0), below, "stretch", false),
            (None, below, "NOT MEASURED", true),
            (Some(1.0), None, "", false),
        ] {
            let figure = figure(value, bar);
            assert_eq!((figure.outcome(), figure.missed()), (outcome, missed), "{value:?} {bar:?}");
            assert_eq!(json(&[figure])[0]["missed"], missed);
        }
    }

    #[test]
    fn the_table_has_a_line_for_each_figure_under_its_columns() {
        let bar = Bar::above(0.8);
        let text = table(&[figure(Some(8.0), Some(bar)), figure(None, Some(bar))]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(lines[1], "a figure      8.00   10.0  GB/s  0.800  >= 0.8           ok");
        assert!(lines[2].ends_with("NOT MEASURED"));
        assert_eq!(lines[0].find("ratio"), lines[1].find("0.800"));
    }
}
