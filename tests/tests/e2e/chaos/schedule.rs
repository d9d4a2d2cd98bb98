//! Faults in an order that a seed decides, two at a time: one for an expert node, so that each expert keeps a replica that is
//! well, and one for anything else. After each the cluster must come to rest before the next.

use std::fmt;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use sirocco_testkit::faults::network::{Conditions, State};
use sirocco_testkit::random::Random;

use super::scene::{Scene, leave};
use crate::control::Size;
use crate::control::operator::{Operator, drain, uncordon};

/// Shortest time a fault lasts.
const SHORTEST: Duration = Duration::from_secs(1);

/// Memory that a starved node gets besides what it has: too little to load an expert, or to answer much.
const STARVED_BYTES: u64 = 64 << 10;

/// What happens to an expert node or to the link to it.
#[derive(Clone, Copy, Debug)]
enum Harm {
    Nothing,
    Killed,
    Left,
    Frozen,
    Starved,
    Slow,
    Lossy,
    Narrow,
    Silent,
    Refusing,
    Reset,
    Corrupt,
}

const HARMS: [Harm; 12] = [
    Harm::Nothing,
    Harm::Killed,
    Harm::Left,
    Harm::Frozen,
    Harm::Starved,
    Harm::Slow,
    Harm::Lossy,
    Harm::Narrow,
    Harm::Silent,
    Harm::Refusing,
    Harm::Reset,
    Harm::Corrupt,
];

/// What happens besides.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    Nothing,
    MemberKilled,
    QuorumKilled,
    EtcdKilled,
    CoordinatorKilled,
    CoordinatorFrozen,
    CoordinatorsCutOff,
    RouterKilled,
    RouterLeft,
    RouterCutOff,
    ClockJumped,
    Drained,
}

const TROUBLES: [Trouble; 12] = [
    Trouble::Nothing,
    Trouble::MemberKilled,
    Trouble::QuorumKilled,
    Trouble::EtcdKilled,
    Trouble::CoordinatorKilled,
    Trouble::CoordinatorFrozen,
    Trouble::CoordinatorsCutOff,
    Trouble::RouterKilled,
    Trouble::RouterLeft,
    Trouble::RouterCutOff,
    Trouble::ClockJumped,
    Trouble::Drained,
];

/// Two faults at once, for a while.
#[derive(Clone, Debug)]
pub(super) struct Event {
    harm: Harm,
    trouble: Trouble,
    /// Of the expert node that is harmed.
    expert: usize,
    /// Of another one.
    other: usize,
    coordinator: usize,
    router: usize,
    member: usize,
    /// By how much a clock jumps.
    seconds: i64,
    lasts: Duration,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { harm, trouble, expert, other, coordinator, router, member, seconds, lasts } = self;
        match harm {
            Harm::Nothing => write!(f, "no expert node harmed")?,
            harm => write!(f, "expert-{expert} {harm:?}")?,
        }
        match trouble {
            Trouble::Nothing => write!(f, ", nothing besides")?,
            Trouble::MemberKilled => write!(f, ", etcd member {member} killed")?,
            Trouble::CoordinatorKilled | Trouble::CoordinatorFrozen => {
                write!(f, ", {trouble:?}: coordinator-{coordinator}")?;
            }
            Trouble::RouterKilled | Trouble::RouterLeft | Trouble::RouterCutOff => {
                write!(f, ", {trouble:?}: router-{router}")?;
            }
            Trouble::ClockJumped => {
                write!(f, ", clocks of expert-{other} and coordinator-{coordinator} {seconds:+} s")?;
            }
            Trouble::Drained => write!(f, ", expert-{other} drained")?,
            Trouble::QuorumKilled | Trouble::EtcdKilled | Trouble::CoordinatorsCutOff => write!(f, ", {trouble:?}")?,
        }
        write!(f, ", for {:.1} s", lasts.as_secs_f64())
    }
}

