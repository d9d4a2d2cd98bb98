//! Dispatch among simulated nodes in virtual time: they answer late or never, refuse, and answer what was not asked, by a seed
//! that replays alone. Only the nodes are simulated; what decides is the code that serves.

use sirocco_proto::Rows;
use sirocco_proto::expert::RefusalReason;
use sirocco_types::{Epoch, LayerPlacement, NodeId, Placement};
use tokio::sync::{mpsc, oneshot};

use super::*;
use crate::connection::Connection;
use crate::load::tests::spec;
use crate::metrics::tests::metrics;

const EXPERTS: u32 = 8;
const WIDTH: usize = 2;
const MS: Duration = Duration::from_millis(1);

/// Numbers that look random, the same for the same seed. Source: splitmix64.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// How a node answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    /// In 1 to 4 ms.
    Well,
    /// 50 ms later.
    Slow,
    /// Never.
    Hung,
    /// Not at all: its connection breaks.
    Dead,
    /// Now and then with a refusal, of all or of one expert, or with something else than was asked.
    Mad,
    /// That all of it is impossible.
    Rejecting,
}

type Answer = oneshot::Sender<Result<ExpertOutputs, Refusal>>;

/// What a node with expert `expert` makes of `x`: anything that differs for each.
fn run(expert: ExpertId, x: f32) -> f32 {
    x.mul_add(1.5 + expert.0 as f32, 0.25)
}

pub(super) fn right_answer(request: &DispatchRequest) -> ExpertOutputs {
    let mut rows = Vec::new();
    for part in &request.experts {
        for &row in &part.rows {
            let mut hidden = Vec::new();
            request.hidden_states.append_row(row as usize, &mut hidden);
            rows.extend(hidden.iter().map(|x| run(part.expert, *x)));
        }
    }
    let experts = request.experts.iter().map(|part| (part.expert, Ok(()))).collect();
    ExpertOutputs { experts, rows: Rows::new(rows, WIDTH) }
}

fn wrong_answer(request: &DispatchRequest, random: &mut Random) -> Result<ExpertOutputs, Refusal> {
    let refusal = |random: &mut Random| {
        let reasons = RefusalReason::ALL;
        Refusal::new(reasons[random.below(reasons.len() as u64) as usize], "mad")
    };
    let mut answer = right_answer(request);
    match random.below(6) {
        0 => return Err(refusal(random)),
        1 => {
            // One expert is not run: its rows are left out.
            let which = random.below(request.experts.len() as u64) as usize;
            let before: usize = request.experts[..which].iter().map(|part| part.rows.len()).sum();
            let own = request.experts[which].rows.len();
            let mut rows = Vec::new();
            answer.rows.append_rows(0..before, &mut rows);
            answer.rows.append_rows(before + own..answer.rows.len(), &mut rows);
            answer.rows = if rows.is_empty() { Rows::default() } else { Rows::new(rows, WIDTH) };
            answer.experts[which].1 = Err(refusal(random));
        }
        2 => {
            let mut rows = Vec::new();
            answer.rows.append_rows(1..answer.rows.len(), &mut rows);
            answer.rows = if rows.is_empty() { Rows::default() } else { Rows::new(rows, WIDTH) };
        }
        3 => answer.experts[0].0 = ExpertId(answer.experts[0].0.0 + 1),
        4 => {
            let mut values = Vec::new();
            answer.rows.append_rows(0..answer.rows.len(), &mut values);
            answer.rows = Rows::new(values, 2 * answer.rows.len());
        }
        _ => answer = ExpertOutputs::default(),
    }
    Ok(answer)
}

