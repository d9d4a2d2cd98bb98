//! Lists of launches that come again and again, as a decode step's do layer by layer: a list that comes a second time becomes a graph,
//! which one call launches from then on.
//!
//! What becomes of a list is plain code, [`Graphs::turn`]; [`Graphs::run`] has a GPU do it. A graph names addresses and kernels, never
//! what lies there, so it computes what its launches would. Never launches a list in part as a graph.

use std::collections::HashMap;

use super::error::DeviceError;
use super::gpu::{Graph, Kernel, Stream};
use super::kernels::KernelSettings;
use super::launch::Launch;

/// Most graphs that are kept, and most lists that are remembered to have come once: 32 layers of decode steps of 16 shapes, in two lanes.
/// They are a few kernels each, which the driver keeps in the memory that is left to it; how much they take was not measured.
const MOST: usize = 1024;

/// Graphs `G` of lists of launches.
#[derive(Debug)]
pub(super) struct Graphs<G> {
    /// Lists that came once.
    once: Recent<()>,
    kept: Recent<G>,
    on: bool,
    launched: u64,
}

/// What is done with a list of launches that comes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn<'a, G> {
    /// Each is launched by itself.
    OneByOne,
    /// A graph is made of it, given to [`Graphs::keep`], and launched.
    Record,
    /// Its graph is launched.
    Launch(&'a mut G),
}

impl<G> Graphs<G> {
    /// None yet, and none ever where `settings` want none.
    pub(super) fn of(settings: &KernelSettings) -> Self {
        Self { on: !settings.no_graphs, ..Self::new(MOST) }
    }

    /// Keeps up to `most`.
    fn new(most: usize) -> Self {
        Self { once: Recent::new(most), kept: Recent::new(most), on: true, launched: 0 }
    }

    /// Whether lists become graphs. When they do not, none is kept.
    pub(super) fn set(&mut self, on: bool) {
        let most = self.kept.most;
        *self = Self { on, launched: self.launched, ..Self::new(most) };
    }

    /// How many graphs have been launched.
    pub(super) fn launched(&self) -> u64 {
        self.launched
    }

    /// What is done with `launches`, which come now. Lists of one, and those that come for the first time, are not worth a graph.
    pub(super) fn turn(&mut self, launches: &[Launch]) -> Turn<'_, G> {
        if !self.on || launches.len() < 2 {
            return Turn::OneByOne;
        }
        if let Some(graph) = self.kept.get(launches) {
            self.launched += 1;
            return Turn::Launch(graph);
        }
        if self.once.take(launches).is_some() {
            return Turn::Record;
        }
        self.once.insert(launches, ());
        Turn::OneByOne
    }

    /// Keeps the graph of a list for its next turns, in the place of the one that was launched least recently, when there is no other.
    /// It is launched now.
    pub(super) fn keep(&mut self, launches: &[Launch], graph: G) -> &mut G {
        self.launched += 1;
        self.kept.insert(launches, graph)
    }
}

impl Graphs<Graph> {
    /// Queues `launches`, one after the other. Where the driver makes no graph, says so, once, and launches one by one from then on.
    ///
    /// # Safety
    /// Of each launch what [`Stream::launch`] says. Kernels and memory are dropped after `self`.
    pub(super) unsafe fn run(
        &mut self,
        stream: &Stream,
        kernels: &HashMap<&'static str, Kernel>,
        launches: &[Launch],
    ) -> Result<(), DeviceError> {
        let kernel = |launch: &Launch| kernels[launch.kernel].with_shared(launch.shared);
        match self.turn(launches) {
            Turn::OneByOne => {}
            Turn::Launch(graph) => return stream.launch_graph(graph),
            Turn::Record => {
                let calls: Vec<(Kernel, &Launch)> = launches.iter().map(|launch| (kernel(launch), launch)).collect();
                // SAFETY: as the caller promises.
                match unsafe { stream.record(&calls) } {
                    Ok(graph) => return stream.launch_graph(self.keep(launches, graph)),
                    Err(error @ DeviceError::Lost { .. }) => return Err(error),
                    // None of it was launched.
                    Err(error) => {
                        tracing::warn!(%error, "no graph of kernels, which are launched one by one from now on");
                        self.set(false);
                    }
                }
            }
        }
        // SAFETY: as the caller promises.
        launches.iter().try_for_each(|launch| unsafe { stream.launch(&kernel(launch), launch.grid, &launch.arguments) })
    }
}

/// Up to so many lists of launches with what belongs to them; the least recently used one makes room.
#[derive(Debug)]
struct Recent<V> {
    most: usize,
    /// With when it was used last.
    entries: HashMap<Box<[Launch]>, (u64, V)>,
    now: u64,
}

impl<V> Recent<V> {
    fn new(most: usize) -> Self {
        Self { most, entries: HashMap::new(), now: 0 }
    }

    fn get(&mut self, launches: &[Launch]) -> Option<&mut V> {
        self.now += 1;
        let (used, value) = self.entries.get_mut(launches)?;
        *used = self.now;
        Some(value)
    }

    fn take(&mut self, launches: &[Launch]) -> Option<V> {
        self.entries.remove(launches).map(|(_, value)| value)
    }

