use std::collections::HashMap;

use proptest::prelude::*;
use sirocco_types::Priority;

use super::*;

const LIMITS: Limits = Limits { sequences: 4, step_tokens: 8, kv_blocks: 16, block_tokens: 4 };

fn chunk(id: u64, start: usize, len: usize, samples: bool) -> Chunk {
    Chunk { id: SequenceId(id), start, len, samples }
}

fn flow(client: u64) -> Flow {
    Flow { client: ClientId(client), priority: Priority::Normal }
}

/// Tokens that no other sequence has.
fn own(id: u64, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| id as u32 * 1000 + i).collect()
}

fn submit(scheduler: &mut Scheduler, id: u64, client: u64, tokens: Vec<u32>, max_new: usize) -> Result<(), TooLarge> {
    scheduler.submit(Submission { id: SequenceId(id), flow: flow(client), tokens, max_new, reuse: true })
}

/// Schedules a step, computes it, and lets every sequence that samples grow.
fn step(scheduler: &mut Scheduler) -> Step {
    let step = scheduler.schedule();
    scheduler.finish(&step);
    for chunk in step.chunks.iter().filter(|chunk| chunk.samples) {
        let token = 500 + scheduler.tokens(chunk.id).len() as u32;
        scheduler.grew(chunk.id, token);
    }
    step
}

#[test]
fn a_long_prompt_is_computed_in_chunks_beside_decoding() {
    let mut scheduler = Scheduler::new(LIMITS);
    submit(&mut scheduler, 1, 0, own(1, 3), 5).unwrap();
    submit(&mut scheduler, 2, 0, own(2, 10), 5).unwrap();
    assert_eq!(step(&mut scheduler).chunks, [chunk(1, 0, 3, true), chunk(2, 0, 5, false)]);
    assert_eq!(step(&mut scheduler).chunks, [chunk(1, 3, 1, true), chunk(2, 5, 5, true)]);
    scheduler.remove(SequenceId(1));
    assert_eq!(step(&mut scheduler).chunks, [chunk(2, 10, 1, true)]);
}

#[test]
fn what_can_never_fit_is_refused() {
    let refusal = submit(&mut Scheduler::new(LIMITS), 0, 0, own(0, 60), 5).unwrap_err().to_string();
    assert_eq!(refusal, "the request may need 65 tokens of KV cache, the router has 64");
}

#[test]
fn a_prefix_is_computed_once_and_a_last_token_always() {
    let mut scheduler = Scheduler::new(LIMITS);
    let tokens = own(1, 8);
    for id in 1..=3 {
        submit(&mut scheduler, id, 0, tokens.clone(), 5).unwrap();
    }
    assert_eq!(step(&mut scheduler).chunks, [chunk(1, 0, 8, true)], "the others wait for what it computes");
    let second = step(&mut scheduler);
    assert_eq!(second.chunks, [chunk(1, 8, 1, true), chunk(2, 4, 4, true), chunk(3, 4, 3, false)]);
    let tables: Vec<&[u32]> = (1..=3).map(|id| scheduler.table(SequenceId(id))).collect();
    assert!(tables.iter().all(|table| table[0] == tables[0][0]), "{tables:?}");
}

#[test]
fn what_is_left_in_the_cache_is_found_and_a_block_is_copied_where_it_ends() {
    let mut scheduler = Scheduler::new(LIMITS);
    submit(&mut scheduler, 1, 0, own(1, 8), 5).unwrap();
    step(&mut scheduler);
    scheduler.remove(SequenceId(1));
    assert_eq!(scheduler.counts().blocks_cached, 2);

    submit(&mut scheduler, 2, 0, own(1, 8), 5).unwrap();
    let again = step(&mut scheduler);
    assert_eq!(again.chunks, [chunk(2, 7, 1, true)]);
    let [(from, to)] = again.copies[..] else { panic!("{again:?}") };
    assert_ne!(from, to);
    assert_eq!((scheduler.found(SequenceId(2)), scheduler.counts().prefix_found), (7, 7));

    let mut longer = own(1, 6);
    longer.extend(own(9, 3));
    submit(&mut scheduler, 3, 0, longer, 5).unwrap();
    assert_eq!(step(&mut scheduler).chunks, [chunk(2, 8, 1, true), chunk(3, 6, 3, true)]);
}

