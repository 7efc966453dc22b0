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

seconds=${1:-5}
pid=${GATEWAY_PID:-$(pidof -s gateway)} || { echo "$0: no gateway runs, and GATEWAY_PID is not set" >&2; exit 1; }
command -v strace >/dev/null || { echo "$0: needs strace (apt-get install strace)" >&2; exit 1; }

# The sum of a counter over its labels; empty where the admin address does not answer.
counter() {
  local token=()
  [ -r "${GATEWAY_STATE:-/var/lib/gateway}/admin.token" ] \
    && token=(-H "Authorization: Bearer $(cat "${GATEWAY_STATE:-/var/lib/gateway}/admin.token")")
  curl -sf -m 20 "${token[@]}" "http://${GATEWAY_ADMIN:-127.0.0.1:9900}/metrics" 2>/dev/null \
    | awk -v name="$1" '$1 == name || index($1, name "{") == 1 { sum += $2; seen = 1 } END { if (seen) printf "%.0f", sum }' || true
}

out=$(mktemp)
trap 'rm -f "$out"' EXIT
before=$(counter gateway_events_relayed_total)
# SIGINT makes strace let go and print; the process goes on.
timeout --preserve-status -s INT "$seconds" strace -f -c -U name,calls,errors -p "$pid" -o "$out" 2>/dev/null || true
after=$(counter gateway_events_relayed_total)

cat "$out"
calls=$(awk '$1 == "total" { print $2 }' "$out")
if [ -n "$before" ] && [ -n "$after" ] && [ "$after" -gt "$before" ]; then
  awk -v calls="${calls:-0}" -v events=$((after - before)) \
    'BEGIN { printf "%d calls, %d events: %.3f calls an event\n", calls, events, calls / events }'
else
  echo "${calls:-0} calls in $seconds s; calls an event: the admin address does not tell (GATEWAY_ADMIN)"
fi
