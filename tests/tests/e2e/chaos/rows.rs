//! The faults of expert nodes and of the links to them, one after the other: what happens, and what is measured of it.

use std::time::Duration;

use rustix::process::Signal;
use sirocco_testkit::faults::network::{Conditions, State};

use super::figure::Figure;
use super::scene::{Scene, Seen};
use crate::control::operator::{Operator, cordon, drain, uncordon};

/// How long the records of a node that says nothing stay, and how long it then takes at most until its experts serve again.
const LEASE: Duration = Duration::from_secs(15);
const LOAD: Duration = Duration::from_secs(5);

/// How long each fault lasts and is watched.
#[derive(Clone, Copy)]
pub(super) struct Form {
    pub(super) watch: Duration,
    /// Longest gap between two tokens that is held against a machine that does other things besides: a multiple of the bar.
    pub(super) leniency: f64,
}

/// No request failed, and how many were completed.
pub(super) fn unharmed(fault: &str, seen: &Seen) -> Vec<Figure> {
    vec![
        Figure::new(&format!("{fault}: failed or changed"), seen.wrong as f64, "requests").at_most(0.0),
        Figure::new(&format!("{fault}: completed"), seen.completed as f64, "requests").at_least(1.0),
    ]
}

/// The longest time between two tokens of a completion while the fault was.
pub(super) fn pause(fault: &str, scene: &Scene, seen: &Seen) -> (String, f64) {
    let longest = scene.load.window(seen.began, seen.ended).longest;
    (format!("{fault}: longest gap between tokens"), longest.as_secs_f64())
}

/// An expert node is killed whose experts have replicas.
pub(super) async fn killed(scene: &mut Scene, index: usize, form: Form) -> Vec<Figure> {
    let fault = "expert node killed, replicas";
    let seen = scene.suffer(form.watch, async |scene| scene.cluster.experts[index].process.kill().unwrap()).await;
    let mut figures = unharmed(fault, &seen);
    let (name, gap) = pause(fault, scene, &seen);
    figures.push(Figure::new(&name, gap, "s").at_most_better(0.25 * form.leniency, 0.1));
    let back = scene.load.window(seen.began + Duration::from_secs(2), seen.ended);
    let rate = Figure::new(&format!("{fault}: after 2 s over before"), back.tokens_per_s, "tokens/s");
    figures.push(rate.over(seen.before.tokens_per_s).at_least(0.9 / form.leniency));
    scene.revive_expert(index);
    scene.rest().await;
    figures
}

/// An expert node is killed whose experts nobody else has: what waits for them goes on once they are loaded elsewhere.
pub(super) async fn killed_alone(scene: &mut Scene, index: usize, form: Form) -> Vec<Figure> {
    let fault = "expert node killed, no replica";
    let seen = scene.suffer(form.watch, async |scene| scene.cluster.experts[index].process.kill().unwrap()).await;
    let mut figures = unharmed(fault, &seen);
    let (name, gap) = pause(fault, scene, &seen);
    figures.push(Figure::new(&name, gap, "s").at_most((LEASE + LOAD).as_secs_f64() * form.leniency.min(2.0)));
    figures
}

/// An expert node gets no more memory than it has, and is to load experts.
pub(super) async fn starved(scene: &mut Scene, index: usize, form: Form) -> Vec<Figure> {
    let fault = "expert node out of memory (RLIMIT_AS), replicas";
    let starve = async |scene: &mut Scene| {
        scene.cluster.experts[index].process.limit_memory(0).unwrap();
        let other = format!("expert-{}", (index + 1) % scene.cluster.experts.len());
        Operator::of(&scene.cluster).operate(drain(&other)).await;
    };
    let seen = scene.suffer(form.watch, starve).await;
    scene.cluster.experts[index].process.kill().unwrap();
    scene.revive_expert(index);
    let other = format!("expert-{}", (index + 1) % scene.cluster.experts.len());
    Operator::of(&scene.cluster).complete(uncordon(&other)).await;
    scene.rest().await;
    let mut figures = unharmed(fault, &seen);
    let (name, gap) = pause(fault, scene, &seen);
    figures.push(Figure::new(&name, gap, "s"));
    figures
}

