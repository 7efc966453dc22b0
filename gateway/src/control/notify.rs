//! stub
pub fn ready() {} pub fn stopping() {}
pub struct Watchdog; impl Watchdog { pub fn new() -> Self { Watchdog } pub fn beat(&mut self, _h: impl Fn() -> bool) {} }
