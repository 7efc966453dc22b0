//! Results as one HTML file that needs nothing else: style, script and figures are in it.

use crate::compare::{Cell, Machine, Results, TargetInfo};
use crate::load::Report;
use crate::scenario::Figure;

const STYLE: &str = include_str!("html/report.css");
const SCRIPT: &str = include_str!("html/report.js");

/// The whole file.
///
/// # Errors
/// Figures that JSON cannot tell; there are none.
pub fn page(results: &Results) -> serde_json::Result<String> {
    let mut data = serde_json::to_value(results)?;
    data["remarks"] = results.remarks().into();
    // In JSON `<` stands in texts only, where its escape means the same; so no text can end the element.
    let data = data.to_string().replace('<', "\\u003c");
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>gateway-bench</title>\n<style>\n{STYLE}</style>\n\
         </head>\n<body>\n<main></main>\n<script type=\"application/json\" id=\"data\">{data}</script>\n<script>\n{SCRIPT}</script>\n\
         </body>\n</html>\n"
    ))
}

/// One run of the load generator as results, so that it has the same page.
pub fn of_load(report: Report, url: &str, name: &str, command: String) -> Results {
    let figure = match (&report.open_streams, report.events) {
        (1.., _) => Figure::Stream,
        (0, 0) => Figure::Request,
        (0, _) => Figure::Event,
    };
    Results {
        machine: Machine::read(),
        command,
        rounds: 1,
        targets: vec![TargetInfo {
            name: "target".to_owned(),
            about: url.to_owned(),
            ..TargetInfo::default()
        }],
        cells: vec![Cell {
            scenario: name.to_owned(),
            about: url.to_owned(),
            figure,
            beside: None,
            target: "target".to_owned(),
            skipped: None,
            reports: vec![report],
        }],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_can_end_the_data() {
        let results = of_load(
            Report::default(),
            "http://x/</script><script>alert(1)",
            "a",
            String::new(),
        );
        let page = page(&results).unwrap();
        assert_eq!(page.matches("</script>").count(), 2);
        assert!(!page.contains("http://cdn") && !page.contains(" src=") && !page.contains("<link"));
    }
}
