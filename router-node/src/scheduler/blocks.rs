//! Who holds which block of the KV cache, and which blocks can be used again.
//!
//! A block that is full and computed is published: another sequence with the same tokens from its beginning on shares it, and
//! one that goes on differently within it takes a copy. Published blocks that nobody holds stay until their place is needed,
//! the longest unused first. They are found by their content itself, not by a hash of it, so no two can be taken for each other.
//! Pure: it knows tokens and numbers, never keys and values.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// A published prefix: the block that ends it and all before. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Prefix(u64);

impl Prefix {
    /// The beginning of every sequence.
    pub(super) const EMPTY: Self = Self(0);
}

/// Blocks by number, `0..count`.
#[derive(Debug)]
pub(super) struct Blocks {
    entries: Vec<Entry>,
    /// Blocks without a holder and without content.
    free: Vec<u32>,
    /// Published blocks by what they follow and what they contain.
    published: BTreeMap<(Prefix, Vec<u32>), u32>,
    /// Published blocks that nobody holds, in the order in which they are given up: what follows a block goes before it.
    idle: BTreeSet<(u64, Reverse<u32>, u32)>,
    clock: u64,
    prefixes: u64,
}

#[derive(Debug, Default)]
struct Entry {
    holders: u32,
    /// When it was last let go.
    used: u64,
    content: Option<Content>,
}

#[derive(Debug)]
struct Content {
    prefix: Prefix,
    /// Blocks before it in its sequence.
    depth: u32,
    key: (Prefix, Vec<u32>),
}

impl Blocks {
    pub(super) fn new(count: usize) -> Self {
        Self {
            entries: (0..count).map(|_| Entry::default()).collect(),
            free: (0..count as u32).rev().collect(),
            published: BTreeMap::new(),
            idle: BTreeSet::new(),
            clock: 0,
            prefixes: 0,
        }
    }

    /// Blocks in all.
    pub(super) fn count(&self) -> usize {
        self.entries.len()
    }

    /// Blocks that can be taken: without a holder, published or not.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Published blocks that nobody holds.
    pub(super) fn idle(&self) -> usize {
        self.idle.len()
    }

    /// A block without content, held once; none when all are held.
    pub(super) fn take(&mut self) -> Option<u32> {
        let block = self.free.pop().or_else(|| {
            let (_, _, block) = self.idle.pop_first()?;
            let content = self.entries[block as usize].content.take();
            self.published.remove(&content.expect("idle blocks are published").key);
            Some(block)
        })?;
        self.entries[block as usize].holders = 1;
        Some(block)
    }

    /// The published block that follows `after` with exactly `tokens`, and the prefix it ends.
    pub(super) fn find(&self, after: Prefix, tokens: &[u32]) -> Option<(u32, Prefix)> {
        let block = *self.published.get(&(after, tokens.to_vec()))?;
        Some((block, self.prefix_of(block)))
    }

    /// The published block that follows `after` and agrees with the most of `tokens`, and with how many.
    pub(super) fn find_part(&self, after: Prefix, tokens: &[u32]) -> Option<(u32, usize)> {
        let key = (after, tokens.to_vec());
        // Keys are in order, so the one that agrees the longest is next to where `tokens` would be.
        let neighbours = [self.published.range(..&key).next_back(), self.published.range(&key..).next()];
        let agreeing = |found: &[u32]| found.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let of_prefix = neighbours.into_iter().flatten().filter(|((prefix, _), _)| *prefix == after);
        let best = of_prefix.map(|((_, found), block)| (*block, agreeing(found))).max_by_key(|(_, len)| *len);
        best.filter(|(_, len)| *len > 0)
    }

    /// Makes `block` shared by one holder more.
    pub(super) fn hold(&mut self, block: u32) {
        let entry = &mut self.entries[block as usize];
        if entry.holders == 0 {
            let depth = entry.content.as_ref().map_or(0, |content| content.depth);
            self.idle.remove(&(entry.used, Reverse(depth), block));
        }
        entry.holders += 1;
    }

    /// Publishes the held `block`, which follows `after` as number `depth` of its sequence with `tokens`. Returns the block to go
    /// on with, which is another one when the same content was published already, and the prefix it ends.
    pub(super) fn publish(&mut self, block: u32, after: Prefix, depth: usize, tokens: &[u32]) -> (u32, Prefix) {
        let key = (after, tokens.to_vec());
        if let Some(&same) = self.published.get(&key) {
            self.hold(same);
            self.release([block]);
            return (same, self.prefix_of(same));
        }
        self.prefixes += 1;
        let prefix = Prefix(self.prefixes);
        self.published.insert(key.clone(), block);
        self.entries[block as usize].content = Some(Content { prefix, depth: depth as u32, key });
        (block, prefix)
    }

