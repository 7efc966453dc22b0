#!/bin/bash
# Installs what the tests need and this machine lacks. Whatever cannot be installed is named in a line that begins with
# `skipped:`; the tests that need it then say so too. Running it again costs nothing.
#
# Writes: Debian packages (root, or sudo without a password), components of the Rust toolchain, and under target/:
# venv (Python with the OpenAI SDK and validators), chdb-venv (Python with ClickHouse's engine) and tools (cargo-deny).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON_PACKAGES=(openai==3.52.0 jsonschema==4.26.0 openapi-spec-validator==0.9.0)
CHDB=4.4.0
CARGO_DENY=0.20.2
# Each with the command that shows that it is there.
PACKAGES=(
  iproute2:ip             # network namespaces of the kernel tests
  curl:curl               # a client as users have it
  git:git                 # cargo-deny's advisory database
  systemd:systemd-analyze # systemd/check.sh
  redis-server:redis-server # the store that hosts share, in the tests of several hosts
  bsdutils:script         # a terminal for `gateway top`
  util-linux:setpriv      # programs with fewer rights
  valgrind:valgrind       # instruction counts of the hot path
  gcc:cc                  # C parts of aws-lc, SQLite, mimalloc
)

skipped() { echo "skipped: $*"; }

as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}

# Installs Debian packages; the caller says what is lost without them.
apt_install() {
  command -v apt-get >/dev/null || { echo "no apt-get here" >&2; return 1; }
  [ "$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null || { echo "neither root nor sudo without a password" >&2; return 1; }
  as_root apt-get update -q >/dev/null || return 1
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$@" >/dev/null
}

debian_packages() {
  local missing=() entry
  for entry in "${PACKAGES[@]}"; do
    command -v "${entry#*:}" >/dev/null || missing+=("${entry%%:*}")
  done
  [ ${#missing[@]} -eq 0 ] && return
  echo "setup: installing ${missing[*]}"
  apt_install "${missing[@]}" || skipped "what needs ${missing[*]}: could not be installed"
}

# Where a distribution has one of them only, the tests of the cluster run on that.
redis_and_valkey() {
  local server
  for server in redis-server valkey-server; do
    command -v "$server" >/dev/null && continue
    echo "setup: installing $server"
    apt_install "$server" 2>/dev/null || skipped "tests of the cluster on $server: it could not be installed"
  done
}

rust_components() {
  command -v cargo >/dev/null || { echo "setup: cargo is missing: https://rustup.rs" >&2; exit 1; }
  cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 && return
  rustup component add rustfmt clippy >/dev/null || { echo "setup: rustfmt and clippy are needed" >&2; exit 1; }
}

# ClickHouse's engine as a Python package: the server that the export's tests deliver to.
clickhouse() {
  local python=target/chdb-venv/bin/python
  [ "$("$python" -c 'import importlib.metadata as m; print(m.version("chdb"))' 2>/dev/null)" = "$CHDB" ] && return
  echo "setup: installing chdb $CHDB into target/chdb-venv"
  rm -rf target/chdb-venv
  { python3 -m venv target/chdb-venv && "$python" -m pip install -q "chdb==$CHDB"; } >/dev/null 2>&1 \
    || { rm -rf target/chdb-venv; skipped "tests of the export: chdb $CHDB could not be installed"; }
}

# What the tests use of Python: the OpenAI SDK, and validators of JSON Schema and of OpenAPI documents.
python_packages() {
  local python=target/venv/bin/python package missing=()
  [ -x "$python" ] && "$python" -m pip --version >/dev/null 2>&1 || {
    rm -rf target/venv
    # Debian keeps ensurepip in a package of its own.
    python3 -m venv target/venv >/dev/null 2>&1 \
      || { apt_install python3 python3-venv && python3 -m venv target/venv >/dev/null; } \
      || { rm -rf target/venv; skipped "tests with ${PYTHON_PACKAGES[*]}: python3 -m venv does not work"; return; }
  }
  for package in "${PYTHON_PACKAGES[@]}"; do
    [ "$("$python" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "${package%%==*}" 2>/dev/null)" \
      = "${package##*==}" ] || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  echo "setup: installing ${missing[*]} into target/venv"
  "$python" -m pip install -q --disable-pip-version-check "${missing[@]}" \
    || skipped "tests with ${missing[*]}: pip could not install them"
}

cargo_deny() {
  [ "$(target/tools/bin/cargo-deny --version 2>/dev/null)" = "cargo-deny $CARGO_DENY" ] && return
  echo "setup: installing cargo-deny $CARGO_DENY into target/tools (once, some minutes)"
  cargo install -q cargo-deny --version "$CARGO_DENY" --locked --no-default-features \
    --root target/tools --target-dir target/cargo-deny 2>&1 | grep -v 'to your PATH' || true
  rm -rf target/cargo-deny
  [ -x target/tools/bin/cargo-deny ] || skipped "cargo deny: could not be installed"
}

debian_packages
redis_and_valkey
rust_components
python_packages
clickhouse
cargo_deny
echo "setup: ok"