impl Event {
    /// The next event for a cluster of `size`, which lasts as long as `longest` at most.
    pub(super) fn draw(random: &mut Random, size: Size, etcd_members: usize, longest: Duration) -> Self {
        let mut below = |count: usize| random.below(count as u64) as usize;
        let expert = below(size.experts);
        let (harm, trouble) = (HARMS[below(HARMS.len())], TROUBLES[below(TROUBLES.len())]);
        Self {
            harm,
            trouble,
            expert,
            other: (expert + 1 + below(size.experts - 1)) % size.experts,
            coordinator: below(size.coordinators),
            router: below(size.routers),
            member: below(etcd_members),
            seconds: [-86_400, -60, -2, 2, 60, 86_400][below(6)],
            lasts: SHORTEST
                + Duration::from_millis(below(longest.saturating_sub(SHORTEST).as_millis() as usize + 1) as u64),
        }
    }

    /// Lets it happen, waits as long as it lasts, and puts everything right again.
    pub(super) async fn happen(&self, scene: &mut Scene) {
        let began = Instant::now();
        self.trouble(scene).await;
        self.harm(scene);
        scene.load.during(self.lasts.saturating_sub(began.elapsed())).await;
        scene.rig.network.heal();
        self.end_trouble(scene).await;
        self.end_harm(scene);
    }

    fn harm(&self, scene: &mut Scene) {
        let process = &mut scene.cluster.experts[self.expert].process;
        let way = |conditions| State::both(conditions);
        let state = match self.harm {
            Harm::Nothing | Harm::Left => return,
            Harm::Killed => return process.kill().unwrap(),
            Harm::Frozen => return process.signal(Signal::STOP).unwrap(),
            Harm::Starved => return process.limit_memory(STARVED_BYTES).unwrap(),
            Harm::Reset => return scene.rig.network.link(&scene.cluster.experts[self.expert].id).reset(),
            Harm::Slow => way(Conditions { delay: Duration::from_millis(25), ..Conditions::default() }),
            Harm::Lossy => {
                way(Conditions { lost_per_mille: 10, jitter: Duration::from_millis(20), ..Conditions::default() })
            }
            Harm::Narrow => way(Conditions { bytes_per_s: Some(1 << 20), ..Conditions::default() }),
            Harm::Corrupt => way(Conditions { corrupt_every_kib: Some(64), ..Conditions::default() }),
            Harm::Silent => State::silent(),
            Harm::Refusing => State::refusing(),
        };
        scene.link(self.expert, state);
    }

    fn end_harm(&self, scene: &mut Scene) {
        match self.harm {
            Harm::Killed => scene.revive_expert(self.expert),
            Harm::Left => {
                leave(&mut scene.cluster.experts[self.expert]);
                scene.revive_expert(self.expert);
            }
            Harm::Frozen => scene.cluster.experts[self.expert].process.signal(Signal::CONT).unwrap(),
            Harm::Starved => {
                scene.cluster.experts[self.expert].process.kill().unwrap();
                scene.revive_expert(self.expert);
            }
            _ => {}
        }
    }

    async fn trouble(&self, scene: &mut Scene) {
        let (etcd, cluster) = (&mut scene.etcd.members, &mut scene.cluster);
        match self.trouble {
            Trouble::Nothing | Trouble::RouterLeft => {}
            Trouble::MemberKilled => etcd[self.member].kill(),
            Trouble::QuorumKilled => {
                let members = etcd.len();
                (1..members).for_each(|next| etcd[(self.member + next) % members].kill());
            }
            Trouble::EtcdKilled => etcd.iter_mut().for_each(|member| member.kill()),
            Trouble::CoordinatorKilled => cluster.coordinators[self.coordinator].process.kill().unwrap(),
            Trouble::CoordinatorFrozen => {
                cluster.coordinators[self.coordinator].process.signal(Signal::STOP).unwrap();
            }
            Trouble::CoordinatorsCutOff => {
                cluster.coordinators.iter().for_each(|node| scene.rig.to_etcd(&node.id).put(State::silent()));
            }
            Trouble::RouterKilled => cluster.routers[self.router].process.kill().unwrap(),
            Trouble::RouterCutOff => scene.rig.to_etcd(&cluster.routers[self.router].id).put(State::silent()),
            Trouble::ClockJumped => self.jump(scene, self.seconds),
            Trouble::Drained => {
                Operator::of(cluster).operate(drain(&format!("expert-{}", self.other))).await;
            }
        }
    }

