//! Exports a report's figures, numbers and keys as files, for papers and web pages.
//!
//! Figures are cut out of the page: each is a `<figure>` with one `<svg>`. Its name comes from the preceding `<h3>` and
//! the arm above it, its legend from the last preceding `<div class="legend">`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use engine::error::{AtPath, Result};

use super::html::{csv_text, slug};
use super::load::RunData;

/// Writes `<figure>.svg` for every figure of the page, `summary.txt` and `keys.csv` into `to`.
///
/// # Errors
/// If a file cannot be read or written.
pub fn export(run: &RunData, page: &Path, summary: &str, to: &Path) -> Result<Vec<PathBuf>> {
    let page = std::fs::read_to_string(page).at(page)?;
    std::fs::create_dir_all(to).at(to)?;
    let mut files: BTreeMap<String, String> = figures(&page);
    files.insert("summary.txt".to_owned(), summary.to_owned());
    files.insert("keys.csv".to_owned(), keys(run));
    let mut written = Vec::new();
    for (name, text) in files {
        let path = to.join(name);
        std::fs::write(&path, text).at(&path)?;
        written.push(path);
    }
    Ok(written)
}

/// The key and the digest of every stage that the run finished or reused.
fn keys(run: &RunData) -> String {
    let rows = run.instances.iter().filter_map(|instance| {
        let result = run.result(instance);
        Some(vec![instance.name.clone(), instance.kind.clone(), result.key?.to_string(), result.digest?.to_string()])
    });
    csv_text(&["stage", "kind", "key", "digest"], &rows.collect::<Vec<_>>())
}

/// The page's figures as SVG documents, by file name.
fn figures(page: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut from = 0;
    while let Some(start) = page[from..].find("<figure").map(|at| from + at) {
        let Some(end) = page[start..].find("</figure>").map(|at| start + at) else { break };
        from = end;
        let (before, figure) = (&page[..start], &page[start..end]);
        let Some(svg) = between(figure, "<svg", "</svg>") else { continue };
        // A figure's heading and legend stand in the block between the last heading and it.
        let block = before.rfind("<h3>").or_else(|| before.rfind("<h2>")).map_or(before, |at| &before[at..]);
        let heading = between(block, "<h3>", "</h3>").or_else(|| between(block, "<h2>", "</h2>"));
        let own = between(figure, "download=\"", ".csv\"");
        let name: Vec<String> = [heading, own].into_iter().flatten().map(slug).collect();
        let legend = block.rfind("<div class=\"legend\">").and_then(|at| between(&block[at..], "<div", "</div>"));
        // Wide figures label themselves.
        let legend = legend.filter(|_| !figure.starts_with("<figure class=\"wide\">"));
        let name = (1..)
            .map(|n| if n == 1 { name.join("-") } else { format!("{}-{n}", name.join("-")) })
            .find(|name| !found.contains_key(&format!("{name}.svg")))
            .unwrap_or_default();
        found.insert(format!("{name}.svg"), standalone(svg, legend.unwrap_or("")));
    }
    found
}

fn between<'a>(text: &'a str, start: &str, end: &str) -> Option<&'a str> {
    let from = text.find(start)? + start.len();
    Some(&text[from..from + text[from..].find(end)?])
}

/// Height of a legend line, in pixels.
const LINE: f64 = 18.0;

/// Builds an SVG document with a white background from the inside of an SVG (from its attributes on), with the legend
/// below it.
fn standalone(svg: &str, legend: &str) -> String {
    let (attributes, content) = svg.split_once('>').unwrap_or((svg, ""));
    let size = |name: &str| -> Option<f64> { between(attributes, &format!(" {name}=\""), "\"")?.parse().ok() };
    let (width, height) = (size("width").unwrap_or(480.0), size("height").unwrap_or(320.0));
    let mut entries = String::new();
    let mut y = height;
    for entry in legend.split("<span>").skip(1) {
        let Some((swatch, name)) = entry.split_once("</svg>") else { continue };
        let Some(line) = between(swatch, "<line ", "/>") else { continue };
        let name = name.trim_end_matches("</span>");
        entries.push_str(&format!(
            "<g transform=\"translate(40 {:.1})\"><line {line}/></g><text x=\"74\" y=\"{:.1}\">{name}</text>",
            y + LINE / 2.0 - 4.0,
            y + LINE / 2.0 + 4.0
        ));
        y += LINE;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {y}\" width=\"{width}\" height=\"{y}\" \
         font-family=\"sans-serif\" font-size=\"12\"><rect width=\"100%\" height=\"100%\" fill=\"white\"/>\
         {content}{entries}</svg>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_of_the_page_becomes_a_document_with_its_legend() {
        let page = "<h3>Figure 4: by step</h3><div class=\"legend\"><span><svg width=\"26\"><line x1=\"0\" stroke=\"#d64541\"/></svg>\
                    mean</span></div><div class=\"charts\"><figure><svg width=\"480\" height=\"300\"><path/></svg>\
                    <figcaption><a download=\"true-quality-by-phase.csv\" href=\"data:\">CSV</a></figcaption></figure></div>\
                    <h3>Without a legend</h3><figure><svg width=\"9\" height=\"9\"><g/></svg></figure>\
                    <h3>Paired differences</h3><figure class=\"wide\"><svg viewBox=\"0 0 9 9\" width=\"9\" height=\"9\"><g/></svg></figure>\
                    <figure class=\"wide\"><svg width=\"9\" height=\"9\"/></svg></figure>";
        let found = figures(page);
        let names: Vec<&str> = found.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "figure-4-by-step-true-quality-by-phase.svg",
                "paired-differences-2.svg",
                "paired-differences.svg",
                "without-a-legend.svg"
            ]
        );
        let first = &found[names[0]];
        assert!(
            first.starts_with("<svg xmlns=") && first.contains("height=\"318\"") && first.contains("<path/>"),
            "{first}"
        );
        assert!(first.contains("stroke=\"#d64541\"") && first.contains(">mean</text>"), "{first}");
        assert!(["paired-differences.svg", "without-a-legend.svg"].iter().all(|name| !found[*name].contains("mean")));
    }
}
