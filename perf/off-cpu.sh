#!/bin/bash
# Where the gateway waits: time off the CPU by stack, as an interactive SVG. A data-plane thread should wait in one place
# only (its ring, or epoll); whatever else is wide here blocks everybody on its core.
#
#   perf/off-cpu.sh [SECONDS [OUT.svg]]        of $GATEWAY_PID, or the one gateway that runs here
#   perf/under-load.sh --model stream perf/off-cpu.sh 10
#
# Needs: perf with the sched tracepoints (linux-perf; tracefs), root. Drawn by inferno, built once into target/tools.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=perf/lib.sh
. "$root/perf/lib.sh"

help "$@"
seconds=${1:-10}
out=${2:-$root/target/off-cpu.svg}
check_seconds "$seconds"
find_gateway
command -v perf >/dev/null || { echo "$0: needs perf (apt-get install linux-perf)" >&2; exit 1; }
perf record -q -e sched:sched_switch -o /dev/null true 2>/dev/null \
  || { echo "$0: needs the tracepoint sched:sched_switch (root; tracefs under /sys/kernel/tracing)" >&2; exit 1; }
need_inferno

data=$(mktemp)
trap 'rm -f "$data" "$data.old" "$data.folded"' EXIT
# The stack is taken when a thread leaves the CPU. When it comes back, the switch is another thread's: -a sees it.
perf record -q -a -e sched:sched_switch --call-graph dwarf,8192 -o "$data" -- sleep "$seconds"
perf script -i "$data" --no-inline -F comm,pid,tid,time,event,trace,ip,sym 2>/dev/null \
  | awk -v pid="$pid" '
    function leave() { if (tid != "" && mine) { left[tid] = at; stack[tid] = comm (frames == "" ? "" : ";" frames) state } tid = "" }
    # A header: comm pid/tid time: event: prev_comm=… prev_state=S ==> next_comm=… next_pid=N …
    /sched:sched_switch/ {
      leave()
      match($0, /[0-9]+\/[0-9]+/); split(substr($0, RSTART, RLENGTH), ids, "/")
      comm = substr($0, 1, RSTART - 1); gsub(/^[ \t]+|[ \t]+$/, "", comm); gsub(/[; ]/, "_", comm)
      match($0, /[0-9]+\.[0-9]+:/); at = substr($0, RSTART, RLENGTH - 1) + 0
      tid = ids[2]; mine = ids[1] == pid; frames = ""
      # Still runnable: somebody else had the core.
      state = ($0 ~ /prev_state=R/) ? ";[core taken by others]" : ""
      if (match($0, /next_pid=[0-9]+/)) {
        next_tid = substr($0, RSTART + 9, RLENGTH - 9)
        if (next_tid in left) { spent[stack[next_tid]] += at - left[next_tid]; delete left[next_tid] }
      }
      next
    }
    NF >= 2 && mine {
      sub(/^[ \t]*[0-9a-f]+ /, ""); sub(/\+0x[0-9a-f]+$/, ""); gsub(/;/, ":")
      # Every wait ends in these; what is above them tells which wait it is.
      if ($0 ~ /^(__schedule|schedule|schedule_timeout|schedule_hrtimeout_range|schedule_hrtimeout_range_clock|preempt_schedule.*|__cond_resched)$/) next
      frames = frames == "" ? $0 : $0 ";" frames
    }
    END { for (s in spent) if (s != "") printf "%s %d\n", s, spent[s] * 1000000 }' > "$data.folded"
[ -s "$data.folded" ] || { echo "$0: the process did not leave the CPU, or its stacks could not be read" >&2; exit 1; }
inferno-flamegraph --title "gateway, off CPU" --countname us < "$data.folded" > "$out"
awk '{ n = $NF; sub(/ [0-9]+$/, ""); k = split($0, f, ";"); self[f[1] "  " f[k]] += n }
  END { for (s in self) printf "%10.1f ms  %s\n", self[s] / 1000, s }' \
  "$data.folded" | sort -rn | head -10 || true
echo "wrote $out"
