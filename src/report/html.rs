//! The page's frame: escaping, tables, style. Knows no study.

use engine::text::escape_controls;

/// Text made safe inside elements and attribute values; control characters, which no page may hold, as `\u{1b}`.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in escape_controls(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// A table of already escaped cells; columns in `text` are set left, the rest right as numbers are.
pub fn table(head: &[&str], text: usize, rows: &[Vec<String>]) -> String {
    let class = |column: usize| if column < text { "" } else { " class=\"n\"" };
    let mut out = String::from("<div class=\"wide\"><table><thead><tr>");
    for (i, cell) in head.iter().enumerate() {
        out.push_str(&format!("<th{}>{}</th>", class(i), escape(cell)));
    }
    out.push_str("</tr></thead><tbody>");
    for row in rows {
        out.push_str("<tr>");
        for (i, cell) in row.iter().enumerate() {
            out.push_str(&format!("<td{}>{cell}</td>", class(i)));
        }
        out.push_str("</tr>");
    }
    out.push_str("</tbody></table></div>");
    out
}

pub fn section(title: &str, body: &str) -> String {
    format!("<section><h2>{}</h2>{body}</section>", escape(title))
}

/// The whole, self-contained page.
pub fn page(title: &str, body: &str) -> String {
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\"><meta name=\"color-scheme\" content=\"light dark\">\
         <title>{}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n",
        escape(title)
    )
}

/// Chart ink (`#111111`) and rules (`#DDDDDD`) are written by the chart library as attributes, which a style sheet overrides.
const STYLE: &str = "
:root{--ink:#1b1c1e;--soft:#5c6066;--paper:#fdfdfc;--rule:#dcdcd8;--panel:#f4f4f1;--seen:#1d7f4e;--not:#5c6066;--unsure:#a66a00;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e3;--soft:#a0a4aa;--paper:#17181a;--rule:#34363a;--panel:#202225;--seen:#5cc98f;--not:#a0a4aa;--unsure:#e0a94a;--bad:#ef8078}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 80px}h1{font-size:26px;margin:0 0 4px}h2{font-size:18px;margin:40px 0 10px;border-bottom:1px solid var(--rule);padding-bottom:4px}
h3{font-size:15px;margin:18px 0 6px}p{margin:6px 0}.soft{color:var(--soft)}.bad{color:var(--bad)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px;width:100%}th,td{padding:4px 8px;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--soft);font-weight:600}.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}th.n{white-space:normal}
.interval{display:block;color:var(--soft);font-size:11px}code,.key{font:12px ui-monospace,monospace}pre{background:var(--panel);padding:10px;overflow-x:auto;font:12px ui-monospace,monospace;white-space:pre-wrap}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:10px}figure{margin:0}svg{max-width:100%;height:auto}
svg text{fill:var(--ink);font-family:system-ui,sans-serif}svg [stroke='#111111']{stroke:var(--ink)}svg [stroke='#DDDDDD']{stroke:var(--rule)}
svg.graph rect{fill:var(--panel);stroke:var(--rule)}svg.graph rect.ran{stroke:var(--seen)}svg.graph rect.failed{stroke:var(--bad)}svg.graph rect.unreached{stroke-dasharray:4 3;stroke:var(--soft);fill:var(--paper)}svg.graph path{stroke:var(--soft);fill:none;opacity:.55}svg.graph .small{fill:var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;margin:6px 0}.legend svg{vertical-align:middle;margin-right:6px}
ul.verdicts{list-style:none;padding:0}ul.verdicts li{padding:7px 0;border-bottom:1px solid var(--rule)}.badge{display:inline-block;min-width:104px;font-weight:600}
.seen{color:var(--seen)}.not-seen{color:var(--not)}.cannot-tell{color:var(--unsure)}details{margin:6px 0}summary{cursor:pointer}.empty{color:var(--soft);font-style:italic}
";

#[cfg(test)]
mod tests {
    #[test]
    fn posts_cannot_bring_markup_into_the_page() {
        assert_eq!(super::escape("<script>\"&'"), "&lt;script&gt;&quot;&amp;&#39;");
    }

    #[test]
    fn control_characters_and_marks_of_direction_are_shown_in_the_page() {
        assert_eq!(super::escape("a\0b\u{1b}\u{202e}\nc"), "a\\u{0}b\\u{1b}\\u{202e}\nc");
    }
}
