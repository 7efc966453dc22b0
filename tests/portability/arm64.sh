#!/bin/bash
# Builds the whole workspace and its tests for arm64 on Debian, and runs what qemu-user can run.
#
#   tests/portability/arm64.sh [build|test]      default: both
#
# rustup's toolchains have no arm64 standard library here unless it is added; Debian's rustc-web brings a ready-made one
# (libstd-rust-web-dev:arm64), and is as new as the workspace wants. Installs missing packages (root, or sudo without a
# password). Output: target/arm64. Some minutes on two cores; not a part of `make test`.
#
# qemu-user knows neither io_uring nor bpf(2): the data plane falls back to epoll and the kernel plane is off, which is
# what these tests then exercise. tests/portability/boot.sh runs the rest under a whole arm64 kernel.
set -euo pipefail
cd "$(dirname "$0")/../.."

what=${1:-both}
PACKAGES=(gcc-aarch64-linux-gnu g++-aarch64-linux-gnu libc6-dev-arm64-cross cmake rustc-web libstd-rust-web-dev:arm64 qemu-user-static)
triple=aarch64-unknown-linux-gnu
# Tests of user space that qemu-user can run: own processes, loopback, epoll.
SUITES=(streaming proxy)
# Those that tests/portability/boot.sh runs under a whole kernel.
BOOTED=(flood kernel engine)

missing=()
for package in "${PACKAGES[@]}"; do
  dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || { echo "skipped: needs Debian's packages: ${missing[*]}"; exit 0; }
  sudo=()
  [ "$(id -u)" -eq 0 ] || sudo=(sudo -n)
  "${sudo[@]}" dpkg --add-architecture arm64
  "${sudo[@]}" apt-get update -q >&2
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}" >&2
fi

export RUSTC=/usr/bin/rustc
export CARGO_TARGET_DIR=${ARM64_TARGET_DIR:-$PWD/target/arm64}
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc CXX_aarch64_unknown_linux_gnu=aarch64-linux-gnu-g++
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu"
cargo=(cargo)
jobs=(-j "${JOBS:-2}")

if [ "$what" != test ]; then
  "${cargo[@]}" build --workspace --target $triple --locked "${jobs[@]}"
  "${cargo[@]}" test --no-run -p gateway -p gateway-common --target $triple --locked "${jobs[@]}" \
    --lib $(printf -- '--test %s ' "${SUITES[@]}" "${BOOTED[@]}")
fi
if [ "$what" != build ]; then
  # Linked statically: qemu-user 7.2 hangs in pthread_create of a dynamically linked program, but runs a static one.
  export RUSTFLAGS="-C target-feature=+crt-static" CARGO_TARGET_DIR=$CARGO_TARGET_DIR/static
  # Tests of documentation would need rustc-web's own rustdoc.
  "${cargo[@]}" test -p gateway-common --lib --target $triple --locked "${jobs[@]}"
  # One test at a time: emulation is ten times slower, and the tests have deadlines.
  "${cargo[@]}" test -p gateway --target $triple --locked "${jobs[@]}" --lib -- --test-threads 1
  # The gateway under test is an arm64 binary too, which the test starts by itself: that needs binfmt_misc.
  if [ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ]; then
    QEMU_LD_PREFIX=/usr/aarch64-linux-gnu "${cargo[@]}" test -p gateway --target $triple --locked "${jobs[@]}" \
      $(printf -- '--test %s ' "${SUITES[@]}") -- --test-threads 1
  else
    echo "skipped: ${SUITES[*]}: no binfmt_misc for arm64 here (update-binfmts --enable qemu-aarch64)"
  fi
fi
