//! What computing takes at least, and what it took.

use std::ops::Add;

use sirocco_compute::Isa;

use crate::floors::{Memory, multiply_adds};

/// What the machine can do.
pub(crate) struct Floors {
    memory: Memory,
    threads: usize,
    /// Floating-point operations in a second, the most that was seen.
    flops: f64,
}

impl Floors {
    pub(crate) fn new(threads: usize) -> Self {
        Self { memory: Memory::new(), threads, flops: 0.0 }
    }

    /// Sees how fast the machine multiplies.
    pub(crate) fn multiply(&mut self) {
        self.flops = self.flops.max(multiply_adds(self.threads, Isa::best()));
    }

    /// Bytes read from memory in a second, now.
    pub(crate) fn read(&self) -> f64 {
        self.memory.read(self.threads, Isa::best())
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

/// Tokens, and how long they took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rate {
    pub(crate) tokens: usize,
    pub(crate) seconds: f64,
}

impl Rate {
    pub(crate) fn per_second(self) -> f64 {
        self.tokens as f64 / self.seconds
    }
}

impl Add for Rate {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { tokens: self.tokens + other.tokens, seconds: self.seconds + other.seconds }
    }
}

/// Steps that were timed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Run {
    rate: Rate,
    /// What each step had to do, and how many bytes per second were read from memory right before it: a virtual machine's
    /// bandwidth may be another a second later.
    steps: Vec<(Work, f64)>,
}

impl Run {
    /// Adds a step of `tokens` tokens that took `seconds`, where `read` bytes per second were read from memory right before it.
    pub(crate) fn push(&mut self, tokens: usize, seconds: f64, work: Work, read: f64) {
        self.rate = self.rate + Rate { tokens, seconds };
        self.steps.push((work, read));
    }

    /// All of them together.
    pub(crate) fn rate(&self) -> Rate {
        self.rate
    }

    /// Tokens per second at most: each step takes as long as reading or computing, whichever is longer.
    pub(crate) fn roofline(&self, floors: &Floors) -> f64 {
        let seconds = |(work, read): &(Work, f64)| (work.bytes / read).max(work.flops / floors.flops);
        self.rate.tokens as f64 / self.steps.iter().map(seconds).sum::<f64>()
    }
}