    fn insert(&mut self, launches: &[Launch], value: V) -> &mut V {
        self.now += 1;
        if self.entries.len() == self.most {
            let oldest = self.entries.iter().min_by_key(|(_, (used, _))| *used).map(|(launches, _)| launches.clone());
            oldest.map(|launches| self.entries.remove(&launches));
        }
        &mut self.entries.entry(launches.into()).insert_entry((self.now, value)).into_mut().1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A list of two launches; the second has `number` for an argument.
    fn list(number: u32) -> [Launch; 2] {
        let launch = |number: u32| Launch { kernel: "fold", grid: (1, 1), shared: 0, arguments: vec![number.into()] };
        [launch(0), launch(number)]
    }

    /// What becomes of a list, whose graph is its number: `o`ne by one, `r`ecorded, `l`aunched.
    fn turn(graphs: &mut Graphs<u32>, number: u32) -> char {
        match graphs.turn(&list(number)) {
            Turn::OneByOne => return 'o',
            Turn::Launch(graph) => assert_eq!(*graph, number),
            Turn::Record => {
                assert_eq!(*graphs.keep(&list(number), number), number);
                return 'r';
            }
        }
        'l'
    }

    fn turns(graphs: &mut Graphs<u32>, numbers: impl IntoIterator<Item = u32>) -> String {
        numbers.into_iter().map(|number| turn(graphs, number)).collect()
    }

    #[test]
    fn a_list_is_recorded_when_it_comes_again_and_launched_as_a_graph_from_then_on() {
        let mut graphs = Graphs::new(8);
        assert_eq!(turns(&mut graphs, [1, 2, 1, 1, 3, 2, 1, 2]), "oorlorll");
        assert_eq!(graphs.launched(), 5);
        // One launch is what a graph would take.
        assert!((0..4).all(|_| graphs.turn(&list(1)[..1]) == Turn::OneByOne));
    }

    #[test]
    fn whatever_differs_is_another_list() {
        let mut graphs = Graphs::new(8);
        assert_eq!(turns(&mut graphs, [1, 1, 1]), "orl");
        let changes: [fn(&mut Launch); 4] = [
            |launch| launch.kernel = "embed",
            |launch| launch.grid.1 = 2,
            |launch| launch.shared = 16,
            |launch| launch.arguments = vec![1.0_f32.into()],
        ];
        for change in changes {
            let mut list = list(1);
            change(&mut list[0]);
            assert_eq!(graphs.turn(&list), Turn::OneByOne, "{list:?}");
        }
        let longer = [&list(1)[..], &list(1)].concat();
        assert_eq!(graphs.turn(&longer), Turn::OneByOne);
    }

    #[test]
    fn the_least_recently_launched_graph_makes_room_and_must_come_twice_again() {
        let mut graphs = Graphs::new(2);
        assert_eq!(turns(&mut graphs, [1, 1, 2, 2, 1, 3, 3]), "ororlor");
        assert_eq!(turns(&mut graphs, [1, 3, 2, 2, 3, 1, 1]), "llorlor");
    }

    #[test]
    fn prompts_whose_lists_come_once_push_no_graph_out() {
        let mut graphs = Graphs::new(2);
        assert_eq!(turns(&mut graphs, [1, 1]), "or");
        assert_eq!(turns(&mut graphs, 2..100), "o".repeat(98));
        assert_eq!(turns(&mut graphs, [1]), "l");
    }

    #[test]
    fn more_lists_in_turn_than_there_is_room_for_are_not_recorded_over_and_over() {
        let mut graphs = Graphs::new(10);
        for _ in 0..5 {
            assert_eq!(turns(&mut graphs, 0..11), "o".repeat(11));
        }
        assert_eq!(graphs.launched(), 0);
    }

    #[test]
    fn where_there_are_none_all_are_launched_one_by_one_and_none_is_kept() {
        let mut graphs = Graphs::new(8);
        assert_eq!(turns(&mut graphs, [1, 1, 1]), "orl");
        graphs.set(false);
        assert_eq!(turns(&mut graphs, [1, 1, 2, 2, 2]), "ooooo");
        assert!(graphs.kept.entries.is_empty());
        graphs.set(true);
        assert_eq!((turns(&mut graphs, [1, 1, 1]), graphs.launched()), ("orl".into(), 4));
    }

    proptest! {
        #[test]
        fn no_more_are_kept_than_there_is_room_for(numbers in prop::collection::vec(0_u32..12, 0..200), most in 1_usize..8) {
            let mut graphs = Graphs::new(most);
            let mut last_used: Vec<u32> = Vec::new();
            for number in numbers {
                let kept = last_used.contains(&number);
                let turn = turn(&mut graphs, number);
                prop_assert_eq!(turn == 'l', kept);
                if turn != 'o' {
                    last_used.retain(|other| *other != number);
                    last_used.push(number);
                    last_used.drain(..last_used.len().saturating_sub(most));
                }
                prop_assert!(graphs.kept.entries.len() == last_used.len() && graphs.once.entries.len() <= most);
            }
        }
    }
}
