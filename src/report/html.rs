//! The page's frame: escaping, tables, downloads, contents, style.

use engine::text::escape_controls;

/// Escapes text for elements and attribute values; control characters, which are invalid in HTML, become `\u{1b}` and
/// the like.
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

/// A table of cells that are already escaped. The first `text` columns are aligned left, the others right like numbers.
/// Its headings are buttons that sort it.
pub fn table(head: &[&str], text: usize, rows: &[Vec<String>]) -> String {
    let class = |column: usize| if column < text { "" } else { " class=\"n\"" };
    let mut out = String::from("<div class=\"wide\" tabindex=\"0\"><table><thead><tr>");
    for (i, cell) in head.iter().enumerate() {
        out.push_str(&format!("<th{}><button type=\"button\">{}</button></th>", class(i), escape(cell)));
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

/// The page's sections in order: (title, body). Titles are unique.
#[derive(Default)]
pub struct Sections(Vec<(&'static str, String)>);

impl Sections {
    /// Adds a section, unless its body is empty.
    pub fn push(&mut self, title: &'static str, body: &str) {
        if !body.is_empty() {
            self.0.push((title, body.to_owned()));
        }
    }

    /// A table of contents followed by the sections.
    pub fn html(&self) -> String {
        let entry =
            |(title, _): &(&str, String)| format!("<li><a href=\"#{}\">{}</a></li>", slug(title), escape(title));
        let section = |(title, body): &(&str, String)| {
            format!("<section id=\"{}\"><h2>{}</h2>{body}</section>", slug(title), escape(title))
        };
        let entries: String = self.0.iter().map(entry).collect();
        let sections: String = self.0.iter().map(section).collect();
        format!("<nav aria-label=\"Contents\"><ul class=\"contents\">{entries}</ul></nav>{sections}")
    }

    /// The visible words of the page in lower case, without those of posts and summaries (`<pre>`).
    pub fn words(&self) -> String {
        self.0.iter().map(|(title, body)| format!("{title} {} ", without_tags(body)).to_lowercase()).collect()
    }
}

fn without_tags(html: &str) -> String {
    let mut out = String::new();
    let mut rest = html;
    while let Some(start) = rest.find('<') {
        out.push_str(&rest[..start]);
        out.push(' ');
        let end = if rest[start..].starts_with("<pre") { "</pre>" } else { ">" };
        rest = rest[start..].find(end).map_or("", |at| &rest[start + at + end.len()..]);
    }
    out + rest
}

/// Converts a title to an anchor or a file name.
pub fn slug(title: &str) -> String {
    let words = title.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-").to_lowercase()
}

/// A link that saves a table as `name.csv`; the link contains the data.
pub fn csv(name: &str, head: &[&str], rows: &[Vec<String>]) -> String {
    let text = csv_text(head, rows);
    let mut data = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b',' => data.push(char::from(byte)),
            other => data.push_str(&format!("%{other:02X}")),
        }
    }
    format!("<a class=\"csv\" download=\"{}.csv\" href=\"data:text/csv;charset=utf-8,{data}\">CSV</a>", slug(name))
}

/// Formats a table as CSV (RFC 4180).
pub fn csv_text(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut text = csv_line(head.iter().copied());
    text.extend(rows.iter().map(|row| csv_line(row.iter().map(String::as_str))));
    text
}

fn csv_line<'a>(cells: impl Iterator<Item = &'a str>) -> String {
    cells.map(csv_cell).collect::<Vec<_>>().join(",") + "\r\n"
}

/// RFC 4180: quoted only if necessary.
fn csv_cell(cell: &str) -> String {
    if cell.contains([',', '"', '\n', '\r']) { format!("\"{}\"", cell.replace('"', "\"\"")) } else { cell.to_owned() }
}

/// The complete, self-contained page.
pub fn page(title: &str, body: &str) -> String {
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\"><meta name=\"color-scheme\" content=\"light dark\">\
         <title>{}</title><style>{STYLE}</style></head><body><main>{body}</main><script>{SCRIPT}</script></body></html>\n",
        escape(title)
    )
}

/// Sorts a table by the clicked column: numbers by value, cells without one last. A second click reverses the order.
const SCRIPT: &str = "
for(const button of document.querySelectorAll('th>button'))button.addEventListener('click',()=>{
const head=button.parentElement,body=head.closest('table').tBodies[0],at=head.cellIndex,number=head.classList.contains('n');
const way=head.getAttribute('aria-sort')==='ascending'?-1:1;
for(const other of head.parentElement.cells)other.removeAttribute('aria-sort');
head.setAttribute('aria-sort',way>0?'ascending':'descending');
const text=row=>row.cells[at].textContent.trim(),value=row=>parseFloat(text(row).replace('$',''));
const order=(a,b)=>{if(!number)return way*text(a).localeCompare(text(b),undefined,{numeric:true});
const x=value(a),y=value(b),none=v=>v!==v;return none(x)||none(y)?none(x)-none(y):way*(x-y)};
body.append(...[...body.rows].sort(order))});
";

