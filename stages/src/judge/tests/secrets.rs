//! Tests that the API key is sent to the API and appears nowhere else.

use super::*;

/// Every file below `folder` that contains the key.
pub fn leaks(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(leaks(&path));
        } else if String::from_utf8_lossy(&std::fs::read(&path).unwrap()).contains(fake_api::KEY) {
            found.push(path);
        }
    }
    found
}

#[test]
fn a_server_that_says_the_key_everywhere_leaves_it_nowhere() {
    let server = Server::scripted(|n, body| {
        let says = format!("your key is {}", fake_api::KEY);
        match n {
            0 => Some(told(529, &says).with("retry-after", 0)),
            1 => Some(told(400, &says).with("request-id", &says)),
            2 | 3 => {
                let mut answer = fake_api::judge(body);
                answer["content"][0]["text"] = says.clone().into();
                answer[fake_api::KEY] = json!([says, { (fake_api::KEY): 1 }]);
                Some(Fault::Says(answer))
            }
            40.. => Some(told(401, &says)),
            _ => None,
        }
    });
    let store = tempfile::tempdir().unwrap();
    let seen = asked(&bench((0..60).map(pair).collect()), &server.endpoint, store.path(), json!({}));
    assert!(seen.rows().iter().any(|row| row.outcome == Outcome::Unparsable));
    assert_eq!(leaks(store.path()), Vec::<std::path::PathBuf>::new());
    assert_eq!(leaks(seen.out.path()), Vec::<std::path::PathBuf>::new());
    assert!(!seen.rows().iter().any(|row| format!("{row:?}").contains(fake_api::KEY)));
    assert!(!seen.warnings.is_empty() && !seen.warnings.concat().contains(fake_api::KEY), "{:?}", seen.warnings);

    let seen = asked(&bench((60..90).map(pair).collect()), &server.endpoint, store.path(), json!({}));
    assert!(
        !seen.error().to_string().contains(fake_api::KEY) && seen.error().message.contains("401"),
        "{}",
        seen.error()
    );
    assert_eq!(leaks(store.path()), Vec::<std::path::PathBuf>::new());
}