    async fn end_trouble(&self, scene: &mut Scene) {
        match self.trouble {
            Trouble::MemberKilled | Trouble::QuorumKilled | Trouble::EtcdKilled => scene.etcd.restart().unwrap(),
            Trouble::CoordinatorKilled => scene.revive_coordinator(self.coordinator),
            Trouble::CoordinatorFrozen => {
                scene.cluster.coordinators[self.coordinator].process.signal(Signal::CONT).unwrap();
            }
            Trouble::RouterKilled => scene.revive_router(self.router),
            Trouble::RouterLeft => {
                leave(&mut scene.cluster.routers[self.router]);
                scene.revive_router(self.router);
            }
            Trouble::ClockJumped => self.jump(scene, 0),
            Trouble::Drained => {
                let node = uncordon(&format!("expert-{}", self.other));
                Operator::of(&scene.cluster).complete(node).await;
            }
            Trouble::Nothing | Trouble::CoordinatorsCutOff | Trouble::RouterCutOff => {}
        }
    }

    fn jump(&self, scene: &Scene, seconds: i64) {
        let coordinator = &scene.cluster.coordinators[self.coordinator];
        for id in [&scene.cluster.experts[self.other].id, &coordinator.id] {
            scene.rig.jump(id, seconds).unwrap();
        }
    }
}

/// Has events of `seed` happen to `scene` one after the other until `time` is over, and says each. Panics when a request
/// failed or changed, or the cluster does not come to rest.
pub(super) async fn run(scene: &mut Scene, size: Size, seed: u64, time: Duration, longest: Duration) {
    let (mut random, began) = (Random::new(seed), Instant::now());
    let members = scene.etcd.members.len();
    for number in 1.. {
        let event = Event::draw(&mut random, size, members, longest);
        let at = Instant::now();
        println!("{:7.1} s  event {number}: {event}", began.elapsed().as_secs_f64());
        event.happen(scene).await;
        let healed = Instant::now();
        let rest = scene.rest().await;
        scene.load.progress(0).await;
        let (tally, window) = (scene.load.tally(), scene.load.window(at, healed));
        println!(
            "{:7.1} s  event {number}: at rest {rest:.1?} after; {} completed, {} of them at a second router; \
             longest gap {:.2?}, first token {:.2?}",
            began.elapsed().as_secs_f64(),
            tally.completed,
            tally.relayed,
            window.longest,
            window.longest_first,
        );
        assert_eq!(tally.wrong, Vec::<String>::new(), "seed {seed}, event {number}: {event}");
        if began.elapsed() >= time {
            return;
        }
    }
}

#[test]
fn a_seed_gives_the_same_events_and_all_kinds_come() {
    let size = Size { coordinators: 2, routers: 2, experts: 5 };
    let draw = |seed: u64| -> Vec<String> {
        let mut random = Random::new(seed);
        (0..200).map(|_| Event::draw(&mut random, size, 3, Duration::from_secs(9)).to_string()).collect()
    };
    assert_eq!(draw(3), draw(3));
    assert_ne!(draw(3), draw(4));
    let mut random = Random::new(3);
    let events: Vec<Event> = (0..400).map(|_| Event::draw(&mut random, size, 3, Duration::from_secs(9))).collect();
    for harm in HARMS {
        assert!(events.iter().any(|event| format!("{:?}", event.harm) == format!("{harm:?}")), "{harm:?}");
    }
    for trouble in TROUBLES {
        assert!(events.iter().any(|event| format!("{:?}", event.trouble) == format!("{trouble:?}")), "{trouble:?}");
    }
    assert!(events.iter().all(|event| event.other != event.expert));
}
