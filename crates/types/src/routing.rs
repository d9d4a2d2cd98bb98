//! The gate's choice for a batch of tokens.

use crate::ExpertId;

/// Which experts each token goes to, and with what weight.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routing {
    /// Experts per token.
    pub top_k: usize,
    /// `[tokens, top_k]`, strongest first.
    pub experts: Vec<ExpertId>,
    /// `[tokens, top_k]`, what each expert's row is multiplied by when rows are combined.
    pub weights: Vec<f32>,
}

impl Routing {
    /// An empty routing for `top_k` experts per token.
    pub fn new(top_k: usize) -> Self {
        Self { top_k, experts: Vec::new(), weights: Vec::new() }
    }

    /// Number of tokens routed.
    pub fn tokens(&self) -> usize {
        self.experts.len().checked_div(self.top_k).unwrap_or(0)
    }

    /// The experts and weights of one token, strongest first.
    pub fn of(&self, token: usize) -> (&[ExpertId], &[f32]) {
        let range = token * self.top_k..(token + 1) * self.top_k;
        (&self.experts[range.clone()], &self.weights[range])
    }

    /// The slots (`token * top_k + rank`) of each expert, by ascending expert, slots ascending. Experts nobody chose are absent.
    pub fn by_expert(&self) -> Vec<(ExpertId, Vec<usize>)> {
        let mut pairs: Vec<(ExpertId, usize)> = self.experts.iter().copied().zip(0..).collect();
        pairs.sort_by_key(|&(expert, slot)| (expert, slot));
        let mut groups: Vec<(ExpertId, Vec<usize>)> = Vec::new();
        for (expert, slot) in pairs {
            match groups.last_mut() {
                Some((last, slots)) if *last == expert => slots.push(slot),
                _ => groups.push((expert, vec![slot])),
            }
        }
        groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_grouped_by_expert_in_token_order() {
        let routing = Routing { top_k: 2, experts: [3, 1, 1, 0, 3, 0].map(ExpertId).to_vec(), weights: vec![0.5; 6] };
        assert_eq!(
            routing.by_expert(),
            [(ExpertId(0), vec![3, 5]), (ExpertId(1), vec![1, 2]), (ExpertId(3), vec![0, 4])]
        );
        assert_eq!(routing.tokens(), 3);
    }
}
