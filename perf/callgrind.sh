#!/bin/bash
# Instructions by function, exact and the same from run to run: for comparing two versions of a hot function on a noisy
# machine or one without hardware counters.
#
#   perf/callgrind.sh                    the gateway under load (epoll: valgrind does not know all of io_uring)
#   perf/callgrind.sh COMMAND ARGS…      of any program, for example a test binary with the name of one test
#
# Environment: SECONDS_OF_LOAD (10), MODEL (flood), BUILD (target/release), TOP (25 lines).
# Needs: valgrind. The gateway is some fifty times slower under it, so counts an event are right and times are not.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

[ "${1:-}" != --help ] || { sed -nE '2,/^set/ s/^# ?//p' "$0" | head -n -1; exit 0; }
command -v valgrind >/dev/null || { echo "$0: needs valgrind (apt-get install valgrind)" >&2; exit 1; }

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
tool="valgrind --quiet --tool=callgrind --callgrind-out-file=$out/callgrind.%p --max-threads=2000"
if [ $# -gt 0 ]; then
  $tool "$@"
else
  "$root/perf/under-load.sh" --driver epoll --connections 4 --model "${MODEL:-flood}" --build "${BUILD:-$root/target/release}" \
    --wrap "$tool" sleep "${SECONDS_OF_LOAD:-10}"
fi
newest=$(ls -t "$out"/callgrind.* | head -1)
cp "$newest" "$root/target/callgrind.out"
callgrind_annotate --auto=no "$newest" | grep -v '^--' | head -$((${TOP:-25} + 12))
echo "wrote target/callgrind.out (kcachegrind opens it)"
