//! Delays requests before they reach the API's rate limits, using the remaining quota in its responses. Pure: time is
//! an argument.

use std::time::{Duration, Instant, SystemTime};

use chrono::DateTime;
use reqwest::header::HeaderMap;

use super::retry;

/// Quantities limited by the API, as in the names of its headers.
const COUNTED: [&str; 3] = ["requests", "input-tokens", "output-tokens"];
/// Weight of the past in the moving average of usage per request.
const MEMORY: f64 = 0.8;

/// State of one limit. The API refills its buckets continuously.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    limit: f64,
    left: f64,
    /// Time at which `left` was valid.
    at: Instant,
    /// Amount refilled each second.
    rate: f64,
}

impl Bucket {
    fn left(&self, now: Instant) -> f64 {
        (self.left + self.rate * now.saturating_duration_since(self.at).as_secs_f64()).min(self.limit)
    }
}

/// Decides when the next request may be sent.
#[derive(Debug)]
pub struct RateLimiter {
    buckets: [Option<Bucket>; 3],
    /// Moving average of the usage of one request, by quantity.
    usual: [Option<f64>; 3],
    under_way: u32,
    /// End of a wait that the API asked for.
    closed_until: Option<Instant>,
}

impl Default for RateLimiter {
    fn default() -> Self {
        // Each request counts as one request.
        Self { buckets: [None; 3], usual: [Some(1.0), None, None], under_way: 0, closed_until: None }
    }
}

impl RateLimiter {
    /// `None` if a request may be sent now; it then counts as in progress until [`RateLimiter::ended`]. Otherwise the time to
    /// wait before trying again.
    pub fn admit(&mut self, now: Instant) -> Option<Duration> {
        if let Some(until) = self.closed_until.filter(|until| *until > now) {
            return Some(until - now);
        }
        let wait = (0..COUNTED.len()).filter_map(|i| self.lacking(i, now)).max();
        if wait.is_none() {
            self.under_way += 1;
            for (bucket, usual) in self.buckets.iter_mut().zip(self.usual) {
                if let (Some(bucket), Some(usual)) = (bucket, usual) {
                    (bucket.left, bucket.at) = (bucket.left(now) - usual, now);
                }
            }
        }
        wait
    }

    /// Time until a bucket has room for one more request.
    fn lacking(&self, i: usize, now: Instant) -> Option<Duration> {
        let (bucket, usual) = (self.buckets[i]?, self.usual[i]?);
        // A request larger than the bucket waits until the bucket is full.
        let short = usual.min(bucket.limit) - bucket.left(now);
        // Differences below the rounding error are ignored.
        if short <= 1e-6 || bucket.rate <= 0.0 {
            return None;
        }
        Some(Duration::from_secs_f64((short / bucket.rate).clamp(0.001, 60.0)))
    }

    /// Records that a request has ended, whatever its result.
    pub fn ended(&mut self) {
        self.under_way = self.under_way.saturating_sub(1);
    }

    /// Records that the API asked for a wait: no request is sent before its end.
    pub fn close(&mut self, now: Instant, wait: Duration) {
        let until = now + wait;
        self.closed_until = Some(self.closed_until.map_or(until, |other| other.max(until)));
    }

    /// Updates the limits from response headers whose names begin with `prefix`.
    pub fn update(&mut self, prefix: &str, now: Instant, clock: SystemTime, headers: &HeaderMap) {
        let clock = retry::server_time(headers).unwrap_or(clock);
        for (i, counted) in COUNTED.iter().enumerate() {
            let text = |what: &str| headers.get(format!("{prefix}-{counted}-{what}"))?.to_str().ok();
            let number = |what: &str| text(what)?.trim().parse::<f64>().ok().filter(|n| n.is_finite() && *n >= 0.0);
            let (Some(limit), Some(left)) = (number("limit"), number("remaining")) else { continue };
            let reset = text("reset").and_then(|text| DateTime::parse_from_rfc3339(text.trim()).ok());
            let until = reset.and_then(|reset| SystemTime::from(reset).duration_since(clock).ok());
            // Limits are per minute, and a bucket is full by its reset time. The slower of both rates is used, because
            // the remaining quota is given in round numbers.
            let seconds = until.map(|until| until.as_secs_f64()).filter(|s| *s > 0.0 && left < limit);
            let rate = seconds.map_or(limit / 60.0, |seconds| ((limit - left) / seconds).min(limit / 60.0));
            // Responses may arrive out of order, and requests in progress may be missing from a response's count. The
            // local count is better for this client's own requests, the API's count if others share the limits.
            let others = f64::from(self.under_way.saturating_sub(1)) * self.usual[i].unwrap_or(0.0);
            let ours = self.buckets[i].map_or(left - others, |bucket| bucket.left(now));
            self.buckets[i] = Some(Bucket { limit, left: left.min(ours).min(limit), at: now, rate });
        }
    }

