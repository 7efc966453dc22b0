#!/usr/bin/env bash
# Measures the README's figures: a thin front of `gateway-bench compare`. See docs/bench.md.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bench/run.sh [--rounds N] [--seconds N] [--targets "direct nginx gateway"] [--scenarios "memory json-1k busy ..."] [--out DIR]

targets: files of bench/targets; scenarios: files of bench/scenarios. Environment: GATEWAY and BENCH name the binaries
(default: built here in release).
TEXT
}

root=$(cd "$(dirname "$0")/.." && pwd)
rounds=2
seconds=8
targets="direct nginx gateway"
scenarios="memory json-1k busy light flood"
out=$root/target/bench-results
while [ $# -gt 0 ]; do
    case $1 in
    --help | -h) usage && exit 0 ;;
    --*) [ $# -ge 2 ] || { echo "$0: $1 needs a value" >&2; usage >&2; exit 2; } ;;
    esac
    case $1 in
    --rounds) rounds=$2 ;;
    --seconds) seconds=$2 ;;
    --targets) targets=$2 ;;
    --scenarios) scenarios=$2 ;;
    --out) out=$2 ;;
    *) usage >&2 && exit 2 ;;
    esac
    shift 2
done

if [ -z "${BENCH:-}" ] || [ -z "${GATEWAY:-}" ]; then
    (cd "$root" && cargo build --release --quiet -p gateway-bench -p gateway)
fi
exec "${BENCH:-$root/target/release/gateway-bench}" compare --root "$root" \
    --gateway "${GATEWAY:-$root/target/release/gateway}" --rounds "$rounds" --window "${seconds}s" \
    --targets "${targets// /,}" --scenarios "${scenarios// /,}" --out "$out"
