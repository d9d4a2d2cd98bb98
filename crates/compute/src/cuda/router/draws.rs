//! What comes to a GPU with a wish for logits or for draws, in one copy, and what goes back. As `kernels/sampling.cu` has it.

use super::budget::STEP_ALIGNED;
use super::step::{Items, Writer};
use crate::cuda::plan::{ITEM, MANY_ROWS};
use crate::{Draw, Drawn, Report, TokenSet};

/// Words of how a row is drawn from, without its lists and sets.
const DRAW: usize = 18;

/// Bytes of what a row gives: words of [`HEAD`], then id and logit of each reported token.
pub(super) const DRAWN: usize = (HEAD + 2 * Draw::MOST_REPORTED) * 4;

/// Id, logit, largest, one without use, and the sum.
const HEAD: usize = 6;

/// Room for what is drawn from, bytes, when that of one row does not take more.
pub(super) const DRAWS_BYTES: usize = 4 << 20;

/// In the place of what there is not.
const NONE: u32 = u32::MAX;

/// Most bytes that come in with a wish: as many rows as are computed at once, their item, and how they are drawn from.
pub(super) fn ask_bytes(rows: usize, vocab: usize) -> usize {
    (rows * 4).next_multiple_of(STEP_ALIGNED)
        + ITEM.next_multiple_of(STEP_ALIGNED)
        + DRAWS_BYTES.max(most_of_a_row(vocab).next_multiple_of(STEP_ALIGNED))
}

/// Most bytes that say how a row is drawn from: two sets and two lists of all tokens.
pub(super) fn most_of_a_row(vocab: usize) -> usize {
    (DRAW + 2 * vocab.div_ceil(32) + 4 * vocab) * 4
}

/// A wish for the logits after some rows of a batch, or what is drawn from them. Places are addresses on the device.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    /// How many.
    pub(super) rows: usize,
    /// Which, u32.
    pub(super) at: u64,
    pub(super) items: Items,
    /// How they are drawn from.
    pub(super) draws: u64,
}

impl Ask {
    /// Writes to `bytes`, which will lie at `address`, a wish for as many of `rows` as there is room for how they are drawn from; where
    /// there are no `draws`, for all. With it comes how many bytes it takes.
    pub(super) fn write(rows: &[u32], draws: &[&Draw], vocab: usize, bytes: &mut [u8], address: u64) -> (Self, usize) {
        let room =
            bytes.len() / 4 - rows.len().next_multiple_of(STEP_ALIGNED / 4) - ITEM.next_multiple_of(STEP_ALIGNED) / 4;
        let mut taken = 0;
        let fits = |(draw, _): &(&&Draw, &u32)| {
            taken += words(draw, vocab);
            taken <= room
        };
        let fitting = draws.iter().zip(rows).take_while(fits).count();
        let rows = if draws.is_empty() { rows } else { &rows[..fitting] };
        assert!(!rows.is_empty(), "there is room for any row");
        let mut writer = Writer { bytes, at: 0 };
        let at = address + writer.words(rows.iter().copied());
        let items = Items::write(rows.len(), MANY_ROWS, &mut writer);
        let draws = address + write_draws(&draws[..fitting], vocab, &mut writer);
        (Self { rows: rows.len(), at, items: Items { at: address + items.at, ..items }, draws }, writer.at)
    }
}

/// Words that a draw takes.
fn words(draw: &Draw, vocab: usize) -> usize {
    let sets = [&draw.seen, &draw.allowed].into_iter().flatten().count();
    DRAW + sets * vocab.div_ceil(32) + 2 * (draw.generated.len() + draw.bias.len())
}

/// Where they begin.
fn write_draws(draws: &[&Draw], vocab: usize, writer: &mut Writer) -> u64 {
    let mut heads = Vec::with_capacity(draws.len() * DRAW);
    let mut tails: Vec<u32> = Vec::new();
    let start = draws.len() * DRAW;
    for draw in draws {
        let ids = draw.generated.iter().map(|(id, _)| id).chain(draw.bias.iter().map(|(id, _)| id));
        assert!(ids.copied().all(|id| (id as usize) < vocab), "tokens are in the vocabulary");
        assert!(draw.report.is_none_or(|count| count as usize <= Draw::MOST_REPORTED), "there is room for the report");
        let mut tail = |words: &mut dyn Iterator<Item = u32>| {
            let at = start + tails.len();
            tails.extend(words);
            at as u32
        };
        let mut set = |set: &Option<TokenSet>| {
            let Some(set) = set else { return NONE };
            tail(&mut set.words().iter().copied().chain(std::iter::repeat(0)).take(vocab.div_ceil(32)))
        };
        let (seen, allowed) = (set(&draw.seen), set(&draw.allowed));
        let generated = tail(&mut draw.generated.iter().flat_map(|(id, count)| [*id, *count]));
        let bias = tail(&mut draw.bias.iter().flat_map(|(id, bias)| [*id, bias.to_bits()]));
        let share = draw.share();
        heads.extend([draw.uniform as u32, (draw.uniform >> 32) as u32, share as u32, (share >> 32) as u32]);
        let penalties = [draw.repetition_penalty, draw.frequency_penalty, draw.presence_penalty];
        heads.extend([draw.temperature, draw.min_p].into_iter().chain(penalties).map(f32::to_bits));
        heads.extend([draw.top_k, draw.report.unwrap_or(NONE), seen, allowed, generated, draw.generated.len() as u32]);
        heads.extend([bias, draw.bias.len() as u32, 0]);
    }
    writer.words(heads.into_iter().chain(tails))
}