#[test]
fn what_must_not_be_reused_is_computed_whole() {
    let mut scheduler = Scheduler::new(LIMITS);
    for id in 1..=2 {
        let tokens = own(1, 4);
        scheduler.submit(Submission { id: SequenceId(id), flow: flow(0), tokens, max_new: 1, reuse: false }).unwrap();
    }
    assert_eq!(step(&mut scheduler).chunks, [chunk(1, 0, 4, true), chunk(2, 0, 4, true)]);
}

#[test]
fn who_was_admitted_last_gives_its_blocks_back_and_comes_again() {
    let mut scheduler = Scheduler::new(Limits { kv_blocks: 6, ..LIMITS });
    submit(&mut scheduler, 1, 0, own(1, 7), 16).unwrap();
    submit(&mut scheduler, 2, 0, own(2, 4), 16).unwrap();
    while scheduler.counts().preemptions == 0 {
        assert!(!step(&mut scheduler).chunks.is_empty());
    }
    assert_eq!((scheduler.running.as_slice(), scheduler.counts().waiting), (&[SequenceId(1)][..], 1));
    while scheduler.tokens(SequenceId(1)).len() < 23 {
        let step = step(&mut scheduler);
        assert!(step.chunks.iter().any(|chunk| chunk.id == SequenceId(1)), "the senior is never held up");
    }
    scheduler.remove(SequenceId(1));
    assert_eq!(step(&mut scheduler).chunks[0].id, SequenceId(2));
}

#[test]
fn a_client_that_comes_late_does_not_wait_for_another_ones_many() {
    let mut scheduler = Scheduler::new(LIMITS);
    for id in 0..8 {
        submit(&mut scheduler, id, 1, own(id, 2), 8).unwrap();
    }
    step(&mut scheduler);
    submit(&mut scheduler, 8, 2, own(8, 2), 8).unwrap();
    assert!(step(&mut scheduler).chunks.iter().any(|chunk| chunk.id == SequenceId(8)));
    assert_eq!(scheduler.counts().preemptions, 1);
    submit(&mut scheduler, 9, 2, own(9, 2), 8).unwrap();
    assert!(step(&mut scheduler).chunks.iter().all(|chunk| chunk.id != SequenceId(9)), "it has a place now");
}

#[test]
fn a_short_prompt_passes_another_clients_long_one() {
    let mut scheduler = Scheduler::new(LIMITS);
    submit(&mut scheduler, 1, 1, own(1, 40), 8).unwrap();
    step(&mut scheduler);
    submit(&mut scheduler, 2, 1, own(2, 4), 8).unwrap();
    submit(&mut scheduler, 3, 2, own(3, 4), 8).unwrap();
    step(&mut scheduler);
    let next = step(&mut scheduler).chunks;
    assert_eq!(next[0], chunk(3, 0, 4, true), "{next:?}");
    assert!(next.iter().all(|chunk| chunk.id != SequenceId(2)), "the same client's waits: {next:?}");
}

/// What proptest asks for: who, from which tokens on, how long, how much more, how urgent, and when it leaves by itself.
#[derive(Clone, Debug)]
struct Asked {
    client: u64,
    priority: Priority,
    /// How many tokens it has in common with all others that have as many.
    common: usize,
    own: usize,
    new: usize,
    reuse: bool,
    arrives: usize,
    /// Leaves after so many steps from its arrival.
    leaves: Option<usize>,
}

fn asked() -> impl Strategy<Value = Asked> {
    let priority = prop_oneof![Just(Priority::Low), Just(Priority::Normal), Just(Priority::High)];
    let leaves = proptest::option::weighted(0.2, 0_usize..40);
    (0_u64..3, priority, 0_usize..20, 1_usize..16, 1_usize..16, any::<bool>(), 0_usize..60, leaves).prop_map(
        |(client, priority, common, own, new, reuse, arrives, leaves)| Asked {
            client,
            priority,
            common,
            own,
            new,
            reuse,
            arrives,
            leaves,
        },
    )
}

