#!/bin/bash
# Installs the release build (`make release`) as a service, or takes it away again.
#
#   systemd/install.sh                     on this host: binaries, unit, user, directories, sysctl, a first configuration
#   systemd/install.sh --destdir DIR       the files only, below DIR, for packagers
#   systemd/install.sh --uninstall         takes away what was installed; configuration, books and the user stay
#
# An existing configuration is never touched. Running it again updates; restart the service afterwards.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

usage() { sed -nE '2,/^set/ s/^# ?//p' "$0"; }

destdir="" uninstall=false
while [ $# -gt 0 ]; do
  case $1 in
    --destdir) [ $# -ge 2 ] || { usage >&2; exit 2; }; destdir=$2; shift 2 ;;
    --uninstall) uninstall=true; shift ;;
    --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
  esac
done
# Where cargo put the build; packagers may have it elsewhere.
build=${BUILD_DIR:-$root/target/release}

# mode, source, target
files=(
  "755 $build/gateway /usr/local/bin/gateway"
  "755 $build/gateway-bench /usr/local/bin/gateway-bench"
  "644 $root/systemd/gateway.service /etc/systemd/system/gateway.service"
  "644 $root/systemd/gateway.sysusers.conf /etc/sysusers.d/gateway.conf"
  "644 $root/systemd/gateway.tmpfiles.conf /etc/tmpfiles.d/gateway.conf"
  "644 $root/systemd/90-gateway.conf /etc/sysctl.d/90-gateway.conf"
  "644 $root/systemd/README.md /usr/local/share/doc/gateway/README.md"
  "644 $root/examples/gateway.yaml /usr/local/share/doc/gateway/gateway.yaml"
  "644 $root/examples/minimal.yaml /usr/local/share/doc/gateway/minimal.yaml"
)

# Whether there is a service manager to speak to: not in a chroot or a container build.
booted() { [ -z "$destdir" ] && [ -d /run/systemd/system ]; }

install_files() {
  local entry mode source target
  [ -x "$build/gateway" ] || { echo "install: no $build/gateway: run \`make release\` first" >&2; exit 1; }
  for entry in "${files[@]}"; do
    read -r mode source target <<<"$entry"
    # Aside and renamed: a running binary cannot be written to.
    install -D -m "$mode" "$source" "$destdir$target.new"
    mv -f "$destdir$target.new" "$destdir$target"
  done
}

# The least configuration that serves, with a key that only this host has: the one in the example is known to everybody.
first_configuration() {
  local target=/etc/gateway/gateway.yaml key
  [ -e "$target" ] && { echo "install: $target stays as it is"; return; }
  key=$(/usr/local/bin/gateway keys create --offline --name alice)
  awk -v line="$(grep -E '^ *- \{' <<<"$key" | sed 's/^ *//')" \
    '/^ *- \{ name: alice,/ { print "  " line; next } { print }' "$root/examples/minimal.yaml" > "$target.new"
  chmod 640 "$target.new"
  chgrp gateway "$target.new"
  mv "$target.new" "$target"
  /usr/local/bin/gateway check -c "$target"
  echo "install: wrote $target; its key, shown only now: $(head -1 <<<"$key")"
}

uninstall() {
  local entry target
  booted && systemctl disable --now gateway.service || true
  for entry in "${files[@]}"; do
    read -r _ _ target <<<"$entry"
    rm -f "$destdir$target"
  done
  booted && systemctl daemon-reload
  echo "install: /etc/gateway, /var/lib/gateway and the user gateway stay; remove them if the books are not needed"
}

if $uninstall; then
  uninstall
  exit 0
fi
install_files
[ -n "$destdir" ] && exit 0
[ "$(id -u)" -eq 0 ] || { echo "install: needs root" >&2; exit 1; }
systemd-sysusers /etc/sysusers.d/gateway.conf
systemd-tmpfiles --create /etc/tmpfiles.d/gateway.conf
first_configuration
# Some settings are not a container's to change; the gateway serves without them.
sysctl -q -p /etc/sysctl.d/90-gateway.conf || echo "install: not all of 90-gateway.conf could be set" >&2
booted && systemctl daemon-reload
echo "install: ok; now: systemctl enable --now gateway"
