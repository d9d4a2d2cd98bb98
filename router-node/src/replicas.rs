//! Which replicas compute the rows of one layer: a pure function over row counts and speeds.
//!
//! A layer ends when its last node answers, so rows go where the fewest are for the node's speed. What only one node can
//! compute is counted first. Rows are independent of each other, so no choice changes a bit. It never waits and never knows
//! whether a node answers.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use sirocco_types::NodeId;

/// Fewest rows of a piece when an expert's rows are split: with fewer, the split only makes two nodes read the same weights.
const MIN_PIECE: usize = 16;

/// One expert's rows in a step.
#[derive(Debug)]
pub(crate) struct Demand<'a> {
    /// How many.
    pub(crate) rows: usize,
    /// The replicas that may be asked, at least one.
    pub(crate) replicas: Vec<Replica<'a>>,
    /// Counts the choices made for this expert: ties go to its replicas in turn, the faster ones more often.
    pub(crate) turn: u64,
}

/// A node that holds the expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Replica<'a> {
    pub(crate) node: &'a NodeId,
    /// In percent of an ordinary node, at least 1.
    pub(crate) speed: u32,
}

/// Those of `replicas` that were asked least often: another than the ones in `asked` while there is one.
pub(crate) fn least_asked<'a>(replicas: impl Iterator<Item = Replica<'a>>, asked: &[NodeId]) -> Vec<Replica<'a>> {
    let mut least = usize::MAX;
    let mut chosen = Vec::new();
    for replica in replicas {
        let times = asked.iter().filter(|node| *node == replica.node).count();
        if times < least {
            (least, chosen) = (times, Vec::new());
        }
        if times == least {
            chosen.push(replica);
        }
    }
    chosen
}

/// Deals the rows of one layer's experts to their replicas. Returns for each of `demands` the nodes that compute it and how
/// many of its rows each; they sum to its rows.
///
/// Experts with one replica come first, then those with more, most rows first, each to the replica whose node has the
/// fewest rows so far for its speed. An expert with many rows is dealt in pieces of at least [`MIN_PIECE`].
pub(crate) fn assign<'a>(demands: &[Demand<'a>]) -> Vec<Vec<(&'a NodeId, usize)>> {
    let mut loads = BTreeMap::new();
    let mut dealt = vec![Vec::new(); demands.len()];
    let mut order: Vec<usize> = (0..demands.len()).collect();
    order.sort_by_key(|&index| (demands[index].replicas.len() > 1, Reverse(demands[index].rows)));
    for index in order {
        let demand = &demands[index];
        let pieces = if demand.replicas.len() > 1 { (demand.rows / MIN_PIECE).max(1) } else { 1 };
        for piece in 0..pieces {
            let rows = (piece + 1) * demand.rows / pieces - piece * demand.rows / pieces;
            let node = least_loaded(demand, &loads);
            *loads.entry(node).or_insert(0) += rows;
            match dealt[index].iter_mut().find(|(known, _)| *known == node) {
                Some((_, sum)) => *sum += rows,
                None => dealt[index].push((node, rows)),
            }
        }
    }
    dealt
}

