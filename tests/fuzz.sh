#!/bin/bash
# Fuzzes the parsers of foreign bytes (fuzz/README.md): first the deterministic run that stable Rust can do, then libFuzzer,
# guided by coverage, for the given seconds a target. Findings stay in fuzz/artifacts.
#
#   tests/fuzz.sh [SECONDS]     default 60; 0: the deterministic run only
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-60}
[ -f fuzz/Cargo.toml ] || { echo "skipped: no fuzz targets here"; exit 0; }
cd fuzz
cargo run --release
[ "$seconds" -gt 0 ] || exit 0
command -v c++ >/dev/null || { echo "skipped: libFuzzer: no C++ compiler"; exit 0; }
./run-libfuzzer "$seconds"
