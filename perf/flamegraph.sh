#!/bin/bash
# Where the gateway's CPU time goes, as an interactive SVG.
#
#   perf/flamegraph.sh [SECONDS [OUT.svg]]     of $GATEWAY_PID, or the one gateway that runs here
#   perf/under-load.sh perf/flamegraph.sh 10
#
# Needs: perf (linux-perf), root or kernel.perf_event_paranoid <= 1. Drawn by inferno, which is built once into
# target/tools. Stacks are unwound by `.eh_frame`, and the release build keeps the names of functions; frame pointers would cost a register.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=perf/lib.sh
. "$root/perf/lib.sh"

help "$@"
seconds=${1:-10}
out=${2:-$root/target/flamegraph.svg}
check_seconds "$seconds"
find_gateway
command -v perf >/dev/null || { echo "$0: needs perf (apt-get install linux-perf)" >&2; exit 1; }
need_inferno

data=$(mktemp)
trap 'rm -f "$data" "$data.old" "$data.folded"' EXIT
# Virtual machines often have no hardware counters; the clock does too.
event=cycles
perf stat -e cycles true 2>&1 | grep -q 'not supported' && event=cpu-clock
# 997: not in step with the timers of the kernel or the gateway.
perf record -q -e "$event" -F 997 --call-graph dwarf,16384 -p "$pid" -o "$data" -- sleep "$seconds" \
  || fail "perf could not record process $pid (did it end? root, or kernel.perf_event_paranoid <= 1)"
perf script -i "$data" --no-inline 2>/dev/null | inferno-collapse-perf --all 2>/dev/null > "$data.folded"
[ -s "$data.folded" ] || fail "no sample: the process did not run on a CPU"
inferno-flamegraph --title "gateway, $event" < "$data.folded" > "$out"
awk '{ split($0, f, ";"); n = $NF; sub(/ [0-9]+$/, ""); k = split($0, f, ";"); self[f[k]] += n; all += n }
     END { for (s in self) printf "%6.2f%%  %s\n", 100 * self[s] / all, s }' "$data.folded" | sort -rn | head -20 || true
echo "wrote $out"
