//! The faults of the control plane, one after the other, and the restart of everything: serving must not notice.

use std::time::Duration;

use sirocco_testkit::faults::network::State;
use tokio::time::Instant;

use super::figure::Figure;
use super::rows::{Form, pause, unharmed};
use super::scene::Scene;
use crate::control::operator::{Operator, cordon, drain, uncordon};
use crate::control::succession::Succession;

/// No coordinator reaches etcd.
pub(super) async fn coordinators_cut_off(scene: &mut Scene, form: Form) -> Vec<Figure> {
    let fault = "coordinators cut off from etcd";
    let cut = async |scene: &mut Scene| {
        for coordinator in &scene.cluster.coordinators {
            scene.rig.to_etcd(&coordinator.id).put(State::silent());
        }
    };
    let seen = scene.suffer(form.watch, cut).await;
    scene.rig.network.heal();
    let mut figures = unharmed(fault, &seen);
    figures.push(back(fault, scene).await);
    figures
}

/// All of etcd is gone for a while.
pub(super) async fn etcd_stopped(scene: &mut Scene, form: Form) -> Vec<Figure> {
    let fault = format!("all of etcd stopped for {} s", form.watch.as_secs());
    let stop = async |scene: &mut Scene| scene.etcd.members.iter_mut().for_each(|member| member.kill());
    let seen = scene.suffer(form.watch, stop).await;
    scene.etcd.restart().unwrap();
    let mut figures = unharmed(&fault, &seen);
    let (name, gap) = pause(&fault, scene, &seen);
    figures.push(Figure::new(&name, gap, "s"));
    figures.push(back(&fault, scene).await);
    figures
}

/// Etcd loses its quorum and gets it back.
pub(super) async fn quorum_lost(scene: &mut Scene, form: Form) -> Vec<Figure> {
    let fault = "two of three etcd members killed";
    let kill = async |scene: &mut Scene| scene.etcd.members[1..].iter_mut().for_each(|member| member.kill());
    let seen = scene.suffer(form.watch, kill).await;
    scene.etcd.restart().unwrap();
    let mut figures = unharmed(fault, &seen);
    let (name, gap) = pause(fault, scene, &seen);
    figures.push(Figure::new(&name, gap, "s").at_most(form.leniency));
    figures.push(back(fault, scene).await.at_most(15.0 * form.leniency));
    figures
}

/// From when etcd is well until what an operator asks for is done.
async fn back(fault: &str, scene: &Scene) -> Figure {
    let (began, operator) = (Instant::now(), Operator::of(&scene.cluster));
    operator.complete(cordon("expert-0")).await;
    let took = began.elapsed().as_secs_f64();
    operator.complete(uncordon("expert-0")).await;
    scene.rest().await;
    Figure::new(&format!("{fault}: control plane back"), took, "s")
}

/// The leader dies again and again, each time while experts move.
pub(super) async fn leaders_killed(scene: &mut Scene, form: Form, times: usize) -> Vec<Figure> {
    let fault = format!("leader killed {times} times while experts move");
    let mut leaders = Succession::default();
    let mut slowest = Duration::ZERO;
    let seen = scene
        .suffer(form.watch, async |scene| {
            for time in 0..times {
                let operator = Operator::of(&scene.cluster);
                let node = format!("expert-{}", time / 2 % scene.cluster.experts.len());
                operator.operate(if time % 2 == 0 { drain(&node) } else { uncordon(&node) }).await;
                let dead = leaders.kill_leader(&mut scene.cluster).await;
                slowest = slowest.max(dead.replaced(&Operator::of(&scene.cluster)).await);
            }
            leaders.complete(&mut scene.cluster);
        })
        .await;
    for index in 0..scene.cluster.experts.len() {
        Operator::of(&scene.cluster).complete(uncordon(&format!("expert-{index}"))).await;
    }
    let rest = scene.rest().await;
    let mut figures = unharmed(&fault, &seen);
    let (name, gap) = pause(&fault, scene, &seen);
    figures.push(Figure::new(&name, gap, "s"));
    figures.push(Figure::new(&format!("{fault}: slowest takeover"), slowest.as_secs_f64(), "s"));
    figures.push(Figure::new(&format!("{fault}: at rest after"), rest.as_secs_f64(), "s"));
    figures
}

/// Every process ends as it is asked to and starts again, one at a time.
pub(super) async fn rolled(scene: &mut Scene, form: Form) -> Vec<Figure> {
    let fault = "rolling restart of every process";
    let seen = scene.suffer(form.watch, async |scene| scene.roll().await).await;
    let mut figures = unharmed(fault, &seen);
    let (name, gap) = pause(fault, scene, &seen);
    figures.push(Figure::new(&name, gap, "s"));
    let took = (seen.ended - seen.began).as_secs_f64();
    figures.push(Figure::new(&format!("{fault}: took"), took, "s"));
    figures
}
