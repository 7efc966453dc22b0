#!/usr/bin/env bash
# What the ledger takes of the gateway's work, from one run: CPU of the ledger's thread for each request (sync, sums,
# segments) beside CPU of the core that serves it. The core's own part, the append, is in the core's figure; the example
# `ledger_cost` tells it apart. CPU time, not wall time: it may run on a busy machine.
#
#   perf/under-load.sh --model plain --connections 64 bench/ledger-overhead.sh [SECONDS] [APPEND_NS]
set -euo pipefail

seconds=${1:-10} append_ns=${2:-145}
: "${GATEWAY_PID:?run it below perf/under-load.sh}" "${GATEWAY_ADMIN:?}" "${GATEWAY_STATE:?}"
token=$(cat "$GATEWAY_STATE/admin.token")

# Nanoseconds on a CPU of all threads whose name matches (Documentation/scheduler/sched-stats.rst).
cpu_ns() {
  local task sum=0 on_cpu
  for task in /proc/"$GATEWAY_PID"/task/*; do
    [[ $(cat "$task/comm") =~ $1 ]] || continue
    read -r on_cpu _ < "$task/schedstat"
    sum=$((sum + on_cpu))
  done
  echo "$sum"
}
requests() { curl -fsS -H "Authorization: Bearer $token" "http://$GATEWAY_ADMIN/metrics" | awk '$1 == "gateway_requests_total" { print $2 }'; }

all=$(cpu_ns .) ledger=$(cpu_ns '^ledger$') served=$(requests)
sleep "$seconds"
all=$(($(cpu_ns .) - all)) ledger=$(($(cpu_ns '^ledger$') - ledger)) served=$(($(requests) - served))
[ "$served" -gt 0 ] || { echo "$0: nothing was served" >&2; exit 1; }
awk -v all="$all" -v ledger="$ledger" -v n="$served" -v append="$append_ns" 'BEGIN {
  printf "requests                 %d\n", n
  printf "whole process            %.0f ns of CPU a request\n", all / n
  printf "the ledger thread        %.0f ns, %.1f %%\n", ledger / n, 100 * ledger / all
  printf "append, on the core      %.0f ns, %.1f %%\n", append, 100 * append * n / all
}'