/// What a block holds, by position: which tokens were computed with which before them. A stand-in for keys and values.
type Contents = HashMap<(u32, usize), Vec<u32>>;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn whatever_is_asked_is_computed_within_the_limits_from_blocks_that_hold_it_and_leaves_nothing(
        requests in proptest::collection::vec(asked(), 1..14),
        kv_blocks in 13_usize..30, step_tokens in 1_usize..20, sequences in 1_usize..6,
    ) {
        let limits = Limits { sequences, step_tokens, kv_blocks, block_tokens: 4 };
        let mut scheduler = Scheduler::new(limits);
        let mut contents = Contents::new();
        let mut left = requests.len();
        for now in 0..4000 {
            for (id, asked) in requests.iter().enumerate() {
                let name = SequenceId(id as u64);
                if asked.arrives == now {
                    let mut tokens: Vec<u32> = (0..asked.common as u32).collect();
                    tokens.extend(own(id as u64 + 1, asked.own));
                    let flow = Flow { client: ClientId(asked.client), priority: asked.priority };
                    let submission = Submission { id: name, flow, tokens, max_new: asked.new, reuse: asked.reuse };
                    scheduler.submit(submission).unwrap();
                }
                if asked.leaves.is_some_and(|steps| asked.arrives + steps == now) && !scheduler.tokens(name).is_empty() {
                    scheduler.remove(name);
                    left -= 1;
                }
            }
            let step = scheduler.schedule();
            prop_assert_eq!(step.chunks.is_empty(), scheduler.is_idle(), "there is progress in every step");
            prop_assert!(step.chunks.len() <= sequences);
            prop_assert!(step.chunks.iter().map(|c| c.len).sum::<usize>() <= step_tokens);
            let counts = scheduler.counts();
            prop_assert!(counts.running <= sequences && counts.blocks_held + counts.blocks_cached <= kv_blocks);

            for (from, to) in &step.copies {
                for slot in 0..4 {
                    if let Some(held) = contents.get(&(*from, slot)).cloned() {
                        contents.insert((*to, slot), held);
                    }
                }
            }
            for chunk in &step.chunks {
                let (tokens, table) = (scheduler.tokens(chunk.id), scheduler.table(chunk.id));
                for position in 0..chunk.start + chunk.len {
                    let place = (table[position / 4], position % 4);
                    if position >= chunk.start {
                        contents.insert(place, tokens[..=position].to_vec());
                    }
                }
            }
            // Only now: no chunk may have overwritten what another one reads.
            for chunk in &step.chunks {
                let (tokens, table) = (scheduler.tokens(chunk.id), scheduler.table(chunk.id));
                for position in 0..chunk.start + chunk.len {
                    let held = contents.get(&(table[position / 4], position % 4));
                    prop_assert_eq!(held.map(Vec::as_slice), Some(&tokens[..=position]));
                }
            }
            scheduler.finish(&step);
            for chunk in step.chunks.iter().filter(|chunk| chunk.samples) {
                let asked = &requests[chunk.id.0 as usize];
                let len = scheduler.tokens(chunk.id).len();
                if len + 1 == asked.common + asked.own + asked.new {
                    scheduler.remove(chunk.id);
                    left -= 1;
                } else {
                    // The same for all, so that completions are found in the cache too.
                    scheduler.grew(chunk.id, len as u32);
                }
            }
        }
        prop_assert_eq!(left, 0, "nobody waits for ever");
        prop_assert!(scheduler.is_idle());
        let counts = scheduler.counts();
        prop_assert_eq!((counts.blocks_held, counts.running, counts.waiting), (0, 0, 0));
        prop_assert!(scheduler.preempted.is_empty() && scheduler.running.is_empty());
    }
}
