#!/bin/bash
# Boots a Debian kernel in qemu-system (software emulation, no KVM) with a small initramfs and runs whole test files in it:
# the committed BPF object is loaded by that kernel's verifier, attached, drops and counts; the data plane runs on that
# kernel's io_uring.
#
#   tests/portability/boot.sh x86_64 [KERNEL.deb]     the debug build of this tree (cargo test --no-run)
#   tests/portability/boot.sh arm64 [KERNEL.deb]      the build that tests/portability/arm64.sh made
#
# SUITES="flood kernel engine" names other test files of gateway/tests, or `unit` for the unit tests of `gateway`
# (cargo test --no-run --lib); FILTER="word …" the tests in them. Without KERNEL.deb the current kernel of the distribution is
# fetched with apt-get (Debian 12: 6.1). Needs qemu-system-x86 or qemu-system-arm, cpio, apt-get for what the
# guest has of tools. Takes minutes; exit code 0 when the tests in the guest passed. The work folder is
# target/portability; what the guest said stays in boot-ARCH.log.
set -euo pipefail
cd "$(dirname "$0")/../.."

arch=${1:?x86_64 or arm64}
deb=${2:-}
work=$PWD/target/portability
PATIENCE_S=${PATIENCE_S:-1200}
read -ra suites <<< "${SUITES:-flood kernel engine}"
# What the tests call: ip, unshare, nsenter, setpriv; the libraries of those and of the tests; a shell that takes commands
# from PATH (busybox's own prefers its applets, and its ip and setpriv can too little); busybox for the rest.
PACKAGES=(busybox-static dash iproute2 util-linux libc6 libgcc-s1 libbpf1 libbsd0 libcap2 libcap-ng0 libelf1 libmd0 libmnl0
  libpcre2-8-0 libselinux1 zlib1g)
TOOLS=(bin/dash sbin/ip bin/ip usr/bin/unshare usr/bin/nsenter usr/bin/setpriv)
# The tests make pairs of virtual network cards, which are a module in Debian's kernels.
MODULES=(veth)

say() { echo "boot.sh: $*" >&2; }
skip() { echo "skipped: $*"; exit 0; }

case $arch in
  x86_64)
    deb_arch=amd64; triple=x86_64-linux-gnu; target=${CARGO_TARGET_DIR:-$PWD/target}/debug
    strip=strip
    qemu=(qemu-system-x86_64 -machine q35 -cpu max); console=ttyS0 ;;
  arm64)
    deb_arch=arm64; triple=aarch64-linux-gnu; target=${ARM64_TARGET_DIR:-$PWD/target/arm64}/aarch64-unknown-linux-gnu/debug
    strip=aarch64-linux-gnu-strip
    # pauth-impdef: pointer authentication of the architecture's own kind is most of the time of an emulated boot.
    qemu=(qemu-system-aarch64 -machine virt -cpu "max,pauth-impdef=on"); console=ttyAMA0 ;;
  *) say "unknown architecture $arch"; exit 2 ;;
esac
for tool in "${qemu[0]}" cpio "$strip" dpkg-deb apt-get; do
  command -v "$tool" >/dev/null || skip "$tool is not here"
done
debs=$work/debs-$arch
mkdir -p "$debs"

# The file of a package, fetched once; the newest of those that lie there.
fetched() {
  local file
  file=$(ls -t "$debs/$1"_*_"$deb_arch.deb" 2>/dev/null | head -1 || true)
  if [ -z "$file" ]; then
    (cd "$debs" && apt-get download -q "$1:$deb_arch" >&2)
    file=$(ls -t "$debs/$1"_*_"$deb_arch.deb" | head -1)
  fi
  echo "$file"
}

if [ -z "$deb" ]; then
  package=$(apt-cache depends "linux-image-$deb_arch:$deb_arch" | sed -n 's/.*Depends: \(linux-image-[^:]*\).*/\1/p' | head -1)
  [ -n "$package" ] || skip "no Debian kernel for $deb_arch (dpkg --add-architecture $deb_arch, apt-get update)"
  deb=$(fetched "$package")