/// What a row gave of a vocabulary of `vocab` tokens.
pub(super) fn read(bytes: &[u8; DRAWN], draw: &Draw, vocab: usize) -> Option<Drawn> {
    let words = bytes.as_chunks::<4>().0;
    let word = |at: usize| u32::from_le_bytes(words[at]);
    let float = |at: usize| f32::from_bits(word(at));
    let id = Some(word(0)).filter(|id| *id != NONE)?;
    let report = draw.report.map(|count| Report {
        logit: float(1),
        largest: float(2),
        sum: u64::from(word(5)) << 32 | u64::from(word(4)),
        top: (0..vocab.min(count as usize)).map(|rank| HEAD + 2 * rank).map(|at| (word(at), float(at + 1))).collect(),
    });
    Some(Drawn { id, report })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;

    use super::*;
    use crate::cuda::emulator::{BASE, Emulator};
    use crate::sample;
    use crate::sampling::tests::{bits, rows};

    /// What the kernel draws from rows of one width.
    fn drawn(emulator: &mut Emulator, rows: &[(Vec<f32>, Draw)]) -> Vec<Option<Drawn>> {
        let width = rows[0].0.len();
        let draws: Vec<&Draw> = rows.iter().map(|(_, draw)| draw).collect();
        let mut bytes = vec![0; draws.iter().map(|draw| words(draw, width) * 4).sum::<usize>() + STEP_ALIGNED];
        write_draws(&draws, width, &mut Writer { bytes: &mut bytes, at: 0 });
        let floats = rows.len() * width * 4;
        let sizes = [floats, bytes.len(), floats, rows.len() * DRAWN];
        let mut places = [0; 4];
        for i in 1..4 {
            places[i] = (places[i - 1] + sizes[i - 1]).next_multiple_of(STEP_ALIGNED);
        }
        emulator.write(0, &vec![0xff; places[3] + sizes[3]]);
        let logits: Vec<u8> = rows.iter().flat_map(|(logits, _)| logits).flat_map(|x| x.to_le_bytes()).collect();
        emulator.write(places[0], &logits);
        emulator.write(places[1], &bytes);
        let [logits, draws, raws, out] = places.map(|place| BASE + place as u64);
        let arguments = [logits.into(), (width as u32).into(), draws.into(), raws.into(), out.into()];
        emulator.launch("sample", (rows.len(), 1), 0, &arguments);
        let out = emulator.read(places[3], sizes[3]);
        out.as_chunks().0.iter().zip(rows).map(|(bytes, (_, draw))| read(bytes, draw, width)).collect()
    }

    #[test]
    fn a_gpu_draws_what_the_cpu_draws() {
        let emulator = RefCell::new(Emulator::new(1 << 20));
        proptest!(ProptestConfig::with_cases(160), |(rows in rows(5000, 4))| {
            for ((logits, draw), got) in rows.iter().zip(drawn(&mut emulator.borrow_mut(), &rows)) {
                prop_assert_eq!(bits(got.as_ref()), bits(sample(&mut logits.clone(), draw).as_ref()), "{:?}", draw);
            }
        });
    }

    #[test]
    fn wishes_are_cut_where_there_is_no_room_for_more_and_any_row_fits() {
        let vocab = 100;
        let all = |value: u32| (0..vocab as u32).map(move |id| (id, value));
        let set = Some(TokenSet::none_of(vocab));
        let large = Draw {
            seen: set.clone(),
            allowed: set,
            generated: all(3).collect(),
            bias: all(0).map(|(id, _)| (id, 1.0)).collect(),
            ..Draw::default()
        };
        let small = Draw::default();
        assert_eq!(words(&large, vocab) * 4, most_of_a_row(vocab));
        let cut = |draws: &[&Draw]| {
            let mut bytes = vec![
                0;
                ask_bytes(draws.len(), vocab) - DRAWS_BYTES
                    + most_of_a_row(vocab).next_multiple_of(STEP_ALIGNED)
            ];
            let rows: Vec<u32> = (0..draws.len() as u32).collect();
            let (mut first, mut parts) = (0, Vec::new());
            while first < rows.len() {
                let (ask, taken) = Ask::write(&rows[first..], &draws[first..], vocab, &mut bytes, 4096);
                assert!(taken <= bytes.len());
                first += ask.rows;
                parts.push(ask.rows);
            }
            parts
        };
        assert_eq!(cut(&[&large; 3]), [1; 3]);
        assert_eq!(cut(&[&small, &small, &large, &small]), [2, 1, 1]);
        assert_eq!(cut(&[&small; 40]), [23, 17]);
    }
}
