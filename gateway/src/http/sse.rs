//! Interim framer.
#[derive(Default)]
pub struct Framer { blank: bool, cr: bool, ended_cr: bool }
impl Framer {
    pub fn next_end(&mut self, b: &[u8]) -> Option<usize> {
        let mut i = 0;
        while i < b.len() {
            let c = b[i];
            i += 1;
            if c == b'\n' && self.cr { self.cr = false; if self.ended_cr { self.ended_cr = false; if i == 1 { return self.next_end(&b[1..]).map(|n| n + 1); } } continue; }
            self.cr = c == b'\r';
            self.ended_cr = false;
            if c == b'\n' || c == b'\r' {
                if self.blank { 
                    self.blank = true;
                    if self.cr && b.get(i) == Some(&b'\n') { i += 1; self.cr = false; } else if self.cr { self.ended_cr = true; }
                    return Some(i); }
                self.blank = true;
            } else { self.blank = false; }
        }
        None
    }
}
pub fn data<'a>(event: &'a [u8], _j: &'a mut Vec<u8>) -> &'a [u8] {
    let at = memchr::memmem::find(event, b"data:").map_or(0, |a| a + 5);
    event[at..].trim_ascii()
}
