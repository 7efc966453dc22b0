#!/bin/bash
# Instructions by function: for comparing two versions of a hot function on a noisy machine or one without hardware counters.
#
#   perf/callgrind.sh                    the gateway under load (epoll: valgrind does not know all of io_uring)
#   perf/callgrind.sh COMMAND ARGS…      of any program, for example a test binary with the name of one test
#
# Under load the counts are of some seconds, so that only those an event (or a request) can be compared; they are printed.
# Of a program that does the same each time they repeat to the instruction.
# Environment: SECONDS_OF_LOAD (10), MODEL (flood), BUILD (target/release), TOP (25 lines).
# Needs: valgrind. The gateway is some fifty times slower under it: counts are right, times are not.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=perf/lib.sh
. "$root/perf/lib.sh"

# Called by itself, while the load runs: counts from here on, for some seconds, and says what was done meanwhile.
if [ "${1:-}" = --during ]; then
  callgrind_control --zero "$GATEWAY_PID" >/dev/null
  start_work
  sleep "$2"
  end_work
  callgrind_control --dump "$GATEWAY_PID" >/dev/null
  instructions=$(awk '/^(totals|summary):/ { n = $2 } END { printf "%d", n }' "$3.$GATEWAY_PID.1")
  per_work "$instructions" instructions > "$3.told"
  exit 0
fi

help "$@"
command -v valgrind >/dev/null || fail "needs valgrind (apt-get install valgrind)"

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
tool="valgrind --quiet --tool=callgrind --callgrind-out-file=$out/callgrind.%p --max-threads=2000"
if [ $# -gt 0 ]; then
  $tool "$@"
  counts=$(find "$out" -name 'callgrind.*' -printf '%T@ %p\n' | sort -rn | awk 'NR == 1 { print $2 }')
else
  seconds=${SECONDS_OF_LOAD:-10}
  check_seconds "$seconds"
  "$root/perf/under-load.sh" --driver epoll --connections 4 --model "${MODEL:-flood}" --build "${BUILD:-$root/target/release}" \
    --wrap "$tool" "$root/perf/callgrind.sh" --during "$seconds" "$out/callgrind"
  # The first dump: the seconds asked for, without start and end.
  counts=$(find "$out" -name 'callgrind.*.1' -print -quit)
fi
[ -n "$counts" ] || fail "callgrind wrote no counts"
cp "$counts" "$root/target/callgrind.out"
# awk reads to the end: with head, annotate would end by a broken pipe, and this script with it.
callgrind_annotate --auto=no "$counts" | awk -v most=$((${TOP:-25} + 2)) '
  /PROGRAM TOTALS/ { table = 1 } table && NF && !/^--/ && ++n <= most'
[ ! -e "$out/callgrind.told" ] || cat "$out/callgrind.told"
echo "wrote target/callgrind.out (kcachegrind opens it)"