/// The chart library writes chart ink (`#111111`) and rules (`#DDDDDD`) as attributes, which a style sheet overrides.
const STYLE: &str = "
:root{--ink:#1b1c1e;--soft:#5c6066;--paper:#fdfdfc;--rule:#dcdcd8;--panel:#f4f4f1;--seen:#1d7f4e;--not:#5c6066;--unsure:#a66a00;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e3;--soft:#a0a4aa;--paper:#17181a;--rule:#34363a;--panel:#202225;--seen:#5cc98f;--not:#a0a4aa;--unsure:#e0a94a;--bad:#ef8078}}
*{box-sizing:border-box}body{margin:0;overflow-wrap:anywhere;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 80px}h1{font-size:26px;margin:0 0 4px}h2{font-size:18px;margin:40px 0 10px;border-bottom:1px solid var(--rule);padding-bottom:4px}
h3{font-size:15px;margin:18px 0 6px}p{margin:6px 0}.soft{color:var(--soft)}.bad{color:var(--bad)}
.wide{overflow:auto;max-width:100%}.wide.tall{max-height:75vh}table{overflow-wrap:normal;border-collapse:collapse;font-size:13px;width:100%}th,td{padding:4px 8px;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--soft);font-weight:600}th button{all:unset;cursor:pointer;display:inline-block}th button:focus-visible,.wide:focus-visible,a:focus-visible{outline:2px solid var(--ink);outline-offset:-2px}th[aria-sort=ascending] button::after{content:' \\2191'}th[aria-sort=descending] button::after{content:' \\2193'}.long{min-width:12em}a{color:inherit}
.contents{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;padding:0;margin:14px 0 0}.csv{font-size:12px;color:var(--soft)}dt{font-weight:600;margin-top:8px}dd{margin:0}.place{display:inline-block;vertical-align:bottom;max-width:14em;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;user-select:all}.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}th.n{white-space:normal}
.interval{display:block;color:var(--soft);font-size:11px}code,.key{font:12px ui-monospace,monospace}pre{background:var(--panel);padding:10px;overflow-x:auto;font:12px ui-monospace,monospace;white-space:pre-wrap}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:10px}figure{margin:0}svg{max-width:100%;height:auto}@media(max-width:700px){main{padding:16px 12px 60px}svg.graph{max-width:none}}
svg text{fill:var(--ink);font-family:system-ui,sans-serif}svg [stroke='#111111']{stroke:var(--ink)}svg [stroke='#DDDDDD']{stroke:var(--rule)}
svg.graph rect{fill:var(--panel);stroke:var(--rule)}svg.graph rect.ran{stroke:var(--seen)}svg.graph rect.failed{stroke:var(--bad)}svg.graph rect.unreached{stroke-dasharray:4 3;stroke:var(--soft);fill:var(--paper)}svg.graph path{stroke:var(--soft);fill:none;opacity:.55}svg.graph .small{fill:var(--soft)}svg.graph .bar{stroke:none;fill:var(--seen)}svg.graph .bar.failed{fill:var(--bad)}svg.graph .bar.interrupted{fill:var(--unsure)}svg.graph line{stroke:var(--rule)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;margin:6px 0}.legend svg{vertical-align:middle;margin-right:6px}
ul.verdicts{list-style:none;padding:0}ul.verdicts li{padding:7px 0;border-bottom:1px solid var(--rule)}.badge{display:inline-block;min-width:104px;font-weight:600}
.seen{color:var(--seen)}.not-seen{color:var(--not)}.cannot-tell{color:var(--unsure)}details{margin:6px 0}summary{cursor:pointer}.empty{color:var(--soft);font-style:italic}
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_section_is_in_the_contents_under_its_anchor() {
        let mut sections = Sections::default();
        sections.push("Summaries (Table 1)", "<p>one</p>");
        sections.push("Empty", "");
        sections.push("The graph", "two");
        let html = sections.html();
        assert!(html.contains("<a href=\"#summaries-table-1\">Summaries (Table 1)</a>"), "{html}");
        assert!(
            html.contains("<section id=\"summaries-table-1\"><h2>Summaries (Table 1)</h2><p>one</p></section>"),
            "{html}"
        );
        assert!(html.contains("href=\"#the-graph\"") && !html.contains("Empty"), "{html}");
    }

    #[test]
    fn the_glossary_ignores_words_in_posts_and_attributes() {
        let mut sections = Sections::default();
        sections.push("Arms", "<p class=\"gold\">KL <b>rises</b></p><pre>my proxy &lt;</pre> end");
        assert_eq!(sections.words().split_whitespace().collect::<Vec<_>>(), ["arms", "kl", "rises", "end"]);
    }

    #[test]
    fn headings_are_buttons_and_only_numbers_sort_as_such() {
        let html = table(&["stage", "seconds"], 1, &[vec!["a".into(), "1".into()]]);
        assert!(html.contains("<th><button type=\"button\">stage</button></th>"), "{html}");
        assert!(html.contains("<th class=\"n\"><button type=\"button\">seconds</button></th>"), "{html}");
    }

    #[test]
    fn a_download_link_holds_its_table_and_is_escaped() {
        let link = csv("KL by step", &["line", "KL (nats)"], &[vec!["a, \"b\" <c>\u{3bb}".into(), "-1.5".into()]]);
        let data = "line,KL%20%28nats%29%0D%0A%22a,%20%22%22b%22%22%20%3Cc%3E%CE%BB%22,-1.5%0D%0A";
        let whole =
            format!("<a class=\"csv\" download=\"kl-by-step.csv\" href=\"data:text/csv;charset=utf-8,{data}\">CSV</a>");
        assert_eq!(link, whole);
    }

    #[test]
    fn posts_are_escaped_in_the_page() {
        assert_eq!(escape("<script>\"&'"), "&lt;script&gt;&quot;&amp;&#39;");
    }

    #[test]
    fn control_characters_and_marks_of_direction_are_shown_in_the_page() {
        assert_eq!(escape("a\0b\u{1b}\u{202e}\nc"), "a\\u{0}b\\u{1b}\\u{202e}\nc");
    }
}
