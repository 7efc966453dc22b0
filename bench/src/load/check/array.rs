//! Takes the objects out of one JSON array that comes in pieces cut anywhere.

/// Bytes of one object.
const OBJECT_BYTES_MAX: usize = 64 * 1024 * 1024;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Before the array.
    #[default]
    Before,
    /// In the array, between objects.
    Between,
    /// In an object.
    Object,
    Text,
    Escape,
    Done,
    Broken,
}

#[derive(Debug, Default)]
pub(super) struct Splitter {
    state: State,
    /// Braces and brackets that are open inside the object.
    depth: usize,
    object: Vec<u8>,
}

impl Splitter {
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Whether what came is not an array of objects.
    pub fn is_broken(&self) -> bool {
        self.state == State::Broken
    }

    /// Eats from `input` up to the end of the next object, or all of it. What is inside the object is not looked at.
    pub fn step(&mut self, input: &[u8]) -> (usize, Option<Vec<u8>>) {
        let mut start = 0;
        for (at, byte) in input.iter().enumerate() {
            let before = self.state;
            self.state = self.after(*byte);
            if before == State::Between && self.state == State::Object {
                start = at;
            }
            if before == State::Object && self.state == State::Between {
                self.object.extend_from_slice(&input[start..=at]);
                return (at + 1, Some(std::mem::take(&mut self.object)));
            }
        }
        if matches!(self.state, State::Object | State::Text | State::Escape) {
            self.object.extend_from_slice(&input[start..]);
            if self.object.len() > OBJECT_BYTES_MAX {
                self.state = State::Broken;
            }
        }
        (input.len(), None)
    }

    /// Gives the memory of an object back.
    pub fn reuse(&mut self, mut object: Vec<u8>) {
        object.clear();
        self.object = object;
    }

    fn after(&mut self, byte: u8) -> State {
        match (self.state, byte) {
            (State::Before | State::Between | State::Done, b' ' | b'\n' | b'\r' | b'\t') => self.state,
            (State::Before, b'[') => State::Between,
            (State::Between, b',') => State::Between,
            (State::Between, b']') => State::Done,
            (State::Between, b'{') => {
                self.depth = 1;
                State::Object
            }
            (State::Object, b'"') => State::Text,
            (State::Object, b'{' | b'[') => {
                self.depth += 1;
                State::Object
            }
            (State::Object, b'}' | b']') => {
                self.depth -= 1;
                if self.depth == 0 {
                    State::Between
                } else {
                    State::Object
                }
            }
            (State::Object, _) => State::Object,
            (State::Text, b'"') => State::Object,
            (State::Text, b'\\') => State::Escape,
            (State::Text | State::Escape, _) => State::Text,
            _ => State::Broken,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(text: &[u8], cuts: &[usize]) -> (Vec<String>, bool) {
        let mut splitter = Splitter::default();
        let mut objects = Vec::new();
        let mut start = 0;
        for cut in cuts.iter().copied().chain([text.len()]) {
            let mut piece = &text[start..cut];
            start = cut;
            while !piece.is_empty() {
                let (eaten, object) = splitter.step(piece);
                objects.extend(object.map(|object| String::from_utf8(object).unwrap()));
                piece = &piece[eaten..];
            }
        }
        (objects, splitter.is_done())
    }

    #[test]
    fn objects_survive_every_two_cuts() {
        let text = br#"[{"a":"}]\"{","b":[1,{"c":{}}]}
, {"d":"\\"},{}] "#;
        let wanted = [r#"{"a":"}]\"{","b":[1,{"c":{}}]}"#, r#"{"d":"\\"}"#, "{}"];
        for first in 0..=text.len() {
            for second in first..=text.len() {
                let (objects, done) = split(text, &[first, second]);
                assert_eq!(
                    (objects.as_slice(), done),
                    (&wanted.map(str::to_owned)[..], true),
                    "{first} {second}"
                );
            }
        }
    }

    #[test]
    fn what_is_no_array_is_broken() {
        for text in ["{}", "x", "[1]", "[] x", "[}"] {
            let mut splitter = Splitter::default();
            splitter.step(text.as_bytes());
            assert!(splitter.is_broken(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0_usize..200) {
            let mut splitter = Splitter::default();
            for piece in bytes.chunks(cut.max(1)) {
                let mut rest = piece;
                while !rest.is_empty() {
                    let (eaten, _) = splitter.step(rest);
                    prop_assert!(eaten > 0);
                    rest = &rest[eaten..];
                }
            }
        }
    }
}
