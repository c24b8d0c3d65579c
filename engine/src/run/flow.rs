//! Carries one message per edge of a graph over dagrs, and asks for each node's message.
//!
//! This is the only module that uses dagrs 0.9. dagrs hangs or drops work unless used like this: only `DefaultNode`
//! with our own action, exactly one message to every child on every path, exactly one read from every parent, and an
//! action that always returns `Ok`.

use std::collections::BTreeMap;
use std::sync::Arc;

use dagrs::async_trait::async_trait;
use dagrs::{Action, Content, DefaultNode, EnvVar, Graph, InChannels, NodeId, NodeTable, OutChannels, Output};
use tokio::sync::oneshot;

use crate::error::{Error, Result};
use crate::names::Digest;

/// A node's message to its children. Numbers are instance indices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeMessage {
    /// The artifact exists, made or reused.
    Available(Digest),
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
pub struct NodeQuery {
    pub node: usize,
    /// The parents' messages.
    pub parent_messages: BTreeMap<usize, NodeMessage>,
    pub reply: oneshot::Sender<NodeMessage>,
}

/// Carries messages until every node has been asked about and answered. `parents` gives each node's parents among the
/// nodes; `on_query` is called from this thread and must not block. Runs its own single-threaded tokio runtime.
///
/// # Errors
/// When dagrs or tokio fails; a node's failure is a message.
pub fn carry_messages(
    parents: &BTreeMap<usize, Vec<usize>>,
    on_query: impl Fn(NodeQuery) + Clone + Send + Sync + 'static,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .map_err(|e| Error::environment(format!("cannot start a tokio runtime: {e}")))?;
    let internal = |e: dagrs::DagrsError| Error::internal(format!("dagrs: {e}"));
    let mut table = NodeTable::new();
    let mut ids = BTreeMap::new();
    let mut children: BTreeMap<usize, Vec<NodeId>> = BTreeMap::new();
    let mut graph = Graph::new();
    for (&node, its_parents) in parents {
        let from = its_parents
            .iter()
            .map(|parent| ids.get(parent).map(|id| (*parent, *id)))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| Error::internal(format!("node {node} comes before one of its parents")))?;
        let action = Relay { node, from: from.clone(), on_query: on_query.clone() };
        let id = graph.add_node(DefaultNode::with_action(node.to_string(), action, &mut table)).map_err(internal)?;
        ids.insert(node, id);
        for (parent, _) in from {
            children.entry(parent).or_default().push(id);
        }
    }
    for (node, children) in children {
        graph.add_edge(ids[&node], children).map_err(internal)?;
    }
    graph.set_env(EnvVar::new(table));
    runtime.block_on(graph.async_start()).map(|_| ()).map_err(internal)
}

struct Relay<F> {
    node: usize,
    from: Vec<(usize, NodeId)>,
    on_query: F,
}

#[async_trait]
impl<F: Fn(NodeQuery) + Send + Sync + 'static> Action for Relay<F> {
    async fn run(&self, inputs: &mut InChannels, outputs: &mut OutChannels, _: Arc<EnvVar>) -> Output {
        let mut parent_messages = BTreeMap::new();
        for (parent, id) in &self.from {
            let message = match inputs.recv_from(id).await {
                Ok(content) => content.get::<NodeMessage>().cloned(),
                Err(_) => None,
            };
            parent_messages
                .insert(*parent, message.unwrap_or_else(|| NodeMessage::Lost("a parent sent no message".into())));
        }
        let (reply, answer) = oneshot::channel();
        let query = NodeQuery { node: self.node, parent_messages, reply };
        // A panic here would lose the message to the children; dagrs would then hang or drop later work.
        let called = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| (self.on_query)(query)));
        let message = match called {
            Ok(()) => answer.await.unwrap_or_else(|_| NodeMessage::Lost("the scheduler did not reply".into())),
            Err(panic) => NodeMessage::Lost(crate::attempt::panic_message(&*panic)),
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

    fn available() -> NodeMessage {
        NodeMessage::Available(Digest::of(b""))
    }

    fn nodes_asked(parents: &BTreeMap<usize, Vec<usize>>, f: impl Fn(NodeQuery) + Send + Sync + 'static) -> Vec<usize> {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (seen, f) = (asked.clone(), Arc::new(f));
        carry_messages(parents, move |query| {
            seen.lock().unwrap().push(query.node);
            f(query);
        })
        .unwrap();
        let asked = asked.lock().unwrap();
        asked.clone()
    }

    #[test]
    fn every_node_is_queried_once_after_its_parents() {
        let parents = BTreeMap::from([(0, vec![]), (1, vec![0]), (2, vec![0]), (5, vec![1, 2]), (7, vec![])]);
        let asked = nodes_asked(&parents, |query| drop(query.reply.send(available())));
        assert_eq!(asked.len(), 5);
        let position = |n| asked.iter().position(|a| *a == n).unwrap();
        assert!(
            position(0) < position(1)
                && position(0) < position(2)
                && position(1) < position(5)
                && position(2) < position(5)
        );
    }

    #[test]
    fn the_children_of_a_query_that_panics_or_is_dropped_are_reported_lost() {
        let received = Arc::new(Mutex::new(Vec::new()));
        let seen = received.clone();
        nodes_asked(&chain(4), move |query| {
            seen.lock().unwrap().extend(query.parent_messages.values().cloned());
            match query.node {
                0 => panic!("boom"),
                1 => drop(query.reply),
                _ => drop(query.reply.send(NodeMessage::Skipped { root: 0 })),
            }
        });
        let received = received.lock().unwrap();
        assert_eq!(received[0], NodeMessage::Lost("boom".into()));
        assert!(matches!(received[1], NodeMessage::Lost(_)));
        assert_eq!(received[2], NodeMessage::Skipped { root: 0 });
    }

    #[test]
    fn a_wide_and_a_deep_graph_finish() {
        let count = Arc::new(AtomicUsize::new(0));
        for mut parents in [chain(2000), (0..2000).map(|i| (i, if i == 0 { vec![] } else { vec![0] })).collect()] {
            parents.insert(2000, (0..2000).collect());
            let counter = count.clone();
            nodes_asked(&parents, move |query| {
                counter.fetch_add(1, Ordering::Relaxed);
                drop(query.reply.send(available()));
            });
        }
        assert_eq!(count.load(Ordering::Relaxed), 4002);
    }
}
