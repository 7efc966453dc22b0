#!/usr/bin/env bash
# Runs the engine's stress tests (gateway/tests/engine.rs) under AddressSanitizer: what the kernel writes into and reads from is
# plain memory of the process, and a buffer that is reused too early or freed too early is found here. Needs a C compiler and
# the usual toolchain; everything is built anew into target/asan (some minutes, 2 GB).
#
#   perf/asan.sh [ARGUMENTS OF THE TEST BINARY]      or: make asan
#   GATEWAY_TEST_SEED=7 perf/asan.sh                 other cuts and contents; `random` draws a seed and names it
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=perf/lib.sh
. "$root/perf/lib.sh"

help "$@"
cd "$root"
command -v cc >/dev/null || fail "needs a C compiler"
if [ "${GATEWAY_TEST_SEED:-}" = random ]; then
  GATEWAY_TEST_SEED=$(od -An -N7 -tu8 /dev/urandom | tr -d ' ')
  export GATEWAY_TEST_SEED
fi
echo "seed: GATEWAY_TEST_SEED=${GATEWAY_TEST_SEED:-0}"
export RUSTC_BOOTSTRAP=1 # -Zsanitizer on a stable toolchain
export RUSTFLAGS="-Zsanitizer=address -Cdebuginfo=1"
export CARGO_TARGET_DIR="$PWD/target/asan"
# The engine's thread-local state and the certificates of rustls live as long as the process.
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=0:detect_stack_use_after_return=1}"
exec cargo test --target "$(rustc -vV | sed -n 's/^host: //p')" -p gateway --test engine -- "$@"
