//! What computing takes at least, and what it took.

/// What the machine can do, the best that was seen.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Floors {
    /// Bytes read from memory in a second.
    read: f64,
    /// Floating-point operations in a second.
    flops: f64,
}

impl Floors {
    /// Keeps the higher rates.
    pub(crate) fn keep(&mut self, read: f64, flops: f64) {
        self.read = self.read.max(read);
        self.flops = self.flops.max(flops);
    }
}

/// What one step has to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    /// Bytes it reads: weights that are not an expert's, each expert that a token goes to, keys and values.
    pub(crate) bytes: f64,
    /// A multiply-add is two.
    pub(crate) flops: f64,
}

impl Work {
    /// Seconds it takes at least: for reading or for computing, whichever is longer.
    fn seconds(&self, floors: &Floors) -> f64 {
        (self.bytes / floors.read).max(self.flops / floors.flops)
    }
}

/// Steps that were timed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Run {
    pub(crate) tokens: usize,
    pub(crate) seconds: f64,
    pub(crate) steps: Vec<Work>,
}

impl Run {
    /// Tokens per second.
    pub(crate) fn rate(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    /// Tokens per second at most, by `floors`.
    pub(crate) fn roofline(&self, floors: &Floors) -> f64 {
        self.tokens as f64 / self.steps.iter().map(|step| step.seconds(floors)).sum::<f64>()
    }

    /// The one that came closest to its roofline.
    pub(crate) fn best<'a>(runs: &'a [Self], floors: &Floors) -> Option<&'a Self> {
        let share = |run: &Self| run.rate() / run.roofline(floors);
        runs.iter().max_by(|a, b| share(a).total_cmp(&share(b)))
    }
}
