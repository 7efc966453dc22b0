#!/bin/bash
# Runs a command while the gateway relays: starts the simulated fleet, the gateway (bench/gateway.yaml) and the load
# generator on ports of their own, exports GATEWAY_PID and GATEWAY_ADMIN, runs the command, ends what it started.
#
#   perf/under-load.sh perf/flamegraph.sh
#   perf/under-load.sh --model stream --connections 500 perf/syscalls.sh 5
#   perf/under-load.sh --driver epoll --build target/debug perf/syscalls.sh
#   perf/under-load.sh --wrap "valgrind --tool=callgrind" --driver epoll sleep 5
#
# Models: flood (events as fast as they go), stream (500 tokens at 20 ms), plain (whole answers), idle.
# Needs: target/release (`make release`) or --build DIR; curl.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=perf/lib.sh
. "$root/perf/lib.sh"

help "$@"
wrong() { echo "$0: $1" >&2; usage >&2; exit 2; }

model=flood connections=16 driver=auto build=$root/target/release wrap=""
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --*) [ $# -ge 2 ] || wrong "$1 needs a value" ;;
  esac
  case $1 in
    --model) model=$2; shift 2 ;;
    --connections) connections=$2; shift 2 ;;
    --driver) driver=$2; shift 2 ;;
    --build) build=$2; shift 2 ;;
    --wrap) wrap=$2; shift 2 ;;
    -*) wrong "unknown option $1" ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || wrong "a command is missing"
case $model in
  flood | stream | plain | idle) ;;
  *) wrong "unknown model $model" ;;
esac
[[ $connections =~ ^[1-9][0-9]*$ ]] || wrong "'$connections' is no number of connections"
[ -x "$build/gateway" ] && [ -x "$build/gateway-bench" ] || { echo "$0: no gateway in $build: make release" >&2; exit 1; }
ulimit -Sn "$(ulimit -Hn)"

state=$(mktemp -d)
started=() wrapper=""
clean_up() {
  local pid
  for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${started[@]}"; do wait "$pid" 2>/dev/null || true; done
  # It ends with the gateway, and writes what it found.
  [ -z "$wrapper" ] || wait "$wrapper" 2>/dev/null || true
  rm -rf "$state"
}
trap clean_up EXIT

# A port that nothing listens on at the moment.
free_port() {
  local port
  while port=$((20000 + RANDOM % 10000)); (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

# Valgrind takes a while to get going.
wait_for() {
  local _
  for _ in $(seq 600); do
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null && return
    kill -0 "$2" 2>/dev/null || break
    sleep 0.1
  done
  fail "nothing listens on port $1: $(tail -n 3 "$state"/*.log)"
}

upstream=$(free_port) front=$(free_port) admin=$(free_port)
sed -E -e "s|127\.0\.0\.1:8080|127.0.0.1:$front|; s|127\.0\.0\.1:9900|127.0.0.1:$admin|; s|127\.0\.0\.1:9101|127.0.0.1:$upstream|" \
  -e "s|path: [^,}]+|path: $state/ledger|; s|^workers: \{|workers: { driver: $driver,|" \
  "$root/bench/gateway.yaml" > "$state/gateway.yaml"

"$build/gateway-bench" upstream --listen "127.0.0.1:$upstream" > "$state/upstream.log" 2>&1 &
started+=($!)
wait_for "$upstream" $!
# Split at spaces: a command and its arguments.
# shellcheck disable=SC2086
$wrap "$build/gateway" run -c "$state/gateway.yaml" > "$state/gateway.log" 2>&1 &
export GATEWAY_PID=$! GATEWAY_ADMIN=127.0.0.1:$admin GATEWAY_STATE=$state/ledger
started=("$GATEWAY_PID" "${started[@]}")
wait_for "$front" "$GATEWAY_PID"
# Some wrappers become the gateway (valgrind), others start it (heaptrack): then it is the one to look at and to end.
for pid in $(pgrep -f -- "run -c $state/gateway.yaml"); do
  if [ "$pid" != "$GATEWAY_PID" ] && [ "/proc/$pid/exe" -ef "$build/gateway" ]; then
    wrapper=$GATEWAY_PID GATEWAY_PID=$pid
    started=("$GATEWAY_PID" "${started[@]:1}")
    break
  fi
done
"$build/gateway-bench" load --url "http://127.0.0.1:$front/v1/chat/completions" --key sk-bench --model "$model" \
  "$([ "$model" = plain ] && echo --plain || echo --stream)" -c "$connections" -d 1h > "$state/load.log" 2>&1 &
load=$!
started=("$load" "${started[@]}")

# The upstream is asked only for what the gateway let through: a load of refusals, or of none, would measure nothing.
asked=0
for _ in $(seq 600); do
  asked=$(curl -sf -m 5 "http://127.0.0.1:$upstream/sim/stats" | sed -nE 's/.*"requests":([0-9]+).*/\1/p') || asked=0
  [ "${asked:-0}" -eq 0 ] || break
  kill -0 "$load" 2>/dev/null && kill -0 "$GATEWAY_PID" 2>/dev/null || break
  sleep 0.1
done
[ "${asked:-0}" -gt 0 ] || fail "no request reached the upstream: $(tail -n 20 "$state"/*.log)"
sleep 1 # connections are up and caches warm
"$@"
kill -0 "$load" 2>/dev/null || fail "the load ended meanwhile: $(tail -n 20 "$state/load.log")"
kill -0 "$GATEWAY_PID" 2>/dev/null || fail "the gateway ended meanwhile: $(tail -n 20 "$state/gateway.log")"
