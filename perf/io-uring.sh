#!/bin/bash
# What the gateway's rings do: operations submitted and completed, waits, work that was put off to a worker thread (there
# should be none), overflows of the completion queue (none either), by the kernel's tracepoints; and the rings' own state.
#
#   perf/io-uring.sh [SECONDS]                 of $GATEWAY_PID, or the one gateway that runs here
#   perf/under-load.sh --model stream --connections 500 perf/io-uring.sh 5
#
# Needs: perf with the io_uring tracepoints (linux-perf; tracefs), root; curl for the counts an event.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=perf/lib.sh
. "$root/perf/lib.sh"

help "$@"
seconds=${1:-5}
check_seconds "$seconds"
find_gateway
command -v perf >/dev/null || fail "needs perf (apt-get install linux-perf)"
perf stat -e io_uring:io_uring_complete true 2>/dev/null \
  || fail "needs the io_uring tracepoints (root; tracefs under /sys/kernel/tracing)"

# The descriptors that are rings.
rings=()
for fd in "/proc/$pid/fd/"*; do
  [ "$(readlink "$fd")" != "anon_inode:[io_uring]" ] || rings+=("$(basename "$fd")")
done
[ ${#rings[@]} -gt 0 ] || fail "process $pid has no ring: it runs on epoll"

tracepoints=()
for event in submit_req complete cqring_wait queue_async_work poll_arm task_add task_work_run local_work_run short_write \
  cqe_overflow fail_link req_failed; do
  [ -d "/sys/kernel/tracing/events/io_uring/io_uring_$event" ] || [ -d "/sys/kernel/debug/tracing/events/io_uring/io_uring_$event" ] \
    || perf stat -e "io_uring:io_uring_$event" true 2>/dev/null || continue
  tracepoints+=(-e "io_uring:io_uring_$event")
done
out=$(mktemp)
trap 'rm -f "$out"' EXIT
start_work
perf stat -x, -o "$out" "${tracepoints[@]}" -p "$pid" -- sleep "$seconds" || fail "perf could not count process $pid (did it end?)"
end_work

awk -F, -v seconds="$seconds" -v relayed="${events:-0}" '
  $3 ~ /^io_uring:/ { name = $3; sub(/^io_uring:io_uring_/, "", name)
    printf "%-18s %12d %12.0f/s %s\n", name, $1, $1 / seconds, (relayed > 0) ? sprintf("%9.3f an event", $1 / relayed) : "" }' "$out"
per_work "$(awk -F, '$3 ~ /_complete$/ { print $1 }' "$out")" "completions"

# fdinfo of an io_uring descriptor tells its queues (io_uring/fdinfo.c); only the owner and root may read it.
for ring in "${rings[@]}"; do
  echo "ring $ring: $(grep -E '^(SqMask|CqMask|SqThread|UserFiles|UserBufs|CqHead|CqTail|SqHead|SqTail):' \
    "/proc/$pid/fdinfo/$ring" 2>/dev/null | tr '\t\n' '  ')"
done
