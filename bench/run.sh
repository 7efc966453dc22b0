#!/usr/bin/env bash
# Measures the README's figures: direct, nginx and the gateway by turns, each pinned to core 0, with the load generator
# and the simulated upstream on core 1. See bench/README.md.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bench/run.sh [--rounds N] [--seconds N] [--targets "direct nginx gateway"] [--scenarios "idle plain ..."] [--out DIR]

scenarios: idle plain busy light flood. Environment: GATEWAY and BENCH name the binaries (default: built here in release).
TEXT
}

root=$(cd "$(dirname "$0")/.." && pwd)
rounds=2
seconds=8
targets="direct nginx gateway"
scenarios="idle plain busy light flood"
out=""
while [ $# -gt 0 ]; do
    case $1 in
    --rounds) rounds=$2 ;;
    --seconds) seconds=$2 ;;
    --targets) targets=$2 ;;
    --scenarios) scenarios=$2 ;;
    --out) out=$2 ;;
    --help | -h) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
    esac
    shift 2
done

if [ -z "${BENCH:-}" ] || [ -z "${GATEWAY:-}" ]; then
    (cd "$root" && cargo build --release --quiet -p gateway-bench -p gateway)
fi
BENCH=${BENCH:-$root/target/release/gateway-bench}
GATEWAY=${GATEWAY:-$root/target/release/gateway}
ulimit -n "$(ulimit -Hn)"

state=$(mktemp -d /tmp/gateway-bench.XXXXXX)
out=${out:-$root/target/bench-results}
# Reports of an earlier run would be taken for further rounds of this one.
rm -f "$out"/*.*.*.json
mkdir -p "$out" "$state/ledger"
upstream_pid=""
target_pid=""

# Ends what this script started, by its id.
stop() {
    if [ -n "$1" ] && kill "$1" 2>/dev/null; then
        wait "$1" 2>/dev/null || true
    fi
}
clean_up() {
    stop "$target_pid"
    stop "$upstream_pid"
    rm -rf "$state"
}
trap clean_up EXIT

# On a machine with one core both sides share it, and the figures say less.
pin() {
    local core=$1
    shift
    if [ "$(nproc)" -ge 2 ] && command -v taskset >/dev/null; then
        exec taskset -c "$core" "$@"
    fi
    exec "$@"
}

wait_for_port() {
    for _ in $(seq 200); do
        if (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; then return 0; fi
        sleep 0.05
    done
    echo "nothing listens on port $1" >&2
    return 1
}

# Sets target_pid (to be stopped), measured (to be measured) and port.
start_target() {
    measured=""
    case $1 in
    direct)
        target_pid=""
        port=9101
        measured=$upstream_pid
        return
        ;;
    nginx)
        sed "s|@STATE@|$state|" "$root/bench/nginx.conf" >"$state/nginx.conf"
        (pin 0 nginx -p "$state" -c "$state/nginx.conf" 2>"$state/nginx.log") &
        port=8081
        ;;
    gateway)
        rm -rf "$state/ledger" && mkdir -p "$state/ledger"
        sed "s|/tmp/gateway-bench-ledger|$state/ledger|" "$root/bench/gateway.yaml" >"$state/gateway.yaml"
        (pin 0 "$GATEWAY" run -c "$state/gateway.yaml" >"$state/gateway.log" 2>&1) &
        port=8080
        ;;
    esac
    target_pid=$!
    wait_for_port "$port"
    # The worker is nginx's only child.
    measured=$target_pid
    if [ "$1" = nginx ]; then measured=$(pgrep -P "$target_pid"); fi
}

# load TARGET ROUND SCENARIO SIM_MODEL ARGUMENTS...
load() {
    local target=$1 round=$2 scenario=$3 model=$4
    shift 4
    if [ "$target" = gateway ]; then
        case $scenario in busy | light) model=stream ;; *) model=$scenario ;; esac
    fi
    echo "-- $scenario, $target, round $round"
    (pin 1 "$BENCH" load --url "http://127.0.0.1:$port/v1/chat/completions" --key sk-bench --model "$model" \
        --pid "$measured" --json "$out/$scenario.$target.$round.json" "$@") ||
        echo "!! $scenario, $target, round $round: not every answer was whole"
}

# The behaviours stand in gateway.yaml too.
scenario() {
    local target=$1 round=$2
    local end="$((seconds + 3))s"
    case $3 in
    idle) load "$target" "$round" idle sim:tokens=10,pace=1h,first=0 --idle 2000 --duration 2s ;;
    plain)
        load "$target" "$round" plain sim:tokens=64,first=0,size=14 --plain --prompt-bytes 900 \
            --connections 64 --warm-up 1s --duration "$((seconds + 1))s" --expect-tokens 64
        ;;
    busy)
        load "$target" "$round" busy sim:tokens=500,pace=20ms --connections 300 --ramp 2s \
            --warm-up 3s --duration "$end" --expect-tokens 500
        ;;
    light)
        load "$target" "$round" light sim:tokens=500,pace=20ms --connections 50 --ramp 2s \
            --warm-up 3s --duration "$end" --expect-tokens 500
        ;;
    flood)
        load "$target" "$round" flood sim:tokens=20000,pace=0,first=0 --connections 8 --warm-up 1s \
            --duration "$((seconds + 1))s" --expect-tokens 20000
        ;;
    *) usage >&2 && exit 2 ;;
    esac
}

(pin 1 "$BENCH" upstream --listen 127.0.0.1:9101 >/dev/null) &
upstream_pid=$!
wait_for_port 9101

for round in $(seq "$rounds"); do
    for target in $targets; do
        if [ "$target" = nginx ] && ! command -v nginx >/dev/null; then
            echo "-- nginx is not installed: left out"
            continue
        fi
        if ! start_target "$target"; then
            echo "!! $target did not start:" >&2
            tail -n 5 "$state/$target.log" >&2 || true
            exit 1
        fi
        # Memory comes first: it needs a process without a past.
        for name in $scenarios; do scenario "$target" "$round" "$name"; done
        stop "$target_pid"
        target_pid=""
    done
done

echo
"$BENCH" compare "$out"
echo "reports: $out"
