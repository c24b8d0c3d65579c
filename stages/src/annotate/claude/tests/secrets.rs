//! The key goes to the API and nowhere else.

use super::*;

/// Every file below a folder that holds the key.
fn leaks(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(leaks(&path));
        } else if String::from_utf8_lossy(&std::fs::read(&path).unwrap()).contains("sk-secret") {
            found.push(path);
        }
    }
    found
}

#[test]
fn a_server_that_says_the_key_everywhere_leaves_it_nowhere() {
    let server = Server::new(Box::new(|n, body| {
        let told = "your key is sk-secret";
        match n {
            0 => (529, "retry-after: 0\r\n".into(), json!({ "error": { "message": told } })),
            1 => (400, format!("request-id: {told}\r\n"), json!({ "error": { "message": told } })),
            2 | 3 => {
                let mut answer = good(body);
                answer["content"][0]["text"] = told.into();
                answer["sk-secret"] = json!([told, { "sk-secret": 1 }]);
                (200, String::new(), answer)
            }
            40.. => (401, String::new(), json!({ "error": { "message": told } })),
            _ => (200, String::new(), good(body)),
        }
    }));
    let store = tempfile::tempdir().unwrap();
    let seen = asked(&bench((0..60).map(pair).collect()), &server.endpoint, store.path(), json!({}));
    assert!(seen.rows().iter().any(|row| row.outcome == Outcome::Unparsable));
    assert_eq!(leaks(store.path()), Vec::<std::path::PathBuf>::new());
    assert_eq!(leaks(seen.out.path()), Vec::<std::path::PathBuf>::new());
    assert!(!seen.rows().iter().any(|row| format!("{row:?}").contains("sk-secret")));
    assert!(!seen.warnings.is_empty() && !seen.warnings.concat().contains("sk-secret"), "{:?}", seen.warnings);

    let seen = asked(&bench((60..90).map(pair).collect()), &server.endpoint, store.path(), json!({}));
    assert!(
        !seen.error().to_string().contains("sk-secret") && seen.error().message.contains("401"),
        "{}",
        seen.error()
    );
    assert_eq!(leaks(store.path()), Vec::<std::path::PathBuf>::new());
}
