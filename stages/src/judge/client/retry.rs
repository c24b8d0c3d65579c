//! Whether and when to retry a failed request, following the API's documentation and official clients. Pure.

use std::time::{Duration, SystemTime};

use chrono::DateTime;
use reqwest::header::HeaderMap;
use serde_json::Value;

use crate::judge::provider::Protocol;

/// Maximum number of tries per request.
pub const TRIES: u32 = 8;
/// Default wait before the second try.
pub const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Maximum of the default waits.
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// A server that asks for a longer wait causes an error.
pub const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Whether a response with this status and body is worth another try. Never if the request itself is wrong or no money
/// is left; otherwise the server's `x-should-retry` decides, or else the status.
pub fn is_passing(protocol: &Protocol, status: u16, headers: &HeaderMap, body: &Value) -> bool {
    if matches!(status, 400..=404 | 413) || (protocol.is_spent)(status, body) {
        return false;
    }
    match headers.get("x-should-retry").and_then(|v| v.to_str().ok()) {
        Some("true") => true,
        Some("false") => false,
        _ => matches!(status, 408 | 409 | 429 | 500..),
    }
}

/// The wait that the server asks for: `retry-after-ms`, or else `retry-after` in seconds or as a date, relative to the
/// server's own clock if it sends one.
pub fn asked_wait(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let number = |name: &str| text(name)?.parse::<f64>().ok();
    let seconds = number("retry-after-ms").map(|ms| ms / 1000.0).or_else(|| number("retry-after"));
    if let Some(seconds) = seconds {
        // Far above any accepted wait, but still a valid duration.
        return (seconds >= 0.0).then(|| Duration::from_secs_f64(seconds.min(1e6)));
    }
    let until = SystemTime::from(DateTime::parse_from_rfc2822(text("retry-after")?).ok()?);
    Some(until.duration_since(server_time(headers).unwrap_or(now)).unwrap_or_default())
}

/// The server's clock at its response, to the second.
pub fn server_time(headers: &HeaderMap) -> Option<SystemTime> {
    let date = headers.get("date")?.to_str().ok()?;
    DateTime::parse_from_rfc2822(date.trim()).ok().map(SystemTime::from)
}

/// The wait before a try: `first` before the second one, then doubling up to a minute, reduced by up to a quarter by
/// `jitter` in [0, 1), so that clients that failed together do not retry together.
pub fn backoff(first: Duration, failed: u32, jitter: f64) -> Duration {
    let doubled = first * (1 << failed.saturating_sub(1).min(16));
    doubled.min(LONGEST_BACKOFF).mul_f64(1.0 - 0.25 * jitter)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::judge::providers::anthropic::PROTOCOL;

    fn is_passing(status: u16, headers: &HeaderMap, body: &Value) -> bool {
        super::is_passing(&PROTOCOL, status, headers, body)
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn what_passes_is_tried_again_unless_the_server_says_otherwise() {
        let none = headers(&[]);
        for status in [408, 409, 429, 500, 502, 503, 504, 529] {
            assert!(is_passing(status, &none, &Value::Null), "{status}");
            assert!(!is_passing(status, &headers(&[("x-should-retry", "false")]), &Value::Null), "{status}");
        }
        assert!(!is_passing(422, &none, &Value::Null));
        assert!(is_passing(422, &headers(&[("x-should-retry", "true")]), &Value::Null));
        for status in [400, 401, 402, 403, 404, 413] {
            assert!(!is_passing(status, &headers(&[("x-should-retry", "true")]), &Value::Null), "{status}");
        }
    }

    #[test]
    fn an_account_that_may_spend_no_more_is_known_by_each_of_its_answers() {
        let is_spent = PROTOCOL.is_spent;
        let spent = json!({ "error": { "type": "rate_limit_error", "message": "m", "details": { "error_code": "enforced_spend_limit_reached" } } });
        assert!(is_spent(429, &spent) && !is_passing(429, &headers(&[("x-should-retry", "true")]), &spent));
        let limit = json!({ "error": { "message": "You have reached your specified API usage limits. You will regain access on 2027-01-01" } });
        assert!(is_spent(400, &limit));
        let workspace =
            json!({ "error": { "message": "You have reached your specified workspace API usage limits." } });
        assert!(is_spent(400, &workspace));
        assert!(!is_spent(400, &json!({ "error": { "message": "max_tokens: Field required" } })));
        assert!(!is_spent(429, &json!({ "error": { "message": "too many requests" } })));
    }

    #[test]
    fn the_server_says_how_long_in_milliseconds_in_seconds_or_by_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_445_412_480); // Wed, 21 Oct 2015 07:28:00 GMT
        let wait = |pairs: &[(&'static str, &str)]| asked_wait(&headers(pairs), now);
        assert_eq!(wait(&[("retry-after-ms", "1500"), ("retry-after", "9")]), Some(Duration::from_millis(1500)));
        assert_eq!(wait(&[("retry-after", "2.5")]), Some(Duration::from_millis(2500)));
        assert_eq!(wait(&[("retry-after", "Wed, 21 Oct 2015 07:28:30 GMT")]), Some(Duration::from_secs(30)));
        // Uses the server's clock, whatever the local clock says.
        let date = ("date", "Wed, 21 Oct 2015 07:28:20 GMT");
        assert_eq!(wait(&[("retry-after", "Wed, 21 Oct 2015 07:28:30 GMT"), date]), Some(Duration::from_secs(10)));
        assert_eq!(wait(&[("retry-after", "Wed, 21 Oct 2015 07:00:00 GMT")]), Some(Duration::ZERO));
        for nonsense in ["soon", "-3", "NaN", ""] {
            assert_eq!(wait(&[("retry-after", nonsense)]), None, "{nonsense}");
        }
    }

    #[test]
    fn our_own_waits_double_up_to_a_minute_and_jitter_only_shortens_them() {
        let waits: Vec<f64> = (1..=9).map(|failed| backoff(FIRST_WAIT, failed, 0.0).as_secs_f64()).collect();
        assert_eq!(waits, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]);
        assert_eq!(backoff(FIRST_WAIT, 3, 0.999_999).as_millis(), 1500);
    }
}
