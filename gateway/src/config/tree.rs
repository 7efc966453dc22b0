//! Where each value of the file stands: the YAML as a tree of positions.
//!
//! Serde tells nothing of places once a value is made, and stops at the first error. The tree is
//! built once beside it, so that checks can name the line of any field by its path.

use std::{collections::HashMap, fmt};

use serde_saphyr::granit_parser::{Event, Marker, Parser, ScalarStyle, options};

use super::error::Pos;

/// Deepest nesting of the file. The schema needs 8.
pub(super) const DEPTH_MAX: usize = 32;

/// Most values (scalars, lists, maps and aliases) in the file: about 100,000 keys.
pub(super) const NODES_MAX: usize = 1_000_000;

/// Most maps that one map merges, those of its merged maps included.
const MERGES_MAX: usize = 64;

/// The merge key of YAML 1.1 (yaml.org/type/merge.html), which people use for shared settings.
const MERGE: &str = "<<";

/// Index of a node in its [`Tree`].
pub(super) type NodeId = usize;

/// A value and where it begins.
#[derive(Debug)]
pub(super) struct Node {
    pub pos: Pos,
    pub kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// Text of a scalar; `plain`: it has no quotes, so `null`, `true` and numbers are not strings.
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<NodeId>),
    Map(Vec<Entry>),
}

/// One `name: value` of a map.
#[derive(Debug)]
pub(super) struct Entry {
    pub pos: Pos,
    pub name: String,
    pub value: NodeId,
}

/// The file as nodes. Aliases point at the node of their anchor, so this is a graph without cycles.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: Vec<Node>,
    root: NodeId,
}

/// One step of a [`Path`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Name(String),
    Index(usize),
}

/// Path of a field from the top of the file, for example `models[0].targets[1].weight`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Path(Vec<Step>);

impl Path {
    /// The path of a field of this map.
    pub fn name(&self, name: &str) -> Path {
        self.with(Step::Name(name.to_owned()))
    }

    /// The path of an element of this list.
    pub fn index(&self, index: usize) -> Path {
        self.with(Step::Index(index))
    }

    fn with(&self, step: Step) -> Path {
        let mut path = self.clone();
        path.0.push(step);
        path
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, step) in self.0.iter().enumerate() {
            let dot = if place == 0 { "" } else { "." };
            match step {
                Step::Index(index) => write!(f, "[{index}]")?,
                Step::Name(name) if is_word(name) => write!(f, "{dot}{name}")?,
                Step::Name(name) => write!(f, "{dot}{}", super::error::quote(name))?,
            }
        }
        Ok(())
    }
}

fn is_word(name: &str) -> bool {
    !name.is_empty()
        && name
            .chars()
            .all(|c| c.is_alphanumeric() || matches!(c, '_' | '-'))
}

/// What keeps the file from being YAML, and where.
#[derive(Debug)]
pub(super) struct SyntaxError {
    pub pos: Pos,
    pub message: String,
}

impl Tree {
    /// Reads the first document of `text`.
    pub fn parse(text: &str) -> Result<Tree, SyntaxError> {
        let mut builder = Builder::default();
        let options = options! {
            emit_comments: false,
            flow_nesting_limit: DEPTH_MAX,
            block_nesting_limit: DEPTH_MAX,
        };
        for next in Parser::new_from_str_with_options(text, options) {
            let (event, span) = next.map_err(|error| SyntaxError {
                pos: position(error.marker()),
                message: error.info(),
            })?;
            let pos = position(&span.start);
            builder
                .event(event, pos)
                .map_err(|message| SyntaxError { pos, message })?;
        }
        let root = builder.root.ok_or_else(|| SyntaxError {
            pos: Pos { line: 1, column: 1 },
            message: "the file is empty".into(),
        })?;
        Ok(Tree {
            nodes: builder.nodes,
            root,
        })
    }

