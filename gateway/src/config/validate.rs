//! What fields of the configuration mean together: names, references, ranges, files.

mod access;
mod admin;
mod kernel;
mod limits;
mod prices;
mod proxies;
mod runtime;
mod store;
mod upstream;

use std::collections::HashMap;

use super::{
    error::{hint, quote},
    load::Report,
    schema::Config,
    tree::Path,
    units::Span,
};
use crate::bounds::NAME_BYTES_MAX;

pub use limits::check_budget;
pub(super) use runtime::is_file_of_access_log;

/// Reports everything that is wrong or doubtful in a configuration whose form is right.
pub(super) fn check(config: &Config, report: &mut Report<'_>) {
    let known = Known::new(config);
    runtime::listeners(config, report);
    runtime::admin(config, report);
    admin::tokens(config, report);
    upstream::providers(config, report);
    upstream::models(config, report);
    limits::groups(config, &known, report);
    access::keys(config, &known, report);
    limits::limits(config, &known, report);
    limits::budgets(config, report);
    limits::rest(config, report);
    runtime::http(config, report);
    kernel::kernel(config, report);
    runtime::ledger(config, report);
    prices::check(config, report);
    runtime::log(config, report);
    store::store(config, report);
    span(&root("drain"), config.drain, Span::secs(0), DAY, report);
}

const SECOND: Span = Span::secs(1);
const MILLISECOND: Span = Span(std::time::Duration::from_millis(1));
const MINUTE: Span = Span::secs(60);
const HOUR: Span = Span::secs(3600);
const DAY: Span = Span::secs(86_400);
const MONTH: Span = Span::secs(30 * 86_400);

fn root(name: &str) -> Path {
    Path::default().name(name)
}

/// The names that others may refer to.
struct Known<'a> {
    models: HashMap<&'a str, ()>,
    teams: HashMap<&'a str, ()>,
    organizations: HashMap<&'a str, ()>,
    providers: HashMap<&'a str, ()>,
    /// Keys with their teams.
    keys: HashMap<&'a str, Option<&'a str>>,
}

impl<'a> Known<'a> {
    fn new(config: &'a Config) -> Known<'a> {
        let keys = config.keys.iter();
        Known {
            models: config
                .models
                .iter()
                .map(|model| (model.name.as_str(), ()))
                .collect(),
            organizations: config
                .organizations
                .iter()
                .map(|organization| (organization.name.as_str(), ()))
                .collect(),
            providers: config.providers.keys().map(|name| (name.as_str(), ())).collect(),
            teams: config.teams.iter().map(|team| (team.name.as_str(), ())).collect(),
            keys: keys.map(|key| (key.name.as_str(), key.team.as_deref())).collect(),
        }
    }
}

/// Reports a reference to a name that is not there.
fn refers<V>(path: &Path, what: &str, name: &str, known: &HashMap<&str, V>, report: &mut Report<'_>) {
    if !known.contains_key(name) {
        let mut names: Vec<&str> = known.keys().copied().collect();
        names.sort_unstable();
        report.error(
            path,
            format!("unknown {what} {}{}", quote(name), hint(name, names)),
        );
    }
}

/// Reports what a name must not be.
fn name(path: &Path, name: &str, report: &mut Report<'_>) {
    let wrong = if name.is_empty() {
        "the name is empty".to_owned()
    } else if name.len() > NAME_BYTES_MAX {
        format!("the name has {} bytes; the most is {NAME_BYTES_MAX}", name.len())
    } else if name.chars().any(char::is_control) {
        "the name has a control character".to_owned()
    } else if name.trim() != name {
        "the name begins or ends with a space".to_owned()
    } else {
        return;
    };
    report.error(path, wrong);
}

/// Reports names of a list that are wrong or stand there twice.
fn unique_names<'a>(list: &str, names: impl Iterator<Item = &'a str>, report: &mut Report<'_>) {
    let mut first: HashMap<&str, usize> = HashMap::new();
    for (index, text) in names.enumerate() {
        let path = root(list).index(index).name("name");
        name(&path, text, report);
        match first.get(text) {
            Some(other) => report.error(
                &path,
                format!("{} is already the name of {list}[{other}]", quote(text)),
            ),
            None => drop(first.insert(text, index)),
        }
    }
}

/// Reports a duration out of its bounds.
fn span(path: &Path, value: Span, least: Span, most: Span, report: &mut Report<'_>) {
    if value < least {
        report.error(path, format!("{value} is too short; the least is {least}"));
    } else if value > most {
        report.error(path, format!("{value} is too long; the most is {most}"));
    }
}
