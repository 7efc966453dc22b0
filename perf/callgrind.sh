#!/bin/bash
# Instructions by function: for comparing two versions of a hot function on a noisy machine or one without hardware counters.
#
#   perf/callgrind.sh                    the gateway under load (epoll: valgrind does not know all of io_uring)
#   perf/callgrind.sh COMMAND ARGS…      of any program, for example a test binary with the name of one test
#
# Under load the table is of the whole run, with start and end; the last line has the instructions an event (or a request) of
# the load alone. Only these can be compared: how much is done in some seconds is never the same.
# Of a program that does the same each time they repeat to the instruction.
# Environment: SECONDS_OF_LOAD (10), MODEL (flood), BUILD (target/release), TOP (25 lines).
# Needs: valgrind. The gateway is some fifty times slower under it: counts are right, times are not.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=perf/lib.sh
. "$root/perf/lib.sh"

# Instructions of all threads so far. To zero the counts instead would lose which function each thread is in.
so_far() {
  callgrind_control -e "$GATEWAY_PID" 2>/dev/null | awk '$1 == "Th" { gsub(",", ""); sum += $NF } END { printf "%.0f", sum }'
}

# Called by itself, while the load runs: says what was done in some seconds, and with how many instructions.
if [ "${1:-}" = --during ]; then
  before=$(so_far)
  start_work
  sleep "$2"
  end_work
  per_work $(($(so_far) - before)) instructions > "$3"
  exit 0
fi

help "$@"
command -v valgrind >/dev/null || fail "needs valgrind (apt-get install valgrind)"

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
tool="valgrind --quiet --tool=callgrind --callgrind-out-file=$out/callgrind.%p --max-threads=2000"
if [ $# -gt 0 ]; then
  $tool "$@"
else
  seconds=${SECONDS_OF_LOAD:-10}
  check_seconds "$seconds"
  "$root/perf/under-load.sh" --driver epoll --connections 4 --model "${MODEL:-flood}" --build "${BUILD:-$root/target/release}" \
    --wrap "$tool" "$root/perf/callgrind.sh" --during "$seconds" "$out/told"
fi
counts=$(find "$out" -name 'callgrind.*' -printf '%T@ %p\n' | sort -rn | awk 'NR == 1 { print $2 }')
[ -n "$counts" ] || fail "callgrind wrote no counts"
cp "$counts" "$root/target/callgrind.out"
# awk reads to the end: with head, annotate would end by a broken pipe, and this script with it.
callgrind_annotate --auto=no "$counts" | awk -v most=$((${TOP:-25} + 2)) '
  /PROGRAM TOTALS/ { table = 1 } table && NF && !/^--/ && ++n <= most'
[ ! -e "$out/told" ] || echo "of these, under load: $(cat "$out/told")"
echo "wrote target/callgrind.out (kcachegrind opens it)"
