//! Compares the file with the JSON Schema that `gateway schema` prints.
//!
//! Serde stops at the first field that is wrong. This walk goes on, so that one run of
//! `gateway check` shows every unknown or missing field, wrong word and number out of range, each
//! with its place. What the schema cannot say is in `validate`.

use std::sync::OnceLock;

use serde_json::{Map, Value};

use super::{
    error::{Pos, hint, nearest, quote},
    load::Report,
    schema::Config,
    tree::{Entry, Kind, NODES_MAX, NodeId, Path, Tree},
    units::FORMATS,
};

/// The JSON Schema (draft 2020-12) of the configuration file.
pub fn json_schema() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| schemars::schema_for!(Config).to_value())
}

/// Reports every place where the file does not have the form that the schema asks for.
pub(super) fn check(tree: &Tree, report: &mut Report<'_>) {
    let mut walk = Walk {
        tree,
        report,
        steps: 0,
    };
    walk.value(tree.root(), json_schema(), &Path::default());
}

struct Walk<'a, 'r> {
    tree: &'a Tree,
    report: &'a mut Report<'r>,
    /// Values looked at. Aliases can make more of them than the file has.
    steps: usize,
}

impl Walk<'_, '_> {
    fn value(&mut self, id: NodeId, schema: &'static Value, path: &Path) {
        self.steps += 1;
        if self.steps > NODES_MAX || schema == &Value::Bool(true) {
            return;
        }
        let schema = self.alternative(id, schema);
        let node = self.tree.node(id);
        if allows(schema, "null") && is_null(&node.kind) {
            return;
        }
        match &node.kind {
            Kind::Map(_) if allows(schema, "object") => self.map(id, schema, path),
            Kind::List(items) if allows(schema, "array") => {
                let Some(schema) = schema.get("items") else { return };
                for (index, item) in items.iter().enumerate() {
                    self.value(*item, schema, &path.index(index));
                }
            }
            Kind::Scalar { text, plain } => {
                if let Err(message) = scalar(text, *plain, schema) {
                    self.report.error_at(node.pos, path, message);
                }
            }
            other => {
                self.report.error_at(node.pos, path, unexpected(other, schema));
            }
        }
    }

    /// The definition behind references; of alternatives, the one of the value's own form.
    fn alternative(&self, id: NodeId, schema: &'static Value) -> &'static Value {
        let schema = resolve(schema);
        let Some(alternatives) = schema.get("anyOf").and_then(Value::as_array) else {
            return schema;
        };
        let kind = &self.tree.node(id).kind;
        let fits = |schema: &&'static Value| match kind {
            Kind::Map(_) => allows(schema, "object"),
            Kind::List(_) => allows(schema, "array"),
            Kind::Scalar { .. } if is_null(kind) => allows(schema, "null"),
            Kind::Scalar { .. } => !["object", "array", "null"]
                .iter()
                .any(|form| allows(schema, form)),
        };
        let resolved = || {
            // An optional one of several forms is an alternative within an alternative.
            alternatives
                .iter()
                .map(resolve)
                .flat_map(|schema| match schema.get("anyOf") {
                    Some(Value::Array(inner)) => inner.iter().map(resolve).collect(),
                    _ => vec![schema],
                })
        };
        resolved()
            .find(fits)
            .or_else(|| resolved().next())
            .unwrap_or(schema)
    }

    fn map(&mut self, id: NodeId, schema: &'static Value, path: &Path) {
        let entries = self.tree.fields(id);
        self.duplicates(id, path);
        let properties = schema.get("properties").and_then(Value::as_object);
        let mut misspelt = Vec::new();
        for entry in &entries {
            let known = properties.and_then(|properties| properties.get(&entry.name));
            match (known, schema.get("additionalProperties")) {
                (Some(schema), _) => self.value(entry.value, schema, &path.name(&entry.name)),
                (None, Some(schema @ Value::Object(_))) => {
                    self.value(entry.value, schema, &path.name(&entry.name));
                }
                (None, _) => misspelt.extend(self.unknown(entry, properties, path)),
            }
        }
        let required = schema.get("required").and_then(Value::as_array);
        for name in required.into_iter().flatten().filter_map(Value::as_str) {
            // A field that is there under a wrong name is not missing as well.
            if !misspelt.contains(&name) && !entries.iter().any(|entry| entry.name == name) {
                let pos = self.tree.node(id).pos;
                self.report.error_at(pos, path, format!("missing field `{name}`"));
            }
        }
    }

    fn duplicates(&mut self, id: NodeId, path: &Path) {
        let Kind::Map(entries) = &self.tree.node(id).kind else {
            return;
        };
        let mut first: std::collections::HashMap<&str, Pos> = std::collections::HashMap::new();
        for entry in entries {
            match first.get(entry.name.as_str()) {
                Some(pos) => {
                    let message = format!("field {} is already set in line {}", quote(&entry.name), pos.line);
                    self.report.error_at(entry.pos, path, message);
                }
                None => drop(first.insert(&entry.name, entry.pos)),
            }
        }
    }

