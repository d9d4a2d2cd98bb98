//! Whether a step is computed in two batches, so that the attention of one hides the experts of the other.
//!
//! An expert reads all its weights for one row as for sixteen, so halves of a small batch would read them twice and gain nothing.

use sirocco_types::ModelSpec;

use crate::scheduler::Chunk;

/// Where to cut `chunks` in two: how many of them the first batch has, all when they are not cut. Each half then has at least
/// `least` rows for each expert on average; 0 cuts none.
pub(super) fn cut(chunks: &[Chunk], spec: &ModelSpec, least: usize) -> usize {
    let whole: usize = chunks.iter().map(|chunk| chunk.len).sum();
    let needed = (least * spec.num_local_experts).div_ceil(spec.num_experts_per_tok);
    if needed == 0 || whole < 2 * needed {
        return chunks.len();
    }
    let ends = chunks.iter().scan(0, |end, chunk| {
        *end += chunk.len;
        Some(*end)
    });
    let (index, smaller) = ends
        .enumerate()
        .map(|(index, end)| (index + 1, end.min(whole - end)))
        .max_by_key(|(_, smaller)| *smaller)
        .unwrap_or_default();
    if smaller < needed { chunks.len() } else { index }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::tests::spec;
    use crate::scheduler::SequenceId;

    /// With 8 experts of which each token has 2, 4 rows for each take 16 tokens.
    fn cut_of(lens: &[usize]) -> usize {
        let chunk =
            |(id, len): (usize, &usize)| Chunk { id: SequenceId(id as u64), start: 0, len: *len, samples: true };
        let chunks: Vec<Chunk> = lens.iter().enumerate().map(chunk).collect();
        cut(&chunks, &spec(), 4)
    }

    #[test]
    fn halves_are_alike_and_never_too_small() {
        assert_eq!(cut_of(&[16, 16]), 1);
        assert_eq!(cut_of(&[15, 16]), 2, "too few in all");
        assert_eq!(cut_of(&[40, 4, 4]), 3, "too few beside the longest");
        assert_eq!(cut_of(&[1; 32]), 16);
        assert_eq!(cut_of(&[1, 1, 30, 20]), 3);
        assert_eq!(cut_of(&[100]), 1, "a chunk is not cut");
        assert_eq!(cut_of(&[]), 0);
    }

    #[test]
    fn none_is_cut_when_that_is_wanted() {
        let chunk = Chunk { id: SequenceId(0), start: 0, len: 500, samples: true };
        assert_eq!(cut(&[chunk; 4], &spec(), 0), 4);
    }
}
