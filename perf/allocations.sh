#!/bin/bash
# Who allocates, how much, and what is never given back: the gateway under load with heaptrack.
#
#   perf/allocations.sh [SECONDS]              flood; MODEL=stream|plain|idle CONNECTIONS=16 TOP=15 (callers)
#
# The shipped binary has mimalloc linked in, which no tool can look into; this builds one with the system's allocator
# (--no-default-features) into target/allocations. The calls are the same, their cost is not.
# A relayed event must allocate nothing: `gateway/tests/relay_alloc.rs` holds that; this shows what the rest does.
# Needs: heaptrack (apt-get install heaptrack).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=perf/lib.sh
. "$root/perf/lib.sh"

help "$@"
check_seconds "${1:-10}"
command -v heaptrack >/dev/null || { echo "$0: needs heaptrack (apt-get install heaptrack)" >&2; exit 1; }
build=$root/target/allocations/profiling
(cd "$root" && cargo build -q --profile profiling --locked --target-dir target/allocations -p gateway --no-default-features --bin gateway \
  && cargo build -q --profile profiling --locked --target-dir target/allocations -p gateway-bench)
out=$root/target/heaptrack
rm -f "$out".*
"$root/perf/under-load.sh" --build "$build" --model "${MODEL:-flood}" --connections "${CONNECTIONS:-16}" \
  --wrap "heaptrack --output $out" sleep "${1:-10}"
trace=$(find "$root/target" -maxdepth 1 -name 'heaptrack.*' -print -quit)
[ -n "$trace" ] || fail "heaptrack wrote no $out.*"
# The list of who calls most often comes first; awk reads to the end, so that nothing ends by a broken pipe.
heaptrack_print --file "$trace" --print-peaks 0 --print-temporary 0 --print-leaks 0 --peak-limit "${TOP:-15}" --short 2>/dev/null \
  | awk -v most=150 'NR <= most'
echo "wrote $trace (heaptrack_gui opens it)"