/// Serves `calls` as `mood` says until nobody asks any more.
async fn node(mut calls: mpsc::Receiver<(DispatchRequest, Answer)>, mood: watch::Receiver<Mood>, seed: u64) {
    let mut random = Random(seed);
    while let Some((request, answer)) = calls.recv().await {
        let (mood, delay) = (*mood.borrow(), MS * (1 + random.below(4) as u32));
        let result = match mood {
            Mood::Hung => {
                // Kept, as a frozen process keeps its sockets.
                tokio::spawn(async move {
                    let _answer = answer;
                    std::future::pending::<()>().await;
                });
                continue;
            }
            Mood::Dead => Err(Refusal::new(RefusalReason::Unavailable, "dead")),
            Mood::Rejecting => Err(Refusal::new(RefusalReason::WrongModel, "another model")),
            Mood::Mad if random.one_in(2) => wrong_answer(&request, &mut random),
            Mood::Well | Mood::Slow | Mood::Mad => Ok(right_answer(&request)),
        };
        let delay = if mood == Mood::Slow { delay + 50 * MS } else { delay };
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let _ = answer.send(result);
        });
    }
}

/// Dispatch that goes by `topology`.
pub(super) fn experts(topology: Arc<Topology>) -> RemoteExperts {
    RemoteExperts {
        topology: watch::Sender::new(topology).subscribe(),
        fingerprint: Fingerprint([7; 32]),
        hidden_size: WIDTH,
        timeout: Duration::from_mins(1),
        tokens: Arc::new(ExpertCounts::new(&spec())),
        turns: Arc::new(ExpertCounts::new(&spec())),
        usual: Arc::default(),
        hedges: Arc::new(Budget::of_hedges()),
        retries: Arc::new(Budget::of_retries()),
        metrics: metrics().0,
    }
}

/// Simulated nodes.
struct Nodes {
    ids: Vec<NodeId>,
    connections: Vec<Arc<Connection>>,
    moods: Vec<watch::Sender<Mood>>,
}

impl Nodes {
    fn start(count: u64, random: &mut Random) -> Self {
        let mut nodes = Self { ids: Vec::new(), connections: Vec::new(), moods: Vec::new() };
        for index in 0..count {
            let id = NodeId::new(&format!("n{index}")).unwrap();
            let (calls, queue) = mpsc::channel(64);
            let mood = watch::Sender::new(Mood::Well);
            tokio::spawn(node(queue, mood.subscribe(), random.below(u64::MAX)));
            nodes.connections.push(Arc::new(Connection::over(id.clone(), metrics().0.hop(&id), calls)));
            nodes.moods.push(mood);
            nodes.ids.push(id);
        }
        nodes
    }

    /// A placement in which expert `e` is on the nodes that `on` says.
    fn placement(&self, epoch: u64, on: impl Fn(u32) -> Vec<usize>) -> Placement {
        let experts = (0..EXPERTS).map(|e| on(e).into_iter().map(|node| self.ids[node].clone()).collect()).collect();
        let layer = LayerPlacement { experts };
        Placement { epoch: Epoch(epoch), layers: vec![layer.clone(), layer] }
    }

    /// A topology by [`Nodes::placement`].
    fn topology(&self, epoch: u64, on: impl Fn(u32) -> Vec<usize>) -> Topology {
        Topology::over(self.placement(epoch, on), self.ids.iter().cloned().zip(self.connections.iter().cloned()))
    }
}

/// Runs a layer of a few tokens and checks every bit of what comes back. Returns how long it took.
pub(super) async fn layer(experts: &RemoteExperts, random: &mut Random) -> Duration {
    let tokens = if random.one_in(4) { 40 + random.below(40) } else { 1 + random.below(4) } as usize;
    let hidden: Vec<f32> = (0..tokens * WIDTH).map(|_| random.below(1000) as f32 * 0.37).collect();
    let mut routing = Routing { top_k: 2, experts: Vec::new(), weights: Vec::new() };
    for _ in 0..tokens {
        let first = random.below(u64::from(EXPERTS));
        let second = (first + 1 + random.below(u64::from(EXPERTS) - 1)) % u64::from(EXPERTS);
        routing.experts.extend([first, second].map(|expert| ExpertId(expert as u32)));
        routing.weights.extend([0.625, 0.375]);
    }
    let began = Instant::now();
    let got = experts.forward(LayerId(1), &hidden, &routing, None).await.unwrap();
    let slots = routing.experts.iter().enumerate();
    let rows: Vec<f32> =
        slots.flat_map(|(slot, expert)| hidden[slot / 2 * WIDTH..][..WIDTH].iter().map(|x| run(*expert, *x))).collect();
    assert_eq!(got, combine(&rows, &routing, WIDTH));
    began.elapsed()
}

