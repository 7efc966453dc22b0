#!/bin/bash
# Builds gateway.bpf.o from source; the result is the same byte for byte wherever it is built.
#
#   gateway-ebpf/build.sh            builds and replaces the committed object
#   gateway-ebpf/build.sh --check    builds and fails when the committed object differs
#
# Debian 12 and later: rustup has no `core` for the BPF target, so the compiler is Debian's rustc-web, with its
# ready-made `core`, and bpf-linker is built against the LLVM that understands that compiler's bitcode. Missing packages
# are installed with apt-get (root, or sudo without a password); bpf-linker once into target/bpf-tools.
# Needs: cargo (any recent one; only /usr/bin/rustc compiles), a C compiler.
set -euo pipefail
shopt -s inherit_errexit   # a build that fails in $(compile) must not leave the object of the last one

LLVM=22                 # what rustc-web is built with: rust-web-llvm
BPF_LINKER=0.13.0
PACKAGES=(rustc-web libstd-rust-web-dev-bpf rust-web-llvm "llvm-$LLVM-dev" "libpolly-$LLVM-dev" zlib1g-dev libzstd-dev)

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
tools=${BPF_TOOLS:-$root/target/bpf-tools}
build=$root/target/bpf
object=$here/gateway.bpf.o
export PATH=/usr/lib/llvm-$LLVM/bin:$tools/bin:$PATH

say() { echo "build.sh: $*" >&2; }

install_packages() {
  local missing=() package
  for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  command -v apt-get >/dev/null || { say "needs Debian's packages: ${missing[*]}"; exit 1; }
  local sudo=()
  [ "$(id -u)" -eq 0 ] || sudo=(sudo -n)
  say "installing ${missing[*]}"
  "${sudo[@]}" apt-get -o DPkg::Lock::Timeout=900 update -q >&2
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=900 install -qy --no-install-recommends "${missing[@]}" >&2
}

install_linker() {
  [ "$("$tools/bin/bpf-linker" --version 2>/dev/null)" = "bpf-linker $BPF_LINKER" ] && return
  say "installing bpf-linker $BPF_LINKER into $tools (once, some minutes)"
  env -u RUSTFLAGS cargo install -q bpf-linker --version "$BPF_LINKER" --locked \
    --no-default-features --features "llvm-$LLVM" --root "$tools" --target-dir "$root/target/bpf-linker" >&2
  rm -rf "$root/target/bpf-linker"
}

# Prints the path of the object just built.
compile() {
  local flags sources
  (cd "$here" && cargo fetch -q --locked >&2)
  flags=(
    -C linker=bpf-linker
    -C link-arg=--btf
    # v3 (32-bit registers and jumps) is known to every JIT since 5.1; later ones are not to all of 5.15.
    -C target-cpu=v3
    # BTF keeps file names with its line information: none may tell where it was built.
    "--remap-path-prefix=$root=."
  )
  # The folder's name has a hash that differs between versions of cargo.
  for sources in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*; do
    flags+=("--remap-path-prefix=$sources=registry")
  done
  # The bindings' architecture matters for pt_regs only, which no program here uses; fixed, so that hosts agree.
  (cd "$here" && CARGO_ENCODED_RUSTFLAGS=$(IFS=$'\x1f'; echo "${flags[*]}") \
    RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 AYA_BPF_TARGET_ARCH=x86_64 CARGO_INCREMENTAL=0 \
    cargo build -q --release --locked --target bpfel-unknown-none --target-dir "$build" >&2)
  llvm-objcopy --strip-debug "$build/bpfel-unknown-none/release/gateway" "$build/gateway.bpf.o"
  echo "$build/gateway.bpf.o"
}

install_packages
install_linker
built=$(compile)

case ${1:-} in
  "")
    if cmp -s "$built" "$object"; then
      say "gateway.bpf.o is up to date"
    else
      cp "$built" "$object"
      say "wrote gateway.bpf.o ($(stat -c %s "$object") bytes)"
    fi ;;
  --check)
    cmp "$built" "$object" || { say "gateway.bpf.o differs from its source: run gateway-ebpf/build.sh and commit it"; exit 1; }
    say "gateway.bpf.o agrees with its source" ;;
  *)
    say "unknown argument $1; usage: build.sh [--check]"; exit 2 ;;
esac
