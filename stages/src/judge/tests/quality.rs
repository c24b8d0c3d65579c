//! Tests of the metrics of label consistency.

use super::*;

fn quality(server: &Server, with: Value) -> (std::collections::BTreeMap<String, f64>, usize) {
    let store = tempfile::tempdir().unwrap();
    let bench = bench((0..40).map(pair).collect());
    let seen = asked(&bench, &server.endpoint, store.path(), with);
    assert_eq!(seen.rows().len(), 40, "what is asked for quality adds no row");
    (seen.metrics(), server.count())
}

#[test]
fn a_model_that_reads_agrees_with_itself_and_has_no_favourite_place() {
    let server = Server::fine();
    let (metrics, requests) = quality(&server, json!({ "swap_share": 1, "repeat_share": 1 }));
    assert_eq!(requests, 60);
    assert_eq!([metrics["swap_consistency"], metrics["repeat_consistency"]], [1.0, 1.0]);
    assert!(metrics["swap_consistency_low"] > 0.9 && metrics["swap_consistency_high"] == 1.0, "{metrics:?}");
    let (low, high) = (metrics["first_shown_share_low"], metrics["first_shown_share_high"]);
    assert!(low < 0.5 && 0.5 < high, "{metrics:?}");
    let slots = ["first_shown_share_slot_1", "first_shown_share_slot_2"].map(|slot| metrics[slot]);
    assert!((slots[0] + slots[1]) / 2.0 - metrics["first_shown_share"] < 1e-9, "{metrics:?}");
}

#[test]
fn a_model_that_takes_the_first_is_found_out() {
    let first = |body: &Value| {
        let labels: serde_json::Map<String, Value> =
            documents(body).into_iter().map(|(n, _)| (format!("doc.{n}.chosen.summary"), json!(1))).collect();
        let content = json!([{ "type": "text", "text": Value::Object(labels).to_string() }]);
        json!({ "stop_reason": "end_turn", "content": content })
    };
    let server = Server::new(Rules { judge: Box::new(first), ..Rules::default() });
    let (metrics, _) = quality(&server, json!({ "swap_share": 1, "repeat_share": 1 }));
    assert_eq!(
        [metrics["swap_consistency"], metrics["repeat_consistency"], metrics["first_shown_share"]],
        [0.0, 1.0, 1.0]
    );
    assert!(metrics["swap_consistency_high"] < 0.2 && metrics["first_shown_share_low"] > 0.8, "{metrics:?}");
}

#[test]
fn a_share_of_the_pairs_is_asked_again_chosen_by_content() {
    let server = Server::fine();
    let (metrics, requests) = quality(&server, json!({ "swap_share": 0.25, "repeat_share": 0 }));
    assert!((22..=30).contains(&requests), "{requests}");
    assert!(metrics.contains_key("swap_consistency") && !metrics.contains_key("repeat_consistency"));
}
