# shellcheck shell=bash
# What the scripts of this folder share; sourced, not run.

# The head of the script, which is its manual.
usage() { awk 'NR == 1 { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0"; }

# Where the first word asks for help: the manual.
help() {
  case ${1:-} in
    --help | -h) usage; exit 0 ;;
  esac
}

fail() {
  echo "$0: $*" >&2
  exit 1
}

# Ends with the manual where the word is no number of seconds.
check_seconds() {
  [[ $1 =~ ^[1-9][0-9]*$ ]] || { echo "$0: '$1' is no number of seconds" >&2; usage >&2; exit 2; }
}

# Sets `pid` to $GATEWAY_PID, or to the one gateway that runs here.
find_gateway() {
  local found
  pid=${GATEWAY_PID:-}
  if [ -z "$pid" ]; then
    read -ra found <<<"$(pidof gateway || true)"
    [ ${#found[@]} -gt 0 ] || fail "no gateway runs, and GATEWAY_PID is not set"
    [ ${#found[@]} -eq 1 ] || fail "${#found[@]} gateways run (${found[*]}): say which by GATEWAY_PID"
    pid=${found[0]}
  fi
  [ -d "/proc/$pid/fd" ] || fail "there is no process $pid (GATEWAY_PID)"
  [ -r "/proc/$pid/fd" ] || fail "process $pid is another user's: needs root"
}

# The sum of a counter over its labels; empty where the admin address does not answer, 0 where it does not name the counter.
counter() {
  local token=() metrics
  [ -r "${GATEWAY_STATE:-/var/lib/gateway}/admin.token" ] \
    && token=(-H "Authorization: Bearer $(cat "${GATEWAY_STATE:-/var/lib/gateway}/admin.token")")
  metrics=$(curl -sf -m 20 "${token[@]}" "http://${GATEWAY_ADMIN:-127.0.0.1:9900}/metrics" 2>/dev/null) || return 0
  awk -v name="$1" '$1 == name || index($1, name "{") == 1 { sum += $2 } END { printf "%.0f", sum }' <<<"$metrics"
}

# What was done since `start_work`: sets `events` and `requests`, both empty where the admin address does not answer.
start_work() {
  events_before=$(counter gateway_events_relayed_total)
  requests_before=$(counter gateway_requests_total)
}
end_work() {
  local events_after requests_after
  events_after=$(counter gateway_events_relayed_total)
  requests_after=$(counter gateway_requests_total)
  events='' requests=''
  if [ -n "$events_before" ] && [ -n "$events_after" ]; then
    events=$((events_after - events_before)) requests=$((requests_after - requests_before))
  fi
}

# per_work COUNT NAME: how many an event, and a request, of what `end_work` found.
per_work() {
  if [ -z "$events" ]; then
    echo "$1 $2; how many an event is not known: the admin address does not answer (GATEWAY_ADMIN, GATEWAY_STATE)"
  else
    awk -v count="$1" -v name="$2" -v events="$events" -v requests="$requests" 'BEGIN {
      printf "%d %s, %d events, %d requests ended", count, name, events, requests
      if (events > 0) printf "; %.3f an event", count / events
      if (requests > 0) printf "; %.1f a request", count / requests
      print "" }'
  fi
}

# inferno draws the graphs; it is built once.
need_inferno() {
  export PATH=$root/target/tools/bin:$PATH
  command -v inferno-flamegraph >/dev/null \
    || cargo install -q inferno --version 0.12.8 --locked --no-default-features --features cli,multithreaded,nameattr --root "$root/target/tools"
}
