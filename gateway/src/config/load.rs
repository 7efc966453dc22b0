//! Reads a configuration file and says all that is wrong with it.

use std::{fs::File, io::Read as _, os::unix::fs::PermissionsExt as _, path::Path as FilePath};

use serde_saphyr::{DefaultMessageFormatter, MessageFormatter as _};

use super::{
    error::{Errors, Pos, Problem, plain_words},
    schema::Config,
    secrets::{self, Sources},
    structure,
    tree::{DEPTH_MAX, NODES_MAX, Path, Tree},
    validate,
};

/// Largest configuration file, bytes: about 100,000 keys.
pub const FILE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Most values that aliases may repeat; more is a bomb, not a configuration.
const ALIASED_NODES_MAX: usize = 100_000;

/// Most problems that are reported; the rest is counted.
const PROBLEMS_MAX: usize = 100;

/// Looks up an environment variable; a parameter, so that tests need not touch the process' own.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The environment of this process. A variable that is not UTF-8 counts as absent.
pub fn process_env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Loads a configuration file with the environment of this process.
///
/// # Errors
/// All that is wrong with the file, in its order.
pub fn load(path: &FilePath) -> Result<Config, Errors> {
    let name = path.display().to_string();
    let (text, mode) = read(path).map_err(|message| whole(&name, message))?;
    let base_dir = path.parent().unwrap_or(FilePath::new(""));
    let mut config = parse(&text, &name, base_dir, &process_env)?;
    const READABLE_BY_OTHERS: u32 = 0o004;
    if config.literal_secrets && mode & READABLE_BY_OTHERS != 0 {
        let message = format!("holds secrets and every user may read it; chmod o-r {name}");
        config.warnings.extend(whole(&name, message).0);
    }
    Ok(config)
}

/// The text of a file and its mode.
fn read(path: &FilePath) -> Result<(String, u32), String> {
    let cannot = |error: std::io::Error| format!("cannot read: {error}");
    let file = File::open(path).map_err(cannot)?;
    let mode = file.metadata().map_err(cannot)?.permissions().mode();
    let mut bytes = Vec::new();
    let limit = FILE_BYTES_MAX as u64 + 1;
    file.take(limit).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() > FILE_BYTES_MAX {
        return Err(too_large());
    }
    let text = String::from_utf8(bytes).map_err(|_| "not UTF-8 text".to_owned())?;
    Ok((text, mode))
}

fn too_large() -> String {
    format!("larger than {FILE_BYTES_MAX} bytes")
}

fn whole(source: &str, message: String) -> Errors {
    Errors(vec![Problem {
        source: source.to_owned(),
        pos: None,
        path: String::new(),
        message,
    }])
}

/// Parses and checks a configuration.
///
/// `source_name` stands in front of each error; relative paths begin at `base_dir`. What is
/// doubtful but allowed is in [`Config::warnings`].
///
/// # Errors
/// All that is wrong, in the order of the file. Text that is no YAML has only its first error.
pub fn parse(text: &str, source_name: &str, base_dir: &FilePath, env: Env<'_>) -> Result<Config, Errors> {
    if text.len() > FILE_BYTES_MAX {
        return Err(whole(source_name, too_large()));
    }
    let tree = Tree::parse(text).map_err(|error| {
        Errors(vec![Problem {
            source: source_name.to_owned(),
            pos: Some(error.pos),
            path: String::new(),
            message: plain_words(&error.message),
        }])
    })?;
    let mut report = Report::new(source_name, &tree);
    let Some(mut config) = deserialize(text, &mut report) else {
        return Err(report.into_errors());
    };
    config.join_paths(base_dir);
    resolve_secrets(&mut config, base_dir, env, &mut report);
    validate::check(&config, &mut report);
    match report.problems.is_empty() {
        true => {
            report.warnings.sort_by_key(|warning| warning.pos);
            config.warnings = report.warnings;
            Ok(config)
        }
        false => Err(report.into_errors()),
    }
}

/// Gathers problems and finds their place in the file.
pub(super) struct Report<'a> {
    source: &'a str,
    tree: &'a Tree,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
}

