//! The gate: which experts each token goes to.

use sirocco_types::{ExpertId, Routing};

use crate::softmax;

/// Chooses each token's experts.
///
/// `logits`: [tokens, experts] f32. Returns ids and weights, both [tokens, top_k], best first; weights sum to 1. Ties go to
/// the lowest expert. Source: Mixtral of Experts, arXiv 2401.04088, section 2.1.
pub(crate) fn route(mut logits: Vec<f32>, experts: usize, top_k: usize) -> Routing {
    let mut routing = Routing::new(top_k);
    let mut order: Vec<u32> = Vec::with_capacity(experts);
    for token in logits.chunks_exact_mut(experts) {
        softmax(token);
        order.clear();
        order.extend(0..experts as u32);
        order.sort_by(|a, b| token[*b as usize].total_cmp(&token[*a as usize]));
        let chosen = &order[..top_k];
        let sum: f32 = chosen.iter().map(|e| token[*e as usize]).sum();
        routing.experts.extend(chosen.iter().copied().map(ExpertId));
        routing.weights.extend(chosen.iter().map(|e| token[*e as usize] / sum));
    }
    routing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strongest_experts_are_chosen_and_ties_go_to_the_lowest() {
        let routing = route(vec![0.0, 2.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0], 4, 2);
        assert_eq!(routing.experts, [1, 3, 0, 1].map(ExpertId));
        assert_eq!(routing.weights, [0.5; 4]);
    }
}
