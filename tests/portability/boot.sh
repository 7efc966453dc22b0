#!/bin/bash
# Boots a Debian kernel in qemu-system (software emulation, no KVM) with a small initramfs and runs the gateway's kernel
# tests in it: the committed BPF object is loaded by that kernel's verifier, attached, and drops.
#
#   tests/portability/boot.sh x86_64 [KERNEL.deb]     the debug build of this tree (cargo build, cargo test --no-run)
#   tests/portability/boot.sh arm64 [KERNEL.deb]      the build that tests/portability/arm64.sh made
#
# Without KERNEL.deb the current kernel of the distribution is fetched with apt-get (Debian 12: 6.1). Needs
# qemu-system-x86 or qemu-system-arm, busybox-static (of the guest's architecture), cpio. Takes minutes; exit code 0 when
# the tests in the guest passed. The work folder is target/portability; what the guest said stays in boot-ARCH.log.
set -euo pipefail
cd "$(dirname "$0")/../.."

arch=${1:?x86_64 or arm64}
deb=${2:-}
work=$PWD/target/portability
PATIENCE_S=${PATIENCE_S:-900}
# Tests by name; each prints `test NAME ... ok`.
TESTS=(
  a_flood_is_dropped_in_the_kernel_and_streams_of_others_lose_nothing
  after_its_time_a_client_may_come_back
  observe_counts_and_drops_nobody
)

say() { echo "boot.sh: $*" >&2; }

case $arch in
  x86_64)
    deb_arch=amd64; triple=x86_64-linux-gnu; target=${CARGO_TARGET_DIR:-$PWD/target}/debug
    strip=strip; loader=/lib64/ld-linux-x86-64.so.2; root=
    qemu=(qemu-system-x86_64 -machine q35 -cpu max); console=ttyS0 ;;
  arm64)
    deb_arch=arm64; triple=aarch64-linux-gnu; target=${ARM64_TARGET_DIR:-$PWD/target/arm64}/aarch64-unknown-linux-gnu/debug
    strip=aarch64-linux-gnu-strip; loader=/lib/ld-linux-aarch64.so.1; root=/usr/aarch64-linux-gnu
    # pauth-impdef: pointer authentication of the architecture's own kind is most of the time of an emulated boot.
    qemu=(qemu-system-aarch64 -machine virt -cpu "max,pauth-impdef=on"); console=ttyAMA0 ;;
  *) say "unknown architecture $arch"; exit 2 ;;
esac
for tool in "${qemu[0]}" cpio "$strip" dpkg-deb; do
  command -v "$tool" >/dev/null || { echo "skipped: $tool is not here"; exit 0; }
done

mkdir -p "$work"
if [ -z "$deb" ]; then
  package=$(apt-cache depends "linux-image-$deb_arch:$deb_arch" | sed -n 's/.*Depends: \(linux-image-[^:]*\).*/\1/p' | head -1)
  [ -n "$package" ] || { echo "skipped: no Debian kernel for $deb_arch (dpkg --add-architecture $deb_arch, apt-get update)"; exit 0; }
  (cd "$work" && apt-get download -q "$package:$deb_arch" >&2)
  deb=$(ls -t "$work/$package"_*_"$deb_arch.deb" | head -1)
fi
kernel=$work/kernel-$arch
rm -rf "$kernel"
mkdir -p "$kernel"
dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$kernel" ./boot
vmlinuz=$(ls "$kernel"/boot/vmlinuz-*)

# The tests look for the gateway where it was built.
binary=$target/gateway
flood=$(find "$target/deps" -name 'flood-*' -executable -type f -printf '%T@ %p\n' | sort -rn | sed 's/^[^ ]* //;q')
[ -n "$flood" ] && [ -x "$binary" ] || { say "build first: cargo build --bin gateway; cargo test --no-run --test flood"; exit 1; }
tree=$work/root-$arch
rm -rf "$tree"
mkdir -p "$tree"/{bin,proc,sys,tmp,dev,etc,lib64,"lib/$triple","$(dirname "$binary")"}
if [ "$arch" = x86_64 ]; then
  cp "$(command -v busybox)" "$tree/bin/busybox"
else
  busybox=$(ls -t "$work"/busybox-static_*_arm64.deb 2>/dev/null | head -1 || true)
  [ -n "$busybox" ] || { (cd "$work" && apt-get download -q busybox-static:arm64 >&2); busybox=$(ls -t "$work"/busybox-static_*_arm64.deb | head -1); }
  dpkg-deb --fsys-tarfile "$busybox" | tar -x -C "$tree" ./bin/busybox
fi
"$strip" -o "$tree$binary" "$target/gateway"
"$strip" -o "$tree/bin/flood" "$flood"
for library in libgcc_s.so.1 libm.so.6 libc.so.6; do
  found=$root/lib/$triple/$library
  [ -e "$found" ] || found=$root/lib/$library
  cp -L "$found" "$tree/lib/$triple/"
done
mkdir -p "$tree$(dirname "$loader")"
cp -L "$root$loader" "$tree$loader"
# A cross toolchain's loader looks in /lib.
ln -s "$triple/libc.so.6" "$triple/libm.so.6" "$triple/libgcc_s.so.1" "$tree/lib/"
cat > "$tree/init" <<INIT
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
uname -srm
cat /proc/sys/net/core/bpf_jit_enable
for test in ${TESTS[*]}; do
  GATEWAY_TESTS_REQUIRED=kernel /bin/flood --exact \$test --nocapture 2>&1 | tail -40
done
echo guest: done
poweroff -f
INIT
chmod +x "$tree/init"
(cd "$tree" && find . | cpio -o -H newc --quiet | gzip -1) > "$work/initramfs-$arch.gz"

say "booting $(basename "$vmlinuz") on $arch, at most ${PATIENCE_S} s"
log=$work/boot-$arch.log
timeout "$PATIENCE_S" "${qemu[@]}" -accel tcg -smp 2 -m 2048 -nographic -no-reboot -nic none \
  -kernel "$vmlinuz" -initrd "$work/initramfs-$arch.gz" \
  -append "console=$console quiet panic=-1 rdinit=/init" </dev/null > "$log" 2>&1 || say "qemu ended with $?"
grep -aE '^Linux |^test |panicked|guest:' "$log" || true
passed=$(grep -acE '^test .* \.\.\. ok' "$log" || true)
[ "$passed" -eq "${#TESTS[@]}" ] || { say "$passed of ${#TESTS[@]} passed: $log"; exit 1; }
say "all ${#TESTS[@]} passed on $(grep -aom1 'Linux [0-9].*' "$log")"
