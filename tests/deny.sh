#!/bin/bash
# Licences, sources, doubled and banned crates by deny.toml; advisories where their database can be had.
set -euo pipefail
cd "$(dirname "$0")/.."

deny=target/tools/bin/cargo-deny
[ -x "$deny" ] || deny=$(command -v cargo-deny) || { echo "skipped: cargo deny: not installed (tests/setup.sh does)"; exit 0; }

"$deny" --log-level warn check bans licenses sources

# A network that does not let one reach the database is no fault of the tree; a database that names one of our crates is.
if reason=$(GIT_TERMINAL_PROMPT=0 timeout 120 "$deny" fetch db 2>&1); then
  "$deny" --log-level warn check advisories
else
  echo "skipped: advisories: the RustSec database cannot be fetched ($(grep -o 'fatal: .*' <<<"$reason" | head -1))"
fi