#[tokio::test(start_paused = true)]
async fn whatever_nodes_do_no_layer_is_lost_and_no_bit_is_wrong_while_one_replica_is_well() {
    for seed in 0..2000 {
        let mut random = Random(seed);
        let nodes = Nodes::start(5, &mut random);
        // Every expert is on nodes n, n + 1 and n + 2; one of any three neighbours is well, for 0 and 3 are.
        let topology = nodes.topology(1, |expert| (0..3).map(|step| (expert as usize + step) % 5).collect());
        let experts = experts(Arc::new(topology));
        for step in 0..12 {
            for sick in [1, 2, 4] {
                if random.one_in(3) {
                    let moods = [Mood::Well, Mood::Slow, Mood::Hung, Mood::Dead, Mood::Mad, Mood::Rejecting];
                    nodes.moods[sick].send_replace(moods[random.below(6) as usize]);
                }
            }
            let took = layer(&experts, &mut random).await;
            assert!(took < Duration::from_secs(10), "seed {seed}, step {step}: {took:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_no_node_answers_waits_for_a_placement_that_has_another() {
    for seed in 0..500 {
        let mut random = Random(seed);
        let nodes = Nodes::start(4, &mut random);
        let sender = watch::Sender::new(Arc::new(nodes.topology(1, |expert| vec![expert as usize % 3])));
        let experts = RemoteExperts { topology: sender.subscribe(), ..experts(Arc::default()) };
        layer(&experts, &mut random).await;
        let sick = random.below(3) as usize;
        nodes.moods[sick].send_replace([Mood::Hung, Mood::Dead][random.below(2) as usize]);
        let placed_again = async {
            tokio::time::sleep(Duration::from_secs(20)).await;
            let healed = nodes.topology(2, |expert| match expert as usize % 3 {
                node if node == sick => vec![3],
                node => vec![node],
            });
            sender.send_replace(Arc::new(healed));
        };
        let layers = async {
            for _ in 0..10 {
                let took = layer(&experts, &mut random).await;
                assert!(took < Duration::from_secs(21), "seed {seed}: {took:?}");
            }
        };
        tokio::join!(placed_again, layers);
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_hangs_costs_a_few_late_calls_and_is_then_passed_over() {
    let mut random = Random(1);
    let nodes = Nodes::start(3, &mut random);
    let topology = nodes.topology(1, |expert| vec![expert as usize % 3, (expert as usize + 1) % 3]);
    let experts = experts(Arc::new(topology));
    for _ in 0..50 {
        layer(&experts, &mut random).await;
    }
    nodes.moods[1].send_replace(Mood::Hung);
    let began = Instant::now();
    let mut slow = 0;
    for _ in 0..50 {
        slow += usize::from(layer(&experts, &mut random).await > 20 * MS);
    }
    assert!((1..=4).contains(&slow), "{slow} layers waited");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());

    nodes.moods[1].send_replace(Mood::Well);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let asked = |experts: &RemoteExperts| {
        experts.topology.borrow().connection(&nodes.ids[1]).standing.suspended(Instant::now())
    };
    for _ in 0..20 {
        layer(&experts, &mut random).await;
    }
    assert!(!asked(&experts), "a node that is well again is asked again");
}

#[tokio::test(start_paused = true)]
async fn a_cluster_that_is_slow_as_a_whole_is_not_asked_twice_for_all() {
    let mut random = Random(2);
    let nodes = Nodes::start(3, &mut random);
    let experts = experts(Arc::new(nodes.topology(1, |_| vec![0, 1, 2])));
    for _ in 0..50 {
        layer(&experts, &mut random).await;
    }
    for mood in &nodes.moods {
        mood.send_replace(Mood::Slow);
    }
    let turns = |experts: &RemoteExperts| experts.turns.totals().iter().flatten().sum::<u64>();
    let (before, mut parts) = (turns(&experts), 0);
    for _ in 0..200 {
        let tokens = experts.tokens.totals().concat();
        layer(&experts, &mut random).await;
        parts += experts.tokens.totals().concat().iter().zip(&tokens).filter(|(now, before)| now > before).count();
    }
    let asked = turns(&experts) - before;
    assert!(asked < parts as u64 * 5 / 4, "{parts} parts were asked for {asked} times");
}

/// Asks for one token's experts 0 and 1 by `until`.
async fn ask(experts: &RemoteExperts, until: Option<Instant>) -> Result<Vec<f32>, ExpertsError> {
    let routing = Routing { top_k: 2, experts: vec![ExpertId(0), ExpertId(1)], weights: vec![0.5; 2] };
    experts.forward(LayerId(1), &[1.0; WIDTH], &routing, until.map(Instant::into_std)).await
}

#[tokio::test(start_paused = true)]
async fn what_every_replica_rejects_fails_at_once_and_what_one_rejects_does_not() {
    let nodes = Nodes::start(3, &mut Random(3));
    let experts = experts(Arc::new(nodes.topology(1, |_| vec![0, 1, 2])));
    nodes.moods[0].send_replace(Mood::Rejecting);
    nodes.moods[1].send_replace(Mood::Rejecting);
    for _ in 0..20 {
        ask(&experts, None).await.unwrap();
    }
    nodes.moods[2].send_replace(Mood::Rejecting);
    let began = Instant::now();
    assert_eq!(ask(&experts, None).await, Err(ExpertsError::Internal("another model".into())));
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_layer_is_waited_for_until_nobody_waits_for_it_any_more_and_nodes_are_told() {
    let nodes = Nodes::start(1, &mut Random(4));
    let (calls, mut queue) = mpsc::channel(64);
    let id = nodes.ids[0].clone();
    let connection = Arc::new(Connection::over(id.clone(), metrics().0.hop(&id), calls));
    let placement = nodes.placement(1, |_| vec![0]);
    let experts = experts(Arc::new(Topology::over(placement, [(id, connection)].into_iter())));
    for (budget, expected) in
        [(Some(300 * MS), 300 * MS), (Some(2 * experts.timeout), experts.timeout), (None, experts.timeout)]
    {
        let began = Instant::now();
        let (result, told) =
            tokio::join!(ask(&experts, budget.map(|budget| began + budget)), async { queue.recv().await.unwrap() });
        let seconds = expected.as_secs_f64();
        let Err(ExpertsError::Unavailable(text)) = result else { panic!("{result:?}") };
        assert!(text.contains(&format!("did not answer within {seconds} s")), "{text}");
        assert!((expected..expected + 10 * MS).contains(&began.elapsed()), "{budget:?}: {:?}", began.elapsed());
        assert_eq!(told.0.deadline, Some(expected), "the node may drop it by then");
        while queue.try_recv().is_ok() {}
    }
}

#[tokio::test(start_paused = true)]
async fn a_sick_cluster_is_not_asked_again_and_again_for_all() {
    let mut random = Random(5);
    let nodes = Nodes::start(3, &mut random);
    let experts = experts(Arc::new(nodes.topology(1, |_| vec![0, 1, 2])));
    for mood in &nodes.moods {
        mood.send_replace(Mood::Dead);
    }
    let turns = |experts: &RemoteExperts| experts.turns.totals().iter().flatten().sum::<u64>();
    let mut asked = Vec::new();
    for _ in 0..300 {
        let before = turns(&experts);
        ask(&experts, Some(Instant::now() + 4 * MS)).await.unwrap_err();
        asked.push(turns(&experts) - before);
    }
    // Of two experts each, all of which fail: what is saved up is soon spent, and then one call in five is repeated.
    let (first, last): (u64, u64) = (asked[..10].iter().sum(), asked[200..].iter().sum());
    assert!(first > 10 * 3, "{first} in ten layers");
    assert!(last < 100 * 2 * 3 / 2, "{last} in a hundred layers");
}
