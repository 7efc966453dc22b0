#!/bin/bash
# What one run of the gateway's eBPF programs costs: runs and nanoseconds a run, by the kernel's own run-time statistics
# (kernel.bpf_stats_enabled, from 5.1; they add some 20 ns of clock reading to each run). Root; needs bpftool.
#
#   perf/bpf-stats.sh            while the gateways of this host run, for 10 s
#   perf/bpf-stats.sh 60         for 60 s
#   perf/bpf-stats.sh -- CMD …   while a command runs, also for programs that it loads itself, for example
#   perf/bpf-stats.sh -- cargo test -p gateway --test kernel -- --ignored flood
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=perf/lib.sh
. "$root/perf/lib.sh"

help "$@"
wrong() { usage >&2; exit 2; }

seconds=10
command=()
case ${1:-} in
  "") ;;
  --) shift; command=("$@"); [ $# -gt 0 ] || wrong ;;
  *[!0-9]*) wrong ;;
  *) seconds=$1 ;;
esac
[ "$(id -u)" -eq 0 ] || { echo "bpf-stats.sh: needs root" >&2; exit 1; }
command -v bpftool >/dev/null || { echo "bpf-stats.sh: needs bpftool (apt-get install bpftool)" >&2; exit 1; }

samples=$(mktemp)
before=$(sysctl -n kernel.bpf_stats_enabled)
trap 'sysctl -qw "kernel.bpf_stats_enabled=$before"; rm -f "$samples"' EXIT
sysctl -qw kernel.bpf_stats_enabled=1

# One line a program: id, name, nanoseconds, runs. Programs of these names and types may also be another's: ids tell.
sample() {
  bpftool prog show 2>/dev/null | awk '
    / sk_reuseport  name listener / || / sock_ops  name connections / || / xdp  name driver / {
      ns = runs = 0
      for (i = 1; i < NF; i++) { if ($i == "run_time_ns") ns = $(i + 1); if ($i == "run_cnt") runs = $(i + 1) }
      print $1, $4, ns, runs
    }' >>"$samples" || true
}

sample
if [ ${#command[@]} -gt 0 ]; then
  "${command[@]}" >&2 &
  child=$!
  # Often, because a program that ends takes its statistics with it.
  while kill -0 "$child" 2>/dev/null; do sample; sleep 0.1; done
  wait "$child"
else
  sleep "$seconds"
  sample
fi

awk '
  !($1 in name) { name[$1] = $2; ns0[$1] = $3; runs0[$1] = $4 }
  { ns[$1] = $3; runs[$1] = $4 }
  END {
    for (id in name) {
      if (!some) printf "%-8s %-12s %12s %10s\n", "id", "program", "runs", "ns/run"
      n = runs[id] - runs0[id]
      printf "%-8s %-12s %12d %10s\n", id, name[id], n, n ? sprintf("%.0f", (ns[id] - ns0[id]) / n) : "-"
      some = 1
    }
    if (!some) { print "no program of a gateway is loaded" > "/dev/stderr"; exit 1 }
  }' "$samples"
