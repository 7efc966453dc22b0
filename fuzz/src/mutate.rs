//! A bounded, repeatable run of every target on stable Rust: seeds are cut, spliced and salted with
//! words of their format. It is blind to coverage; the libFuzzer targets are not (see README.md).
//!
//! `mutate [--runs N] [--seed S] [--target NAME]` runs; `mutate --target NAME FILE…` tries inputs
//! that were kept; `mutate --write-seeds` puts the seeds into `corpus/` for libFuzzer. The first
//! input that fails is written to `artifacts/` and ends the run with 1.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;

use gateway_fuzz::{TARGETS, Target};

/// Inputs tried for each target where nothing else is asked for.
const RUNS: u64 = 200_000;

/// Longest input, bytes. Beyond it only the bounds are met, which tests do.
const INPUT_BYTES_MAX: usize = 4096;

/// Most edits of one input.
const EDITS_MAX: usize = 8;

struct Arguments {
    runs: u64,
    seed: u64,
    target: Option<String>,
    write_seeds: bool,
    files: Vec<String>,
}

fn main() -> ExitCode {
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!(
                "{error}\nusage: mutate [--runs N] [--seed S] [--target NAME] [--write-seeds | FILE...]"
            );
            return ExitCode::from(2);
        }
    };
    let chosen = |target: &&Target| arguments.target.as_deref().is_none_or(|name| name == target.name);
    for target in TARGETS.iter().filter(chosen) {
        let result = if arguments.write_seeds {
            write_seeds(target)
        } else if arguments.files.is_empty() {
            run(target, arguments.runs, arguments.seed)
        } else {
            replay(target, &arguments.files)
        };
        match result {
            Ok(tried) if arguments.write_seeds => println!("{}: {tried} seeds written", target.name),
            Ok(tried) => println!("{}: {tried} inputs hold", target.name),
            Err(error) => {
                eprintln!("{}: {error}", target.name);
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut arguments = Arguments {
        runs: RUNS,
        seed: 1,
        target: None,
        write_seeds: false,
        files: Vec::new(),
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--runs" => arguments.runs = number(&value()?)?,
            "--seed" => arguments.seed = number(&value()?)?,
            "--target" => arguments.target = Some(value()?),
            "--write-seeds" => arguments.write_seeds = true,
            _ if word.starts_with("--") => return Err(format!("unknown argument {word}")),
            _ => arguments.files.push(word),
        }
    }
    match &arguments.target {
        Some(name) if !TARGETS.iter().any(|target| target.name == name) => {
            Err(format!("no target {name}; there are head, chunked, sse, json"))
        }
        None if !arguments.files.is_empty() => Err("files need a --target".to_owned()),
        _ => Ok(arguments),
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text} is no number"))
}

fn run(target: &Target, runs: u64, seed: u64) -> Result<u64, String> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    for index in 0..runs {
        let input = mutate(target, &mut random);
        if holds(target, &input) {
            continue;
        }
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("artifacts");
        let file = folder.join(format!("{}-{seed}-{index}", target.name));
        let kept = std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&file, &input));
        let place = kept.map_or_else(|error| error.to_string(), |()| file.display().to_string());
        return Err(format!(
            "input {index} of seed {seed} fails: {} ({place})",
            input.escape_ascii()
        ));
    }
    Ok(runs)
}

fn write_seeds(target: &Target) -> Result<u64, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name);
    std::fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
    for (index, seed) in target.seeds.iter().enumerate() {
        std::fs::write(folder.join(format!("seed-{index}")), seed).map_err(|error| error.to_string())?;
    }
    Ok(target.seeds.len() as u64)
}

fn replay(target: &Target, files: &[String]) -> Result<u64, String> {
    for file in files {
        let input = std::fs::read(file).map_err(|error| format!("{file}: {error}"))?;
        if !holds(target, &input) {
            return Err(format!("{file} fails"));
        }
    }
    Ok(files.len() as u64)
}

fn holds(target: &Target, input: &[u8]) -> bool {
    catch_unwind(AssertUnwindSafe(|| (target.check)(input))).is_ok()
}

/// A seed after a few edits.
fn mutate(target: &Target, random: &mut Random) -> Vec<u8> {
    let mut input = random.pick(target.seeds).to_vec();
    for _ in 0..random.below(EDITS_MAX + 1) {
        let at = random.below(input.len() + 1);
        let end = (at + random.below(16)).min(input.len());
        match random.below(8) {
            0..=2 => drop(input.splice(at..at, random.pick(target.words).iter().copied())),
            3 => drop(input.splice(at..end, random.pick(target.words).iter().copied())),
            4 => drop(input.drain(at..end)),
            5 => drop(input.splice(at..at, input[at..end].repeat(1 + random.below(4)))),
            6 => {
                let other = random.pick(target.seeds);
                input.truncate(at);
                input.extend_from_slice(&other[random.below(other.len() + 1)..]);
            }
            _ => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = random.next() as u8;
                }
            }
        }
    }
    input.truncate(INPUT_BYTES_MAX);
    input
}

/// xorshift64*: the same inputs for the same seed, on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// A number below `bound`, which is not 0. The bias is of no matter here.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn pick(&mut self, from: &'static [&'static [u8]]) -> &'static [u8] {
        from[self.below(from.len())]
    }
}
