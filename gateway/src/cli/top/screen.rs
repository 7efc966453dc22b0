//! The terminal: taken over for as long as a [`Screen`] lives, and given back whatever ends it.

use std::{
    io::{self, Write, stdout},
    sync::{
        Arc, Once,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crossterm::{
    cursor::{Hide, MoveTo, Show},
    event::{Event, KeyCode, KeyEventKind, KeyModifiers, poll, read},
    execute, queue,
    style::Print,
    terminal::{
        BeginSynchronizedUpdate, Clear, ClearType, EndSynchronizedUpdate, EnterAlternateScreen,
        LeaveAlternateScreen, disable_raw_mode, enable_raw_mode, size,
    },
};

use crate::control::admin::top::Sort;

/// What is taken for the size of a terminal that does not tell it.
const SIZE: (u16, u16) = (80, 24);

/// What was pressed.
pub enum Key {
    End,
    Pause,
    Sort(Sort),
    /// The terminal has another size.
    Redraw,
}

/// Signals that end a program; a terminal that is closed sends the last one.
const ENDING: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
/// Longest time for which such a signal goes unnoticed while a key is waited for.
const NOTICE_MAX: Duration = Duration::from_millis(200);

/// The terminal in raw mode, on its alternate screen, without a cursor.
pub struct Screen {
    /// A signal asks it to end.
    ended: Arc<AtomicBool>,
}

impl Screen {
    /// Takes the terminal over.
    ///
    /// # Errors
    /// It is none.
    pub fn enter() -> io::Result<Screen> {
        static HOOK: Once = Once::new();
        // A panic's message would be lost on the alternate screen, and stand askew in raw mode.
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                before(panic);
            }));
        });
        let ended = Arc::new(AtomicBool::new(false));
        for signal in ENDING {
            signal_hook::flag::register(signal, ended.clone())?;
        }
        enable_raw_mode()?;
        // From here on the drop gives it back, also when the next line fails.
        let screen = Screen { ended };
        execute!(stdout(), EnterAlternateScreen, Hide)?;
        Ok(screen)
    }

    /// Columns and lines.
    pub fn size(&self) -> (u16, u16) {
        size()
            .ok()
            .filter(|(width, height)| *width > 0 && *height > 0)
            .unwrap_or(SIZE)
    }

    /// Draws lines from the top, as many as there is room for.
    pub fn draw(&mut self, lines: &[String]) -> io::Result<()> {
        let (width, height) = self.size();
        let mut out = stdout().lock();
        queue!(out, BeginSynchronizedUpdate)?;
        for row in 0..height {
            let line = lines.get(usize::from(row)).map_or("", String::as_str);
            let cut: String = line.chars().take(usize::from(width)).collect();
            queue!(out, MoveTo(0, row), Print(cut), Clear(ClearType::UntilNewLine))?;
        }
        queue!(out, EndSynchronizedUpdate)?;
        out.flush()
    }

    /// Waits for a key that means something; a signal to end is one.
    pub fn key(&mut self, wait: Duration) -> io::Result<Option<Key>> {
        let began = std::time::Instant::now();
        loop {
            if self.ended.load(Ordering::Relaxed) {
                return Ok(Some(Key::End));
            }
            let left = wait.saturating_sub(began.elapsed());
            if poll(left.min(NOTICE_MAX))? {
                if let Some(key) = meaning(&read()?) {
                    return Ok(Some(key));
                }
            } else if left.is_zero() {
                return Ok(None);
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let _ = execute!(stdout(), Show, LeaveAlternateScreen);
    let _ = disable_raw_mode();
}

fn meaning(event: &Event) -> Option<Key> {
    let key = match event {
        Event::Resize(..) => return Some(Key::Redraw),
        Event::Key(key) if key.kind != KeyEventKind::Release => key,
        _ => return None,
    };
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        // In raw mode the terminal makes no signals of these.
        KeyCode::Char('c' | 'd') if control => Some(Key::End),
        KeyCode::Char('q') | KeyCode::Esc => Some(Key::End),
        KeyCode::Char(' ') => Some(Key::Pause),
        KeyCode::Char('c') => Some(Key::Sort(Sort::Connections)),
        KeyCode::Char('b') => Some(Key::Sort(Sort::Bytes)),
        KeyCode::Char('t') => Some(Key::Sort(Sort::Tokens)),
        KeyCode::Char('r') => Some(Key::Sort(Sort::Requests)),
        KeyCode::Char('f') => Some(Key::Sort(Sort::Refusals)),
        KeyCode::Char('l') => Some(Key::Sort(Sort::Rtt)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use crossterm::event::KeyEvent;

    use super::*;

    #[test]
    fn keys_mean_what_the_help_says() {
        let press = |code, modifiers| meaning(&Event::Key(KeyEvent::new(code, modifiers)));
        let none = KeyModifiers::NONE;
        assert!(matches!(
            press(KeyCode::Char('c'), KeyModifiers::CONTROL),
            Some(Key::End)
        ));
        assert!(matches!(press(KeyCode::Char('q'), none), Some(Key::End)));
        assert!(matches!(
            press(KeyCode::Char('c'), none),
            Some(Key::Sort(Sort::Connections))
        ));
        assert!(matches!(
            press(KeyCode::Char('f'), none),
            Some(Key::Sort(Sort::Refusals))
        ));
        assert!(press(KeyCode::Char('x'), none).is_none());
        assert!(matches!(meaning(&Event::Resize(1, 1)), Some(Key::Redraw)));
    }
}
