#!/bin/bash
# System calls of the gateway, by name, and how many a relayed event: the number that the relay is built to keep small.
#
#   perf/syscalls.sh [SECONDS]                 of $GATEWAY_PID, or the one gateway that runs here
#   perf/under-load.sh perf/syscalls.sh 5
#
# Counts are exact; the gateway is several times slower while they are taken, so the times say nothing.
# Needs: strace, curl, the right to trace the process (its user, or root). What io_uring does in one io_uring_enter is one
# call here; `perf stat -e 'io_uring:io_uring_submit_req' -p PID` counts the operations.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=perf/lib.sh
. "$root/perf/lib.sh"

help "$@"
seconds=${1:-5}
check_seconds "$seconds"
find_gateway
command -v strace >/dev/null || fail "needs strace (apt-get install strace)"

out=$(mktemp)
trap 'rm -f "$out" "$out.told"' EXIT
start_work
# SIGINT makes strace let go and print; the process goes on.
timeout --preserve-status -s INT "$seconds" strace -f -c -U name,calls,errors -p "$pid" -o "$out" 2>"$out.told" || true
end_work
[ -s "$out" ] || fail "strace counted nothing: $(grep -v 'attached$\|detached$' "$out.told" | tail -n 3)"
[ -d "/proc/$pid" ] || fail "process $pid ended meanwhile"

cat "$out"
calls=$(awk '$1 == "total" { print $2 }' "$out")
per_work "${calls:-0}" "system calls"
