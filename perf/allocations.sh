#!/bin/bash
# Who allocates, how much, and what is never given back: the gateway under load with heaptrack.
#
#   perf/allocations.sh [SECONDS]              flood; MODEL=stream|plain|idle CONNECTIONS=16
#
# The shipped binary has mimalloc linked in, which no tool can look into; this builds one with the system's allocator
# (--no-default-features) into target/allocations. The calls are the same, their cost is not.
# A relayed event must allocate nothing: `gateway/tests/relay_alloc.rs` holds that; this shows what the rest does.
# Needs: heaptrack (apt-get install heaptrack).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

[ "${1:-}" != --help ] || { sed -nE '2,/^set/ s/^# ?//p' "$0" | head -n -1; exit 0; }
command -v heaptrack >/dev/null || { echo "$0: needs heaptrack (apt-get install heaptrack)" >&2; exit 1; }
build=$root/target/allocations/profiling
(cd "$root" && cargo build -q --profile profiling --locked --target-dir target/allocations -p gateway --no-default-features --bin gateway \
  && cargo build -q --profile profiling --locked --target-dir target/allocations -p gateway-bench)
out=$root/target/heaptrack
rm -f "$out".*
"$root/perf/under-load.sh" --build "$build" --model "${MODEL:-flood}" --connections "${CONNECTIONS:-16}" \
  --wrap "heaptrack --output $out" sleep "${1:-10}"
heaptrack_print --file "$(ls "$out".* | head -1)" --print-peaks 0 --print-temporary 0 --print-leaks 0 --peak-limit 0 --short 2>/dev/null \
  | head -60 || heaptrack_print "$(ls "$out".* | head -1)" | head -80
echo "wrote $(ls "$out".* | head -1) (heaptrack_gui opens it)"