/// The replica whose node has the fewest of the rows in `loads` for its speed. Of several, the one whose turn it is.
fn least_loaded<'a>(demand: &Demand<'a>, loads: &BTreeMap<&'a NodeId, usize>) -> &'a NodeId {
    let load = |replica: &Replica<'a>| loads.get(replica.node).copied().unwrap_or(0) as u128;
    // load / speed, compared without rounding.
    let compare =
        |a: &Replica<'a>, b: &Replica<'a>| (load(a) * u128::from(b.speed)).cmp(&(load(b) * u128::from(a.speed)));
    let least = demand.replicas.iter().min_by(|a, b| compare(a, b)).expect("a demand has at least one replica");
    let tied = || demand.replicas.iter().filter(|replica| compare(replica, least).is_eq());
    // Reversed bits visit a range evenly from the start (van der Corput), so that any run of turns is in proportion, and two
    // equals alternate.
    let speeds: u64 = tied().map(|replica| u64::from(replica.speed)).sum();
    let mut point = (u128::from(demand.turn.reverse_bits()) * u128::from(speeds)) >> 64;
    for replica in tied() {
        match point.checked_sub(u128::from(replica.speed)) {
            None => return replica.node,
            Some(rest) => point = rest,
        }
    }
    least.node
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes() -> [NodeId; 3] {
        ["a", "b", "c"].map(|name| NodeId::new(name).unwrap())
    }

    /// Rows each of the three nodes gets of each demand: `(rows, [(node, speed)])` at `turn`.
    fn dealt(demands: &[(usize, &[(usize, u32)])], turn: u64) -> Vec<[usize; 3]> {
        let nodes = nodes();
        let demand = |&(rows, replicas): &(usize, &[(usize, u32)])| {
            let replicas = replicas.iter().map(|&(node, speed)| Replica { node: &nodes[node], speed }).collect();
            Demand { rows, replicas, turn }
        };
        let demands: Vec<Demand> = demands.iter().map(demand).collect();
        let rows = |pieces: Vec<(&NodeId, usize)>| {
            assert!(pieces.iter().all(|(_, rows)| *rows > 0));
            [0, 1, 2].map(|node| pieces.iter().filter(|(id, _)| **id == nodes[node]).map(|(_, rows)| rows).sum())
        };
        assign(&demands).into_iter().map(rows).collect()
    }

    #[test]
    fn rows_go_where_the_fewest_are_for_the_speed() {
        const AB: &[(usize, u32)] = &[(0, 100), (1, 100)];
        const AB_FAST: &[(usize, u32)] = &[(0, 100), (1, 300)];
        const A: &[(usize, u32)] = &[(0, 100)];
        const AC: &[(usize, u32)] = &[(0, 100), (2, 100)];
        type Case = (&'static str, &'static [(usize, &'static [(usize, u32)])], &'static [[usize; 3]]);
        let cases: [Case; 8] = [
            ("one replica has no choice", &[(40, A)], &[[40, 0, 0]]),
            ("what has no choice counts first", &[(1, AB), (1, A)], &[[0, 1, 0], [1, 0, 0]]),
            ("most rows first", &[(1, AB), (3, AB), (2, AB)], &[[0, 1, 0], [3, 0, 0], [0, 2, 0]]),
            ("a node with less to do", &[(5, A), (9, AC), (3, AB)], &[[5, 0, 0], [0, 0, 9], [0, 3, 0]]),
            ("ties go round", &[(1, AB), (1, AB)], &[[1, 0, 0], [0, 1, 0]]),
            ("31 rows stay together", &[(31, AB)], &[[31, 0, 0]]),
            ("32 are split", &[(32, AB)], &[[16, 16, 0]]),
            ("a fast node takes more pieces", &[(64, AB_FAST)], &[[16, 48, 0]]),
        ];
        for (claim, demands, expected) in cases {
            assert_eq!(dealt(demands, 0), expected, "{claim}");
        }
    }

    #[test]
    fn a_split_fills_up_the_node_that_has_less_to_do_and_keeps_no_small_piece() {
        let both: &[(usize, u32)] = &[(0, 100), (1, 100)];
        assert_eq!(dealt(&[(64, &[(0, 100)]), (128, both)], 0), [[64, 0, 0], [32, 96, 0]]);
        for rows in 1..400 {
            for turn in 0..4 {
                let shares = dealt(&[(rows, &[(0, 100), (1, 70), (2, 250)])], turn)[0];
                assert_eq!(shares.iter().sum::<usize>(), rows);
                let pieces: Vec<usize> = shares.into_iter().filter(|rows| *rows > 0).collect();
                assert!(pieces.len() == 1 || pieces.iter().all(|rows| *rows >= MIN_PIECE), "{rows}: {shares:?}");
            }
        }
    }

    #[test]
    fn steps_of_a_single_token_are_shared_in_proportion_to_speed() {
        for (replicas, expected) in [
            (&[(0, 100), (1, 100)][..], [150, 150, 0]),
            (&[(0, 100), (1, 100), (2, 100)], [100, 100, 100]),
            (&[(0, 100), (1, 200)], [100, 200, 0]),
            (&[(1, 400), (0, 100), (2, 100)], [50, 200, 50]),
        ] {
            let mut shares = [0usize; 3];
            for turn in 0..300 {
                let dealt = dealt(&[(1, replicas)], turn)[0];
                shares.iter_mut().zip(dealt).for_each(|(sum, rows)| *sum += rows);
            }
            let off = shares.iter().zip(expected).map(|(share, expected)| share.abs_diff(expected)).max();
            assert!(off.is_some_and(|off| off <= 3), "{replicas:?}: {shares:?}, expected {expected:?}");
        }
        let two: Vec<usize> = (0..8).map(|turn| dealt(&[(1, &[(0, 100), (1, 100)])], turn)[0][0]).collect();
        assert_eq!(two, [1, 0, 1, 0, 1, 0, 1, 0], "two equal replicas alternate");
    }

    #[test]
    fn who_failed_is_asked_again_only_after_all_others() {
        let ids = nodes();
        let replicas = || ids.iter().map(|node| Replica { node, speed: 100 });
        let left = |asked: &[usize]| {
            let asked: Vec<NodeId> = asked.iter().map(|node| ids[*node].clone()).collect();
            let left = least_asked(replicas(), &asked);
            left.iter().map(|replica| replica.node.as_str()).collect::<String>()
        };
        for (asked, expected) in
            [(&[][..], "abc"), (&[1], "ac"), (&[1, 0], "c"), (&[1, 0, 2], "abc"), (&[1, 0, 2, 2], "ab")]
        {
            assert_eq!(left(asked), expected, "{asked:?}");
        }
        assert!(least_asked(std::iter::empty(), &[]).is_empty());
    }
}
