//! Carries one message per edge of a graph over dagrs, and asks for each node's message.
//!
//! This is the only module that uses dagrs 0.9. dagrs hangs or drops work unless used like this: only `DefaultNode`
//! with our own action, exactly one message to every child on every path, exactly one read from every parent, and an
//! action that always returns `Ok`.
//! returns `Ok`.

use std::collections::BTreeMap;
use std::sync::Arc;

use dagrs::async_trait::async_trait;
use dagrs::{Action, Content, DefaultNode, EnvVar, Graph, InChannels, NodeId, NodeTable, OutChannels, Output};
use tokio::sync::oneshot;

use crate::error::{Error, Result};
use crate::names::Digest;

/// A node's message to its children. Numbers are instance indices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The artifact exists, made or reused.
    Ready(Digest),
    /// The node failed.
    Failed,
    /// The node did not run, because the node `root` failed.
    Skipped { root: usize },
    /// The node did not run, because the run is ending.
    Cancelled,
    /// No answer could be obtained for the node: an internal error.
    Lost(String),
}

/// A question about a node whose parents have all answered; the reply is the node's own message.
#[derive(Debug)]
pub struct Ask {
    pub node: usize,
    /// The parents' messages.
    pub heard: BTreeMap<usize, Message>,
    pub reply: oneshot::Sender<Message>,
}

/// Carries messages until every node has been asked about and answered. `parents` gives each node's parents among the
/// nodes; `ask` is called from this thread and must not block. Runs its own single-threaded tokio runtime.
///
/// # Errors
/// When dagrs or tokio fails; a node's failure is a message.
pub fn carry(parents: &BTreeMap<usize, Vec<usize>>, ask: impl Fn(Ask) + Clone + Send + Sync + 'static) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .map_err(|e| Error::surroundings(format!("cannot start a tokio runtime: {e}")))?;
    let ours = |e: dagrs::DagrsError| Error::ours(format!("dagrs: {e}"));
    let mut table = NodeTable::new();
    let mut ids = BTreeMap::new();
    let mut children: BTreeMap<usize, Vec<NodeId>> = BTreeMap::new();
    let mut graph = Graph::new();
    for (&node, its_parents) in parents {
        let from = its_parents
            .iter()
            .map(|parent| ids.get(parent).map(|id| (*parent, *id)))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| Error::ours(format!("node {node} stands before one of its parents")))?;
        let action = Relay { node, from: from.clone(), ask: ask.clone() };
        let id = graph.add_node(DefaultNode::with_action(node.to_string(), action, &mut table)).map_err(ours)?;
        ids.insert(node, id);
        for (parent, _) in from {
            children.entry(parent).or_default().push(id);
        }
    }
    for (node, children) in children {
        graph.add_edge(ids[&node], children).map_err(ours)?;
    }
    graph.set_env(EnvVar::new(table));
    runtime.block_on(graph.async_start()).map(|_| ()).map_err(ours)
}

struct Relay<F> {
    node: usize,
    from: Vec<(usize, NodeId)>,
    ask: F,
}

#[async_trait]
impl<F: Fn(Ask) + Send + Sync + 'static> Action for Relay<F> {
    async fn run(&self, inputs: &mut InChannels, outputs: &mut OutChannels, _: Arc<EnvVar>) -> Output {
        let mut heard = BTreeMap::new();
        for (parent, id) in &self.from {
            let message = match inputs.recv_from(id).await {
                Ok(content) => content.get::<Message>().cloned(),
                Err(_) => None,
            };
            heard.insert(*parent, message.unwrap_or_else(|| Message::Lost("a parent said nothing".into())));
        }
        let (reply, answer) = oneshot::channel();
        let ask = Ask { node: self.node, heard, reply };
        // A panic here would lose the message to the children; dagrs would then hang or drop later work.
        let asked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| (self.ask)(ask)));
        let message = match asked {
            Ok(()) => answer.await.unwrap_or_else(|_| Message::Lost("nobody answered for it".into())),
            Err(panic) => Message::Lost(crate::attempt::panic_message(&*panic)),
        };
        outputs.broadcast(Content::new(message)).await;
        Output::empty()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn chain(n: usize) -> BTreeMap<usize, Vec<usize>> {
        (0..n).map(|i| (i, if i == 0 { vec![] } else { vec![i - 1] })).collect()
    }

    fn ready() -> Message {
        Message::Ready(Digest::of(b""))
    }

    fn answers_of(parents: &BTreeMap<usize, Vec<usize>>, f: impl Fn(Ask) + Send + Sync + 'static) -> Vec<usize> {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (seen, f) = (asked.clone(), Arc::new(f));
        carry(parents, move |ask| {
            seen.lock().unwrap().push(ask.node);
            f(ask);
        })
        .unwrap();
        let asked = asked.lock().unwrap();
        asked.clone()
    }

    #[test]
    fn every_node_is_asked_once_after_its_parents() {
        let parents = BTreeMap::from([(0, vec![]), (1, vec![0]), (2, vec![0]), (5, vec![1, 2]), (7, vec![])]);
        let asked = answers_of(&parents, |ask| drop(ask.reply.send(ready())));
        assert_eq!(asked.len(), 5);
        let place = |n| asked.iter().position(|a| *a == n).unwrap();
        assert!(place(0) < place(1) && place(0) < place(2) && place(1) < place(5) && place(2) < place(5));
    }

    #[test]
    fn an_ask_that_panics_or_is_dropped_is_told_to_the_children_and_does_not_hang() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let hear = told.clone();
        answers_of(&chain(4), move |ask| {
            hear.lock().unwrap().extend(ask.heard.values().cloned());
            match ask.node {
                0 => panic!("boom"),
                1 => drop(ask.reply),
                _ => drop(ask.reply.send(Message::Skipped { root: 0 })),
            }
        });
        let told = told.lock().unwrap();
        assert_eq!(told[0], Message::Lost("boom".into()));
        assert!(matches!(told[1], Message::Lost(_)));
        assert_eq!(told[2], Message::Skipped { root: 0 });
    }

    #[test]
    fn a_wide_and_a_deep_graph_finish() {
        let count = Arc::new(AtomicUsize::new(0));
        for mut parents in [chain(2000), (0..2000).map(|i| (i, if i == 0 { vec![] } else { vec![0] })).collect()] {
            parents.insert(2000, (0..2000).collect());
            let counter = count.clone();
            answers_of(&parents, move |ask| {
                counter.fetch_add(1, Ordering::Relaxed);
                drop(ask.reply.send(ready()));
            });
        }
        assert_eq!(count.load(Ordering::Relaxed), 4002);
    }
}