fi
kernel=$work/kernel-$arch
rm -rf "$kernel"
mkdir -p "$kernel"
dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$kernel" --wildcards './boot/vmlinuz-*' "${MODULES[@]/#/*/}.ko*"
vmlinuz=$(ls "$kernel"/boot/vmlinuz-*)

# The tests look for the gateway where it was built.
binary=$target/gateway
[ -x "$binary" ] || { say "build first: cargo build --bin gateway"; exit 1; }
tree=$work/root-$arch
rm -rf "$tree"
mkdir -p "$tree"/{bin,sbin,usr,proc,sys,tmp,dev,etc,lib64,modules,tests,"lib/$triple","$(dirname "$binary")"}
packed=$work/packages-$arch
rm -rf "$packed"
mkdir -p "$packed"
for package in "${PACKAGES[@]}"; do
  dpkg-deb --fsys-tarfile "$(fetched "$package")" | tar -x -C "$packed" --exclude './usr/share'
done
cp "$packed"/bin/busybox "$tree/bin/busybox"
# Before busybox's own in PATH.
for tool in "${TOOLS[@]}"; do
  [ ! -f "$packed/$tool" ] || cp -L "$packed/$tool" "$tree/sbin/"
done
ln -s dash "$tree/sbin/sh"
for folder in "$packed/lib/$triple" "$packed/usr/lib/$triple"; do
  find "$folder" -maxdepth 1 -name '*.so*' -exec cp -a -t "$tree/lib/$triple" {} +
done
for loader in "$packed"/lib/ld-linux-*.so.* "$packed"/lib64/ld-linux-*.so.*; do
  [ ! -e "$loader" ] || cp -L "$loader" "$tree/${loader#"$packed"/}"
done
"$strip" -o "$tree$binary" "$binary"
for suite in "${suites[@]}"; do
  # The binary stands beside its unit tests by the same name.
  [ "$suite" = unit ] && name=gateway || name=$suite
  built=$(find "$target/deps" -name "$name-*" ! -samefile "$binary" -executable -type f -printf '%T@ %p\n' | sort -rn | sed 's/^[^ ]* //;q')
  [ -n "$built" ] || { say "build first: cargo test --no-run --test $suite"; exit 1; }
  "$strip" -o "$tree/tests/$suite" "$built"
done
find "$kernel" \( -name '*.ko' -o -name '*.ko.xz' \) -exec cp -t "$tree/modules" {} +
[ -z "$(find "$tree/modules" -name '*.xz')" ] || unxz "$tree"/modules/*.xz
# Test files run to their end each, one test at a time: emulation is ten times slower, and tests have deadlines.
cat > "$tree/init" <<INIT
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tmpfs tmpfs /tmp
ip link set lo up
for module in /modules/*.ko; do insmod \$module; done
ulimit -Hn 65536
ulimit -Sn 65536
uname -srm
echo "guest: net.core.bpf_jit_enable = \$(cat /proc/sys/net/core/bpf_jit_enable)"
# io_uring by name: where it cannot be used the gateway does not start, rather than run on epoll.
export PATH=/sbin:/bin GATEWAY_TESTS_REQUIRED=kernel,root GATEWAY_TEST_DRIVER=io_uring RUST_BACKTRACE=0
for suite in ${suites[*]}; do
  echo "guest: \$suite"
  /tests/\$suite --test-threads 1 ${FILTER:-} 2>&1
done
dmesg | grep -E 'WARNING|BUG:|Oops|Call [Tt]race|hung task'
echo guest: done
poweroff -f
INIT
chmod +x "$tree/init"
(cd "$tree" && find . | cpio -o -H newc --quiet | gzip -1) > "$work/initramfs-$arch.gz"
rm -rf "$tree" "$packed"

say "booting $(basename "$vmlinuz") on $arch for ${suites[*]}, at most ${PATIENCE_S} s"
log=$work/boot-$arch.log
began=$(date +%s)
timeout "$PATIENCE_S" "${qemu[@]}" -accel tcg -smp 2 -m 2048 -nographic -no-reboot -nic none \
  -kernel "$vmlinuz" -initrd "$work/initramfs-$arch.gz" \
  -append "console=$console quiet panic=-1 rdinit=/init" </dev/null > "$log" 2>&1 || say "qemu ended with $?"
grep -aE '^Linux |^test |^test result|panicked|guest:|WARNING|BUG:|Oops' "$log" || true
results=$(grep -acE '^test result: ok\.' "$log" || true)
passed=$(awk '/^test result: ok\./ { sum += $4 } END { print sum + 0 }' "$log")
[ "$results" -eq "${#suites[@]}" ] || { say "$results of ${#suites[@]} test files passed: $log"; exit 1; }
say "$passed tests of ${suites[*]} passed in $(($(date +%s) - began)) s on $(grep -aom1 'Linux [0-9].*' "$log")"
