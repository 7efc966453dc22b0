#!/bin/bash
# Tests the unit: it is valid (systemd-analyze verify) and exposed no further than EXPOSURE_MAX (systemd-analyze security),
# its user, directories and sysctl files parse, and TimeoutStopSec is longer than the default drain.
set -euo pipefail
cd "$(dirname "$0")"

EXPOSURE_MAX=2.0  # of 10, as systemd-analyze prints it
DRAIN_SECONDS=30  # the default of `drain`

fail() { echo "systemd/check.sh: $*" >&2; exit 1; }

command -v systemd-analyze >/dev/null || { echo "skipped: systemd/check.sh: no systemd-analyze here"; exit 0; }
version=$(systemd-analyze --version | awk 'NR == 1 { print $2 }')
[ "$version" -ge 250 ] || { echo "skipped: systemd/check.sh: systemd $version, 250 or later can check a file"; exit 0; }

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

# A root of its own: the verdict depends on the unit alone, not on what is installed here. verify wants the commands of
# Exec lines to exist and the units of the dependencies to be found.
layout() {
  install -d "$root/etc/systemd/system" "$root/usr/lib/systemd/system" "$root/usr/local/bin" "$root/bin"
  install -m 644 gateway.service "$root/etc/systemd/system/"
  printf '#!/bin/sh\n' | tee "$root/usr/local/bin/gateway" "$root/bin/kill" >/dev/null
  chmod 755 "$root/usr/local/bin/gateway" "$root/bin/kill"
  cp -a /lib/systemd/system/. "$root/usr/lib/systemd/system/"
}

verify() {
  local said
  said=$(systemd-analyze verify --root="$root" --man=no --recursive-errors=no gateway.service 2>&1) \
    || fail "verify: $said"
  # Unknown and misspelt settings are warnings only.
  [ -z "$said" ] || fail "verify: $said"
}

exposure() {
  local said value
  said=$(systemd-analyze security --offline=true --no-pager gateway.service 2>&1) || fail "security: $said"
  value=$(sed -nE 's/.*Overall exposure level for gateway.service: ([0-9.]+).*/\1/p' <<<"$said")
  [ -n "$value" ] || fail "security said no exposure level: $said"
  awk -v value="$value" -v max="$EXPOSURE_MAX" 'BEGIN { exit !(value <= max) }' \
    || fail "exposure $value, more than $EXPOSURE_MAX: $(grep '^✗' <<<"$said")"
  echo "systemd/check.sh: exposure $value (at most $EXPOSURE_MAX)"
}

stop_timeout() {
  local seconds
  seconds=$(sed -nE 's/^TimeoutStopSec=([0-9]+)s$/\1/p' gateway.service)
  [ -n "$seconds" ] && [ "$seconds" -gt "$DRAIN_SECONDS" ] || fail "TimeoutStopSec=$seconds is not longer than the drain"
}

users_and_directories() {
  install -d "$root/etc"
  systemd-sysusers --root="$root" "$PWD/gateway.sysusers.conf" 2>/dev/null || fail "gateway.sysusers.conf is refused"
  grep -q '^gateway:.*:/usr/sbin/nologin$' "$root/etc/passwd" || fail "gateway.sysusers.conf makes no user gateway"
  systemd-tmpfiles --root="$root" --create "$PWD/gateway.tmpfiles.conf" || fail "gateway.tmpfiles.conf is refused"
  [ "$(stat -c %a "$root/etc/gateway")" = 750 ] || fail "gateway.tmpfiles.conf makes no /etc/gateway of mode 750"
}

# Each line is a name that this kernel knows (or may be missing, by its "-"), and a reason stands above it.
sysctl_file() {
  local line name before=""
  while IFS= read -r line; do
    if [[ $line == [^\#]* ]]; then
      [[ $before == \#* ]] || fail "90-gateway.conf: no reason above: $line"
      name=$(sed -E 's/^-?([^ =]+) *=.*/\1/' <<<"$line")
      [[ $line == -* || -e /proc/sys/${name//.//} ]] || fail "90-gateway.conf: this kernel has no $name"
    fi
    before=$line
  done < 90-gateway.conf
}

layout
verify
exposure
stop_timeout
[ "$(id -u)" -eq 0 ] && users_and_directories || echo "skipped: sysusers and tmpfiles: not root"
sysctl_file
echo "systemd/check.sh: ok"