/// The clocks of one node of each kind jump ahead and back.
pub(super) async fn jumped(scene: &mut Scene, form: Form) -> Vec<Figure> {
    let fault = "clocks jump a day ahead, then back";
    let nodes = ["expert-0", "router-0", "coordinator-0"];
    let jump = async |scene: &mut Scene| {
        for seconds in [86_400, -86_400] {
            for node in nodes {
                scene.rig.jump(node, seconds).unwrap();
            }
            scene.load.during(form.watch / 2).await;
            let operator = Operator::of(&scene.cluster);
            operator.complete(cordon("expert-1")).await;
            operator.complete(uncordon("expert-1")).await;
        }
    };
    let seen = scene.suffer(form.watch, jump).await;
    for node in nodes {
        scene.rig.jump(node, 0).unwrap();
    }
    scene.rest().await;
    unharmed(fault, &seen)
}

/// An expert node stops where it is, and later goes on.
pub(super) async fn frozen(scene: &mut Scene, index: usize, form: Form) -> Vec<Figure> {
    let fault = "expert node frozen (SIGSTOP), replicas";
    let freeze = async |scene: &mut Scene| scene.cluster.experts[index].process.signal(Signal::STOP).unwrap();
    let seen = scene.suffer(form.watch, freeze).await;
    scene.cluster.experts[index].process.signal(Signal::CONT).unwrap();
    let mut figures = unharmed(fault, &seen);
    let (name, gap) = pause(fault, scene, &seen);
    figures.push(Figure::new(&name, gap, "s").at_most(form.leniency));
    scene.rest().await;
    figures
}

/// Everything to and from one node comes late.
pub(super) async fn slow(scene: &mut Scene, index: usize, form: Form) -> Vec<Figure> {
    let fault = "expert node 50 ms slower, replicas";
    let late = Conditions { delay: Duration::from_millis(25), ..Conditions::default() };
    let seen = scene.suffer(form.watch, async |scene| scene.link(index, State::both(late))).await;
    let later = scene.load.window(seen.began + form.watch / 2, seen.ended);
    scene.rig.network.heal();
    let mut figures = unharmed(fault, &seen);
    let p99 = Figure::new(&format!("{fault}: p99 between tokens over undisturbed"), ms(later.p99), "ms");
    figures.push(p99.over(ms(seen.before.p99)).at_most(2.0 * form.leniency));
    figures
}

/// Packets are lost on the way to one node and back.
pub(super) async fn lossy(scene: &mut Scene, index: usize, form: Form) -> Vec<Figure> {
    let lossy = Conditions { lost_per_mille: 10, jitter: Duration::from_millis(20), ..Conditions::default() };
    bad_link("1% of packets lost, 20 ms jitter", scene, index, form, State::both(lossy)).await
}

/// The routers cannot reach one node: nothing comes back, or connections are refused.
pub(super) async fn cut_off(scene: &mut Scene, index: usize, form: Form) -> Vec<Figure> {
    let mut figures = bad_link("expert node out of reach, silence", scene, index, form, State::silent()).await;
    figures.extend(bad_link("expert node out of reach, resets", scene, index, form, State::refusing()).await);
    figures
}

/// Bits are flipped on the way to one node and back.
pub(super) async fn corrupt(scene: &mut Scene, index: usize, form: Form) -> Vec<Figure> {
    let corrupt = Conditions { corrupt_every_kib: Some(64), ..Conditions::default() };
    bad_link("a bit of every 64 KiB flipped", scene, index, form, State::both(corrupt)).await
}

async fn bad_link(fault: &str, scene: &mut Scene, index: usize, form: Form, state: State) -> Vec<Figure> {
    let seen = scene.suffer(form.watch, async |scene| scene.link(index, state)).await;
    scene.rig.network.heal();
    // What a partition held up may be nonsense to who has long given up.
    scene.load.progress(0).await;
    let mut figures = unharmed(fault, &seen);
    let (name, gap) = pause(fault, scene, &seen);
    figures.push(Figure::new(&name, gap, "s"));
    figures
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