    pub fn root(&self) -> NodeId {
        self.root
    }

    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id]
    }

    /// Where the value at `path` begins; where it is absent, the deepest value on the way to it.
    pub fn locate(&self, path: &Path) -> Pos {
        let mut id = self.root;
        for step in &path.0 {
            match self.child(id, step) {
                Some(child) => id = child,
                None => break,
            }
        }
        self.nodes[id].pos
    }

    /// Whether the file has a value at `path`, so that it is not a default.
    pub fn has(&self, path: &Path) -> bool {
        let mut id = self.root;
        path.0.iter().all(|step| {
            let child = self.child(id, step);
            id = child.unwrap_or(id);
            child.is_some()
        })
    }

    fn child(&self, id: NodeId, step: &Step) -> Option<NodeId> {
        match (&self.nodes[id].kind, step) {
            (Kind::List(items), Step::Index(index)) => items.get(*index).copied(),
            (Kind::Map(_), Step::Name(name)) => {
                let fields = self.fields(id);
                fields
                    .iter()
                    .find(|entry| entry.name == *name)
                    .map(|entry| entry.value)
            }
            _ => None,
        }
    }

    /// The fields of a map, also those that come in by merge keys (`<<: *defaults`), which its own
    /// fields override.
    pub fn fields(&self, id: NodeId) -> Vec<&Entry> {
        let mut fields: Vec<&Entry> = Vec::new();
        let mut maps = vec![id];
        // A merged map can merge others; a bomb of them is cut here and refused by serde's budget.
        for _ in 0..MERGES_MAX {
            let Some(id) = maps.pop() else { break };
            match &self.nodes[id].kind {
                // The first of several merged maps comes before the others.
                Kind::List(items) => maps.extend(items.iter().rev()),
                Kind::Map(entries) => {
                    let (merges, own): (Vec<&Entry>, Vec<&Entry>) =
                        entries.iter().partition(|entry| entry.name == MERGE);
                    let known = fields.len();
                    let new = |entry: &&Entry| !fields[..known].iter().any(|field| field.name == entry.name);
                    let new: Vec<&Entry> = own.into_iter().filter(new).collect();
                    fields.extend(new);
                    maps.extend(merges.iter().map(|entry| entry.value));
                }
                Kind::Scalar { .. } => {}
            }
        }
        fields
    }

    /// The path of the deepest value (or field name) that stands exactly at `pos`.
    pub fn path_at(&self, pos: Pos) -> Option<Path> {
        let mut found = None;
        let mut rest = vec![(self.root, Path::default())];
        // Aliases can make more ways than nodes: a bomb must not be walked in full.
        for _ in 0..NODES_MAX {
            let Some((id, path)) = rest.pop() else { break };
            if self.nodes[id].pos == pos {
                found = Some(path.clone());
            }
            match &self.nodes[id].kind {
                Kind::Scalar { .. } => {}
                Kind::List(items) => {
                    let steps = items.iter().enumerate();
                    rest.extend(steps.map(|(index, id)| (*id, path.index(index))));
                }
                Kind::Map(entries) => {
                    if let Some(entry) = entries.iter().find(|entry| entry.pos == pos) {
                        return Some(path.name(&entry.name));
                    }
                    rest.extend(entries.iter().map(|entry| (entry.value, path.name(&entry.name))));
                }
            }
        }
        found
    }
}

fn position(marker: &Marker) -> Pos {
    let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    Pos {
        line: number(marker.line()),
        column: number(marker.col()).saturating_add(1),
    }
}

/// A list or map whose end has not come yet.
struct Open {
    id: NodeId,
    /// A map's name whose value comes next.
    name: Option<(Pos, String)>,
}

#[derive(Default)]
struct Builder {
    nodes: Vec<Node>,
    open: Vec<Open>,
    anchors: HashMap<usize, NodeId>,
    root: Option<NodeId>,
    documents: usize,
}

impl Builder {
    fn event(&mut self, event: Event<'_>, pos: Pos) -> Result<(), String> {
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Err("a second document (`---`) is not allowed".into());
                }
            }
            Event::Scalar(text, style, anchor, _) => {
                let kind = Kind::Scalar {
                    text: text.into_owned(),
                    plain: style == ScalarStyle::Plain,
                };
                self.add(pos, kind, anchor)?;
            }
            Event::SequenceStart(_, anchor, _) => self.begin(pos, Kind::List(Vec::new()), anchor)?,
            Event::MappingStart(_, anchor, _) => self.begin(pos, Kind::Map(Vec::new()), anchor)?,
            Event::SequenceEnd | Event::MappingEnd => {
                self.open.pop();
            }
            Event::Alias(anchor) => {
                let id = self.anchors.get(&anchor).copied().ok_or("unknown anchor")?;
                if self.open.iter().any(|open| open.id == id) {
                    return Err("an alias inside of its own anchor is not allowed".into());
                }
                self.attach(id, pos)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn begin(&mut self, pos: Pos, kind: Kind, anchor: usize) -> Result<(), String> {
        let id = self.add(pos, kind, anchor)?;
        self.open.push(Open { id, name: None });
        if self.open.len() > DEPTH_MAX {
            return Err(format!("nested deeper than {DEPTH_MAX}"));
        }
        Ok(())
    }

    fn add(&mut self, pos: Pos, kind: Kind, anchor: usize) -> Result<NodeId, String> {
        let id = self.nodes.len();
        if id >= NODES_MAX {
            return Err(format!("more than {NODES_MAX} values"));
        }
        self.nodes.push(Node { pos, kind });
        if anchor != 0 {
            self.anchors.insert(anchor, id);
        }
        self.attach(id, pos)?;
        Ok(id)
    }

    /// Puts a node into the list or map that is open, as a name or as a value.
    fn attach(&mut self, id: NodeId, pos: Pos) -> Result<(), String> {
        let Some(open) = self.open.last_mut() else {
            self.root.get_or_insert(id);
            return Ok(());
        };
        let is_map = matches!(self.nodes[open.id].kind, Kind::Map(_));
        if is_map && open.name.is_none() {
            let Kind::Scalar { text, .. } = &self.nodes[id].kind else {
                return Err("a list or map cannot be the name of a field".into());
            };
            open.name = Some((pos, text.clone()));
            return Ok(());
        }
        let name = open.name.take();
        match (&mut self.nodes[open.id].kind, name) {
            (Kind::List(items), _) => items.push(id),
            (Kind::Map(entries), Some((pos, name))) => entries.push(Entry { pos, name, value: id }),
            _ => {}
        }
        Ok(())
    }
}