impl<'a> Report<'a> {
    fn new(source: &'a str, tree: &'a Tree) -> Report<'a> {
        Report {
            source,
            tree,
            problems: Vec::new(),
            warnings: Vec::new(),
        }
    }

    fn problem(&self, pos: Pos, path: &Path, message: String) -> Problem {
        Problem {
            source: self.source.to_owned(),
            pos: Some(pos),
            path: path.to_string(),
            message,
        }
    }

    /// Whether the file itself has a value at `path`, so that it is not a default.
    pub fn is_written(&self, path: &Path) -> bool {
        self.tree.has(path)
    }

    /// Reports the value at `path` as wrong.
    pub fn error(&mut self, path: &Path, message: impl Into<String>) {
        let pos = self.tree.locate(path);
        self.error_at(pos, path, message);
    }

    /// Reports something wrong at a place that is known.
    pub fn error_at(&mut self, pos: Pos, path: &Path, message: impl Into<String>) {
        let problem = self.problem(pos, path, message.into());
        self.problems.push(problem);
    }

    /// Reports the value at `path` as doubtful.
    pub fn warning(&mut self, path: &Path, message: impl Into<String>) {
        let problem = self.problem(self.tree.locate(path), path, message.into());
        self.warnings.push(problem);
    }

    fn into_errors(mut self) -> Errors {
        self.problems.sort_by_key(|problem| problem.pos);
        let more = self.problems.len().saturating_sub(PROBLEMS_MAX);
        if more > 0 {
            self.problems.truncate(PROBLEMS_MAX);
            self.problems
                .extend(whole(self.source, format!("and {more} more errors")).0);
        }
        Errors(self.problems)
    }
}

/// Makes the configuration of the text, or reports what kept it from that.
fn deserialize(text: &str, report: &mut Report<'_>) -> Option<Config> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: DEPTH_MAX,
            max_nodes: NODES_MAX,
            max_events: 2 * NODES_MAX,
            max_total_scalar_bytes: FILE_BYTES_MAX,
            max_documents: 1,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: ALIASED_NODES_MAX,
            max_replay_stack_depth: DEPTH_MAX,
        },
        strict_booleans: true,
        with_snippet: false,
    };
    let made = serde_saphyr::from_str_with_options::<Config>(text, options);
    structure::check(report.tree, report);
    let error = match made {
        Ok(config) => return Some(config),
        // The walk has found this error too, and says more about it.
        Err(_) if !report.problems.is_empty() => return None,
        Err(error) => error,
    };
    let message = plain_words(&DefaultMessageFormatter.format_message(&error));
    let number = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let pos = error
        .location()
        .map_or(Pos { line: 1, column: 1 }, |location| Pos {
            line: number(location.line()),
            column: number(location.column()),
        });
    let path = report.tree.path_at(pos).unwrap_or_default();
    report.error_at(pos, &path, message);
    None
}

fn resolve_secrets(config: &mut Config, base_dir: &FilePath, env: Env<'_>, report: &mut Report<'_>) {
    let sources = Sources { base_dir, env };
    let mut literal_secrets = false;
    for (path, secret) in secrets::fields(config) {
        match secrets::resolve(secret.expose(), &sources) {
            Ok(resolved) => {
                if resolved.literal {
                    literal_secrets = true;
                    report.warning(
                        &path,
                        "a secret stands in the file; ${env:…}, ${file:…} or ${credential:…} keeps it out",
                    );
                }
                if let Some(file) = resolved.exposed_file {
                    let file = file.display();
                    report.warning(
                        &path,
                        format!("every user of this host may read {file}; chmod o-r it"),
                    );
                }
                *secret = super::units::Secret::new(resolved.value);
            }
            Err(message) => report.error(&path, message),
        }
    }
    config.literal_secrets = literal_secrets;
}

impl Config {
    /// Makes paths that are relative begin at the configuration's directory.
    fn join_paths(&mut self, base_dir: &FilePath) {
        let tls = self
            .listeners
            .iter_mut()
            .filter_map(|listener| listener.tls.as_mut());
        for files in tls.flat_map(|tls| tls.certificates_mut()) {
            files.certificate = base_dir.join(&files.certificate);
            files.key = base_dir.join(&files.key);
        }
        for ca in self
            .providers
            .values_mut()
            .filter_map(|provider| provider.ca.as_mut())
        {
            *ca = base_dir.join(&ca);
        }
        if let Some(ca) = self.store.as_mut().and_then(|store| store.ca.as_mut()) {
            *ca = base_dir.join(&ca);
        }
        self.ledger.path = base_dir.join(&self.ledger.path);
        if validate::is_file_of_access_log(&self.log.access) {
            self.log.access = base_dir.join(&self.log.access).display().to_string();
        }
    }
}
