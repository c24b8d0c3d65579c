//! A small template language: `{slot}` is filled in, and one of `[one|other|]` is chosen.

/// Expands `template`: `choose(n)` picks one of n alternatives, and `fill(name)` gives a slot's text. Alternatives may
/// contain slots but no further alternatives.
pub(super) fn expand(
    template: &str,
    choose: &mut dyn FnMut(usize) -> usize,
    fill: &mut dyn FnMut(&str) -> String,
) -> String {
    let mut out = String::new();
    let mut rest = template;
    while let Some(at) = rest.find(['[', '{']) {
        out.push_str(&rest[..at]);
        let (open, body) = rest[at..].split_at(1);
        let close = if open == "[" { ']' } else { '}' };
        let (inner, after) = body.split_once(close).expect("templates are constants; a test expands every one");
        if open == "[" {
            let alternatives: Vec<&str> = inner.split('|').collect();
            out.push_str(&expand(alternatives[choose(alternatives.len())], choose, fill));
        } else {
            out.push_str(&fill(inner));
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Every possible expansion of `template`.
pub(super) fn expansions(template: &str, fill: &mut dyn FnMut(&str) -> String) -> Vec<String> {
    let mut all = Vec::new();
    // The choices of the current expansion as (chosen, number of alternatives), incremented like the digits of a
    // number.
    let mut path: Vec<(usize, usize)> = Vec::new();
    loop {
        let mut depth = 0;
        let mut choose = |n: usize| {
            if depth == path.len() {
                path.push((0, n));
            }
            depth += 1;
            path[depth - 1].0
        };
        all.push(expand(template, &mut choose, fill));
        while let Some(last) = path.last_mut() {
            last.0 += 1;
            if last.0 < last.1 {
                break;
            }
            path.pop();
        }
        if path.is_empty() {
            return all;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_expansion_appears_once() {
        let all = expansions("[a|b{x}] c [d|]", &mut |name| name.to_uppercase());
        assert_eq!(all, ["a c d", "a c ", "bX c d", "bX c "]);
        assert_eq!(expansions("plain", &mut |_| String::new()), ["plain"]);
    }
}
