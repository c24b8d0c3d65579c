//! Topological order, cycles and reachability on indices.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Sorts indices topologically, inputs first, otherwise by index.
///
/// # Errors
/// The indices that lie on cycles or depend on one.
pub fn sort(needs: &[Vec<usize>]) -> Result<Vec<usize>, Vec<usize>> {
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); needs.len()];
    let mut waits: Vec<usize> = vec![0; needs.len()];
    for (user, inputs) in needs.iter().enumerate() {
        for input in inputs {
            users[*input].push(user);
            waits[user] += 1;
        }
    }
    let mut ready: BinaryHeap<Reverse<usize>> =
        waits.iter().enumerate().filter(|(_, waits)| **waits == 0).map(|(n, _)| Reverse(n)).collect();
    let mut order = Vec::with_capacity(needs.len());
    while let Some(Reverse(next)) = ready.pop() {
        order.push(next);
        for user in &users[next] {
            waits[*user] -= 1;
            if waits[*user] == 0 {
                ready.push(Reverse(*user));
            }
        }
    }
    if order.len() == needs.len() { Ok(order) } else { Err((0..needs.len()).filter(|n| waits[*n] > 0).collect()) }
}

/// Disjoint cycles among `left`, the error of [`sort`]: each member needs the next one, the last needs the first.
pub fn cycles(needs: &[Vec<usize>], left: &[usize]) -> Vec<Vec<usize>> {
    const UNSEEN: usize = usize::MAX;
    const DONE: usize = usize::MAX - 1;
    // Position on the current walk, or one of the constants above.
    let mut state = vec![DONE; needs.len()];
    for n in left {
        state[*n] = UNSEEN;
    }
    let mut cycles = Vec::new();
    for start in left {
        let mut walk: Vec<(usize, usize)> = Vec::new();
        if state[*start] == UNSEEN {
            state[*start] = 0;
            walk.push((*start, 0));
        }
        while let Some((node, next)) = walk.last_mut() {
            let Some(input) = needs[*node].get(*next).copied() else {
                state[*node] = DONE;
                walk.pop();
                continue;
            };
            *next += 1;
            match state[input] {
                UNSEEN => {
                    state[input] = walk.len();
                    walk.push((input, 0));
                }
                DONE => {}
                at => {
                    cycles.push(walk[at..].iter().map(|(node, _)| *node).collect());
                    for (node, _) in walk.drain(..) {
                        state[node] = DONE;
                    }
                }
            }
        }
    }
    cycles
}

/// For each index, whether it is a target or needed by one.
pub fn needed(needs: &[Vec<usize>], targets: &[usize]) -> Vec<bool> {
    let mut needed = vec![false; needs.len()];
    let mut pending = targets.to_vec();
    while let Some(next) = pending.pop() {
        if !std::mem::replace(&mut needed[next], true) {
            pending.extend(&needs[next]);
        }
    }
    needed
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_order_follows_the_index_where_needs_allow() {
        assert_eq!(sort(&[vec![2], vec![], vec![1]]), Ok(vec![1, 2, 0]));
        assert_eq!(sort(&[vec![], vec![0], vec![]]), Ok(vec![0, 1, 2]));
    }

    #[test]
    fn cycles_are_found_with_their_path() {
        let needs = [vec![1], vec![2], vec![0], vec![0], vec![4]];
        let left = sort(&needs).expect_err("there are cycles");
        assert_eq!(left, [0, 1, 2, 3, 4]);
        assert_eq!(cycles(&needs, &left), [vec![0, 1, 2], vec![4]]);
    }

    proptest! {
        #[test]
        fn a_graph_without_an_order_has_a_cycle(edges in prop::collection::vec((0..12_usize, 0..12_usize), 0..30)) {
            let mut needs = vec![Vec::new(); 12];
            for (user, input) in edges {
                needs[user].push(input);
            }
            match sort(&needs) {
                Ok(order) => {
                    let state = |n| order.iter().position(|m| *m == n).expect("all are in the order");
                    for (user, inputs) in needs.iter().enumerate() {
                        prop_assert!(inputs.iter().all(|input| state(*input) < state(user)));
                    }
                }
                Err(left) => {
                    let found = cycles(&needs, &left);
                    prop_assert!(!found.is_empty());
                    for cycle in found {
                        for (n, node) in cycle.iter().enumerate() {
                            prop_assert!(needs[*node].contains(&cycle[(n + 1) % cycle.len()]));
                        }
                    }
                }
            }
        }
    }
}
