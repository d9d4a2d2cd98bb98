//! What is measured of a fault, beside its bar.

use serde_json::json;

/// Something measured, over what it is compared with.
#[derive(Clone, Debug)]
pub(super) struct Figure {
    name: String,
    measured: f64,
    /// What it is compared with; 1 for what has a limit of its own.
    floor: f64,
    unit: &'static str,
    bar: Bar,
}

/// What the ratio must keep.
#[derive(Clone, Copy, Debug)]
enum Bar {
    AtMost { at: f64, stretch: Option<f64> },
    AtLeast(f64),
    Shown,
}

impl Figure {
    /// A value without a limit.
    pub(super) fn new(name: &str, measured: f64, unit: &'static str) -> Self {
        Self { name: name.to_owned(), measured, floor: 1.0, unit, bar: Bar::Shown }
    }

    /// The same over `floor`.
    pub(super) fn over(self, floor: f64) -> Self {
        Self { floor, ..self }
    }

    pub(super) fn at_most(self, at: f64) -> Self {
        Self { bar: Bar::AtMost { at, stretch: None }, ..self }
    }

    /// With a wish.
    pub(super) fn at_most_better(self, at: f64, stretch: f64) -> Self {
        Self { bar: Bar::AtMost { at, stretch: Some(stretch) }, ..self }
    }

    pub(super) fn at_least(self, at: f64) -> Self {
        Self { bar: Bar::AtLeast(at), ..self }
    }

    pub(super) fn missed(&self) -> bool {
        let ratio = self.measured / self.floor;
        // What is no number has reached nothing.
        match self.bar {
            Bar::AtMost { at, .. } => ratio.is_nan() || ratio > at,
            Bar::AtLeast(at) => ratio.is_nan() || ratio < at,
            Bar::Shown => false,
        }
    }

    /// A line for programs.
    pub(super) fn json(&self) -> String {
        let (bar, stretch, below) = match self.bar {
            Bar::AtMost { at, stretch } => (Some(at), stretch, true),
            Bar::AtLeast(at) => (Some(at), None, false),
            Bar::Shown => (None, None, false),
        };
        let Self { name, measured, floor, unit, .. } = self;
        json!({"name": name, "measured": measured, "floor": floor, "unit": unit, "bar": bar, "stretch": stretch,
               "less_is_better": below})
        .to_string()
    }
}

/// Figures, each printed as it comes.
#[derive(Default)]
pub(super) struct Table {
    missed: Vec<String>,
}

impl Table {
    pub(super) fn add(&mut self, figures: Vec<Figure>) {
        for figure in figures {
            let line = figure.json();
            println!("{line}");
            self.missed.extend(figure.missed().then_some(line));
        }
    }

    /// Panics when a bar was missed.
    pub(super) fn all_kept(self) {
        assert_eq!(self.missed, Vec::<String>::new());
    }
}
