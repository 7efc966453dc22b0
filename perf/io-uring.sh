#!/bin/bash
# What the gateway's rings do: operations submitted and completed, waits, work that was put off to a worker thread (there
# should be none), overflows of the completion queue (none either), by the kernel's tracepoints; and the rings' own state.
#
#   perf/io-uring.sh [SECONDS]                 of $GATEWAY_PID, or the one gateway that runs here
#   perf/under-load.sh --model stream --connections 500 perf/io-uring.sh 5
#
# Needs: perf with the io_uring tracepoints (linux-perf; tracefs), root; curl for the counts an event.
set -euo pipefail

[ "${1:-}" != --help ] || { sed -nE '2,/^set/ s/^# ?//p' "$0" | head -n -1; exit 0; }
seconds=${1:-5}
pid=${GATEWAY_PID:-$(pidof -s gateway)} || { echo "$0: no gateway runs, and GATEWAY_PID is not set" >&2; exit 1; }
command -v perf >/dev/null || { echo "$0: needs perf (apt-get install linux-perf)" >&2; exit 1; }
perf stat -e io_uring:io_uring_complete true 2>/dev/null \
  || { echo "$0: needs the io_uring tracepoints (root; tracefs under /sys/kernel/tracing)" >&2; exit 1; }

counter() {
  local token=()
  [ -r "${GATEWAY_STATE:-/var/lib/gateway}/admin.token" ] \
    && token=(-H "Authorization: Bearer $(cat "${GATEWAY_STATE:-/var/lib/gateway}/admin.token")")
  curl -sf -m 20 "${token[@]}" "http://${GATEWAY_ADMIN:-127.0.0.1:9900}/metrics" 2>/dev/null \
    | awk -v name="$1" '$1 == name || index($1, name "{") == 1 { sum += $2; seen = 1 } END { if (seen) printf "%.0f", sum }' || true
}

events=()
for event in submit_req complete cqring_wait queue_async_work poll_arm task_add task_work_run local_work_run short_write \
  cqe_overflow fail_link req_failed; do
  [ -d "/sys/kernel/tracing/events/io_uring/io_uring_$event" ] || [ -d "/sys/kernel/debug/tracing/events/io_uring/io_uring_$event" ] \
    || perf stat -e "io_uring:io_uring_$event" true 2>/dev/null || continue
  events+=(-e "io_uring:io_uring_$event")
done
out=$(mktemp)
trap 'rm -f "$out"' EXIT
before=$(counter gateway_events_relayed_total)
perf stat -x, -o "$out" "${events[@]}" -p "$pid" -- sleep "$seconds"
after=$(counter gateway_events_relayed_total)
relayed=$((${after:-0} - ${before:-0}))

awk -F, -v seconds="$seconds" -v relayed="$relayed" '
  $3 ~ /^io_uring:/ { name = $3; sub(/^io_uring:io_uring_/, "", name)
    printf "%-18s %12d %12.0f/s %s\n", name, $1, $1 / seconds, (relayed > 0) ? sprintf("%9.3f an event", $1 / relayed) : "" }' "$out"
[ "$relayed" -gt 0 ] || echo "counts an event: the admin address does not tell (GATEWAY_ADMIN)"

# fdinfo of an io_uring descriptor tells its queues (io_uring/fdinfo.c); only the owner and root may read it.
for fd in /proc/"$pid"/fd/*; do
  [ "$(readlink "$fd")" = "anon_inode:[io_uring]" ] || continue
  echo "ring $(basename "$fd"): $(grep -E '^(SqMask|CqMask|SqThread|UserFiles|UserBufs|CqHead|CqTail|SqHead|SqTail):' \
    "/proc/$pid/fdinfo/$(basename "$fd")" 2>/dev/null | tr '\t\n' '  ')"
done