    /// Records the usage of an answer: input tokens not read from a cache, and output tokens.
    pub fn record_usage(&mut self, input: u64, output: u64) {
        for (i, tokens) in [(1, input), (2, output)] {
            let tokens = tokens as f64;
            self.usual[i] = Some(self.usual[i].map_or(tokens, |usual| MEMORY * usual + (1.0 - MEMORY) * tokens));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFIX: &str = "anthropic-ratelimit";
    const SECOND: Duration = Duration::from_secs(1);

    fn headers(counted: &str, limit: u32, left: u32, reset: &str) -> HeaderMap {
        let pairs = [("limit", limit.to_string()), ("remaining", left.to_string()), ("reset", reset.to_owned())];
        let named = pairs.into_iter().map(|(what, value)| (format!("anthropic-ratelimit-{counted}-{what}"), value));
        named
            .map(|(name, value)| (name.parse::<reqwest::header::HeaderName>().unwrap(), value.parse().unwrap()))
            .collect()
    }

    /// One minute before `RESET`.
    fn clock() -> SystemTime {
        DateTime::parse_from_rfc3339("2026-11-25T09:00:00Z").unwrap().into()
    }

    const RESET: &str = "2026-11-25T09:01:00Z";

    #[test]
    fn without_a_word_from_the_api_nothing_is_held_back() {
        let (mut limiter, now) = (RateLimiter::default(), Instant::now());
        assert!((0..1000).all(|_| limiter.admit(now).is_none()));
    }

    #[test]
    fn requests_wait_for_the_refill_instead_of_being_turned_away() {
        let (mut limiter, now) = (RateLimiter::default(), Instant::now());
        // 100 fit, 3 are left, 97 are refilled within a minute.
        limiter.update(PREFIX, now, clock(), &headers("requests", 100, 3, RESET));
        assert!((0..3).all(|_| limiter.admit(now).is_none()));
        let wait = limiter.admit(now).unwrap();
        assert!((wait.as_secs_f64() - 60.0 / 97.0).abs() < 1e-6, "{wait:?}");
        assert_eq!(limiter.admit(now + wait), None);
        // A late response to an earlier request does not count the others.
        limiter.update(PREFIX, now + wait, clock(), &headers("requests", 100, 60, RESET));
        assert!(limiter.admit(now + wait).is_some());
        // Another client uses the same limits.
        limiter.update(PREFIX, now + 10 * SECOND, clock(), &headers("requests", 100, 1, RESET));
        assert_eq!(
            [limiter.admit(now + 10 * SECOND).is_none(), limiter.admit(now + 10 * SECOND).is_none()],
            [true, false]
        );
    }

    #[test]
    fn what_was_sent_before_anything_was_known_counts() {
        let (mut limiter, now) = (RateLimiter::default(), Instant::now());
        assert!((0..4).all(|_| limiter.admit(now).is_none()));
        // The first response may not count the other three requests.
        limiter.update(PREFIX, now, clock(), &headers("requests", 100, 5, RESET));
        assert_eq!([0, 1, 2].map(|_| limiter.admit(now).is_none()), [true, true, false]);
    }

    #[test]
    fn tokens_are_held_back_by_what_requests_usually_take() {
        let (mut limiter, now) = (RateLimiter::default(), Instant::now());
        limiter.update(PREFIX, now, clock(), &headers("input-tokens", 10_000, 2_500, RESET));
        limiter.record_usage(1_000, 20);
        assert_eq!([limiter.admit(now), limiter.admit(now)], [None, None]);
        let wait = limiter.admit(now).unwrap();
        // 500 are left, 125 are refilled each second.
        assert!((wait.as_secs_f64() - 4.0).abs() < 1e-6, "{wait:?}");
    }

    #[test]
    fn a_request_larger_than_the_limit_goes_when_the_bucket_is_full() {
        let (mut limiter, now) = (RateLimiter::default(), Instant::now());
        limiter.update(PREFIX, now, clock(), &headers("output-tokens", 100, 50, RESET));
        limiter.record_usage(1, 400);
        assert_eq!(limiter.admit(now), Some(60 * SECOND));
        assert_eq!(limiter.admit(now + 60 * SECOND), None);
    }

    #[test]
    fn a_wait_that_the_api_asked_for_holds_everybody() {
        let (mut limiter, now) = (RateLimiter::default(), Instant::now());
        limiter.close(now, 5 * SECOND);
        limiter.close(now, SECOND);
        assert_eq!(limiter.admit(now + SECOND), Some(4 * SECOND));
        assert_eq!(limiter.admit(now + 5 * SECOND), None);
    }

    #[test]
    fn nonsense_in_a_header_counts_for_nothing() {
        let (mut limiter, now) = (RateLimiter::default(), Instant::now());
        limiter.update(PREFIX, now, clock(), &headers("requests", 100, 100, "yesterday"));
        assert!((0..100).all(|_| limiter.admit(now).is_none()));
        let mut odd = headers("requests", 1, 1, RESET);
        odd.insert("anthropic-ratelimit-requests-remaining", "NaN".parse().unwrap());
        let mut fresh = RateLimiter::default();
        fresh.update(PREFIX, now, clock(), &odd);
        assert!((0..100).all(|_| fresh.admit(now).is_none()));
    }
}