    /// Reports a field that the schema does not know, and returns the one that was meant.
    fn unknown(
        &mut self,
        entry: &Entry,
        properties: Option<&'static Map<String, Value>>,
        path: &Path,
    ) -> Option<&'static str> {
        let known = properties.into_iter().flat_map(|properties| properties.keys());
        let known: Vec<&'static str> = known.map(String::as_str).collect();
        let message = format!(
            "unknown field {}{}",
            quote(&entry.name),
            hint(&entry.name, known.iter().copied())
        );
        self.report.error_at(entry.pos, path, message);
        nearest(&entry.name, &known)
    }
}

/// Follows `$ref` to its definition; the definitions of [`Config`] do not refer to themselves.
fn resolve(schema: &'static Value) -> &'static Value {
    match reference(schema) {
        Some(name) => &json_schema()["$defs"][name],
        None => schema,
    }
}

fn reference(schema: &Value) -> Option<&str> {
    schema.get("$ref")?.as_str()?.strip_prefix("#/$defs/")
}

fn is_null(kind: &Kind) -> bool {
    // The null of YAML 1.2's core schema (section 10.3.2).
    let nulls = ["", "~", "null", "Null", "NULL"];
    matches!(kind, Kind::Scalar { text, plain: true } if nulls.contains(&text.as_str()))
}

/// Whether values of a JSON type are allowed.
fn allows(schema: &Value, name: &str) -> bool {
    match schema.get("type") {
        Some(Value::String(one)) => one == name,
        Some(Value::Array(several)) => several.iter().any(|one| one == name),
        _ => false,
    }
}

fn expected(schema: &Value) -> &'static str {
    let forms = [
        ("object", "a map"),
        ("array", "a list"),
        ("boolean", "true or false"),
        ("integer", "a whole number"),
    ];
    let form = forms.iter().find(|(name, _)| allows(schema, name));
    form.map_or("a text", |(_, form)| form)
}

fn unexpected(kind: &Kind, schema: &Value) -> String {
    let (expected, found) = (expected(schema), found(kind));
    // All of a section's entries may be commented out.
    let advice = match (is_null(kind), expected) {
        (true, "a list") => "; write [] or leave the field out",
        (true, "a map") => "; write {} or leave the field out",
        _ => "",
    };
    format!("expected {expected}, found {found}{advice}")
}

fn found(kind: &Kind) -> &'static str {
    match kind {
        Kind::Map(_) => "a map",
        Kind::List(_) => "a list",
        Kind::Scalar { .. } if is_null(kind) => "nothing",
        Kind::Scalar { .. } => "a single value",
    }
}

/// Checks a scalar. The text of a secret is of no kind that is quoted here.
fn scalar(text: &str, plain: bool, schema: &'static Value) -> Result<(), String> {
    let kind = Kind::Scalar {
        text: text.to_owned(),
        plain,
    };
    let words = words(schema);
    if !words.is_empty() {
        return match words.contains(&text) {
            true => Ok(()),
            false => Err(format!("unknown word {}{}", quote(text), hint(text, words))),
        };
    }
    if is_null(&kind) || allows(schema, "object") || allows(schema, "array") {
        return Err(unexpected(&kind, schema));
    }
    if allows(schema, "boolean") {
        return match plain && matches!(text, "true" | "false") {
            true => Ok(()),
            false => Err(format!("expected true or false, found {}", quote(text))),
        };
    }
    if allows(schema, "integer") {
        return integer(text, schema);
    }
    let format = schema.get("title").and_then(Value::as_str);
    match FORMATS.iter().find(|(name, _)| Some(*name) == format) {
        Some((_, check)) => check(text),
        None => Ok(()),
    }
}

/// The words of an enumeration, with or without descriptions.
fn words(schema: &'static Value) -> Vec<&'static str> {
    let list = |name: &str| schema.get(name).and_then(Value::as_array).into_iter().flatten();
    let described = list("oneOf").filter_map(|word| word.get("const").and_then(Value::as_str));
    let plain = list("enum").filter_map(Value::as_str);
    described.chain(plain).collect()
}

fn integer(text: &str, schema: &Value) -> Result<(), String> {
    let number: i128 = match text.replace('_', "").parse() {
        Ok(number) if !text.starts_with('_') => number,
        _ => return Err(format!("expected a whole number, found {}", quote(text))),
    };
    let bound = |name: &str| {
        let value = schema.get(name)?;
        value.as_i64().map(i128::from).or(value.as_u64().map(i128::from))
    };
    let type_max = match schema.get("format").and_then(Value::as_str) {
        Some("uint32") => i128::from(u32::MAX),
        _ => i128::from(u64::MAX),
    };
    let min = bound("minimum").unwrap_or(0);
    let max = bound("maximum").unwrap_or(type_max);
    if number < min {
        return Err(format!("{number} is too small; the least is {min}"));
    }
    if number > max {
        return Err(format!("{number} is too large; the most is {max}"));
    }
    Ok(())
}