    /// Lets go of `blocks`, each of which was held.
    pub(super) fn release(&mut self, blocks: impl IntoIterator<Item = u32>) {
        self.clock += 1;
        for block in blocks {
            let entry = &mut self.entries[block as usize];
            entry.holders = entry.holders.checked_sub(1).expect("only what is held is let go");
            entry.used = self.clock;
            match (&entry.content, entry.holders) {
                (Some(content), 0) => drop(self.idle.insert((entry.used, Reverse(content.depth), block))),
                (None, 0) => self.free.push(block),
                _ => {}
            }
        }
    }

    fn prefix_of(&self, block: u32) -> Prefix {
        self.entries[block as usize].content.as_ref().map_or(Prefix::EMPTY, |content| content.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Publishes `tokens` in blocks of 2 and lets go; returns the blocks.
    fn leave(blocks: &mut Blocks, tokens: &[u32]) -> Vec<u32> {
        let mut after = Prefix::EMPTY;
        let mut table = Vec::new();
        for (depth, tokens) in tokens.chunks(2).enumerate() {
            let block = blocks.take().unwrap();
            let (block, prefix) = blocks.publish(block, after, depth, tokens);
            table.push(block);
            after = prefix;
        }
        blocks.release(table.iter().copied());
        table
    }

    #[test]
    fn a_block_is_found_by_all_that_is_before_it() {
        let mut blocks = Blocks::new(8);
        let table = leave(&mut blocks, &[1, 2, 3, 4]);
        let (first, prefix) = blocks.find(Prefix::EMPTY, &[1, 2]).unwrap();
        let (second, _) = blocks.find(prefix, &[3, 4]).unwrap();
        assert_eq!([first, second], table[..]);
        assert_eq!(blocks.find(Prefix::EMPTY, &[3, 4]), None, "the same tokens elsewhere are another content");
        assert_eq!(blocks.find(prefix, &[3, 5]), None);
    }

    #[test]
    fn the_longest_agreement_is_found_within_a_block() {
        let mut blocks = Blocks::new(8);
        let mut one = |tokens: &[u32]| {
            let block = blocks.take().unwrap();
            blocks.publish(block, Prefix::EMPTY, 0, tokens).0
        };
        let (a, b) = (one(&[1, 2, 3, 4]), one(&[1, 2, 8, 9]));
        let part = |tokens: &[u32]| blocks.find_part(Prefix::EMPTY, tokens);
        assert_eq!(part(&[1, 2, 3]), Some((a, 3)));
        assert_eq!(part(&[1, 2, 8, 1]), Some((b, 3)));
        assert_eq!(part(&[1, 2, 5]).unwrap().1, 2);
        assert_eq!(part(&[2]), None);
        assert_eq!(blocks.find_part(Prefix(7), &[1]), None);
    }

    #[test]
    fn the_longest_unused_goes_first_and_the_end_of_a_prefix_before_its_beginning() {
        let mut blocks = Blocks::new(4);
        let old = leave(&mut blocks, &[1, 2, 3, 4]);
        let new = leave(&mut blocks, &[5, 6]);
        assert_eq!((blocks.available(), blocks.idle()), (4, 3));
        let order: Vec<u32> = std::iter::from_fn(|| blocks.take()).skip(1).collect();
        assert_eq!(order, [old[1], old[0], new[0]]);
        assert_eq!(blocks.available(), 0);
        assert_eq!(blocks.find(Prefix::EMPTY, &[5, 6]), None);
    }

    #[test]
    fn what_is_held_again_is_not_given_up() {
        let mut blocks = Blocks::new(2);
        let table = leave(&mut blocks, &[1, 2, 3, 4]);
        blocks.hold(table[0]);
        blocks.hold(table[0]);
        assert_eq!(blocks.take(), Some(table[1]));
        assert_eq!(blocks.take(), None);
        blocks.release([table[0]]);
        assert_eq!(blocks.take(), None);
        blocks.release([table[0]]);
        assert_eq!(blocks.take(), Some(table[0]));
    }

    #[test]
    fn the_same_content_is_kept_once() {
        let mut blocks = Blocks::new(2);
        let (a, b) = (blocks.take().unwrap(), blocks.take().unwrap());
        let first = blocks.publish(a, Prefix::EMPTY, 0, &[1, 2]);
        assert_eq!(blocks.publish(b, Prefix::EMPTY, 0, &[1, 2]), first);
        assert_eq!((blocks.available(), blocks.idle()), (1, 0));
        blocks.release([a]);
        assert_eq!(blocks.idle(), 0, "it is still held by the second");
        blocks.release([a]);
        assert_eq!(blocks.idle(), 1);
    }
}
