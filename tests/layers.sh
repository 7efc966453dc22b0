#!/bin/bash
# The architecture's invariants that a search of the source can hold: which folder may name what (ARCHITECTURE.md).
# Lines of comment are not looked at. Prints each offence as file:line: why, and fails when there is one.
set -euo pipefail
cd "$(dirname "$0")/../gateway/src"

offences=0

# forbid REASON PATTERN PATH...: no line of code below the paths matches the extended regular expression.
forbid() {
  local reason=$1 pattern=$2 path found
  shift 2
  for path in "$@"; do
    [ -e "$path" ] || continue
    found=$(grep -rnE --include='*.rs' -- "$pattern" "$path" | grep -vE '^[^:]+:[0-9]+:\s*//' || true)
    [ -z "$found" ] && continue
    sed -E "s|^([^:]+:[0-9]+):\s*(.*)|gateway/src/\1: $reason: \2|" <<<"$found"
    offences=$((offences + $(wc -l <<<"$found")))
  done
}

# everything_but NAME...: the folders and files here except those.
everything_but() {
  local entry
  for entry in *; do
    [[ " $* " == *" $entry "* ]] || echo "$entry"
  done
}

# uses MODULE|MODULE...: an expression for code that names one of these modules, alone or in a nested `use crate::{…}`.
uses() { echo "\bcrate::($1)\b|^use crate::\{.*\b($1)::|^    ($1)(::|,)"; }

forbid "unsafe belongs to net/ and kernel/" '\bunsafe\b' $(everything_but net kernel)
forbid "io_uring belongs to net/" '\bio_uring::' $(everything_but net)
forbid "aya belongs to kernel/" '\b(aya|aya_log)::' $(everything_but kernel)
forbid "tokio belongs to the control thread" '\b(tokio|tokio_uring|axum)::' $(everything_but control cli telemetry)
forbid "redis belongs to control/cluster/" '\bredis::' $(everything_but control)

hot="serve http dialect quota"
forbid "no lock in the data plane" '\b(Mutex|RwLock|Condvar)\b' $hot
forbid "no file system in the data plane" '\bfs::|\bFile::' $hot
forbid "a data-plane thread never sleeps: net::runtime::sleep" '\bthread::sleep\b' $hot core fleet net
forbid "a data-plane thread never asks the resolver: fleet::resolve" '\bto_socket_addrs\b' $hot core
forbid "no output but the log" '\b(println|eprintln|print|eprint)!' $(everything_but cli main.rs)
forbid "certificates are always verified" '\.dangerous\(' .

# Dependencies point one way: cli → control, core → serve → {dialect, fleet, quota, ledger, http} → net.
forbid "nothing below cli/ knows it" "$(uses cli)" $(everything_but cli main.rs lib.rs)
forbid "only cli/ knows control/" "$(uses control)" $(everything_but cli control main.rs lib.rs)
# serve/ is run by core/ and is handed its thread's state by it; nothing further down knows of threads.
forbid "only cli/, control/ and serve/ know core/" "$(uses core)" $(everything_but cli control core serve main.rs lib.rs)
forbid "serve/ is above this" "$(uses serve)" dialect fleet quota ledger http net kernel config
forbid "net/ is at the bottom" "$(uses 'dialect|fleet|quota|ledger|http|kernel|telemetry')" net

if [ "$offences" -gt 0 ]; then
  echo "layers: $offences offences" >&2
  exit 1
fi
echo "layers: ok"
