#!/bin/bash
# Tests the installed service for real: boots systemd in namespaces of its own over a throw-away copy of this root, installs
# there with install.sh, and looks at the running service from outside its sandbox: ready by sd_notify, unprivileged, serving,
# reloaded, a wrong configuration refused and not tried again, ended cleanly.
#
#   systemd/boot.sh [BUILD]     BUILD: where the binaries are (default target/debug)
#
# Nothing of the host changes: its root is the read-only lower half of an overlay, /proc/sys is read-only, and network,
# processes and cgroup are the test's own. Needs root, cgroup2, overlayfs.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
build=$(realpath "${1:-$root/target/debug}")

SECONDS_MAX=90

skip() { echo "skipped: systemd/boot.sh: $*"; exit 0; }

if [ "${BOOT_STAGE:-}" = "" ]; then
  [ "$(id -u)" -eq 0 ] || skip "not root"
  [ -x /lib/systemd/systemd ] || skip "no systemd here"
  [ -x "$build/gateway" ] || { echo "$0: no gateway in $build" >&2; exit 1; }
  cgroups=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
  [ -n "$cgroups" ] || skip "no cgroup2 here"
  unshare -m -p -n -u -i -f true 2>/dev/null || skip "namespaces are forbidden"
  export BOOT_CGROUP=$cgroups/gateway-boot-$$
  mkdir "$BOOT_CGROUP" 2>/dev/null || skip "cgroup2 is read-only"
  work=$(mktemp -d)
  export BOOT_WORK=$work
  clean_up() {
    # The last processes of the namespace may still be on their way out.
    local _
    for _ in $(seq 50); do
      find "$BOOT_CGROUP" -depth -type d -exec rmdir {} + 2>/dev/null && break
      sleep 0.1
    done
    rmdir "$work"
  }
  trap clean_up EXIT
  # Mounts are private to this step and end with it.
  BOOT_STAGE=copy unshare -m --propagation private "$here/boot.sh" "$build"
  exit
fi

# Makes the copy of the root, installs into it, boots it, reads its verdict.
copy() {
  local r=$BOOT_WORK/root unit
  mount -t tmpfs tmpfs "$BOOT_WORK"
  mkdir "$BOOT_WORK"/{upper,work,root}
  mount -t overlay overlay -o "lowerdir=/,upperdir=$BOOT_WORK/upper,workdir=$BOOT_WORK/work" "$r" || skip "no overlayfs"
  # A network namespace, or the sysctl settings would be the host's.
  mount -t proc -o ro proc "$r/proc"
  mkdir "$r/gateway-test" && cp -r "$root/systemd" "$root/examples" "$r/gateway-test/"
  mkdir "$r/gateway-test/build" && cp "$build/gateway" "$build/gateway-bench" "$r/gateway-test/build/"
  unshare -n chroot "$r" env BUILD_DIR=/gateway-test/build /gateway-test/systemd/install.sh >"$BOOT_WORK/install.log" 2>&1 \
    || { cat "$BOOT_WORK/install.log"; echo "$0: install.sh failed" >&2; exit 1; }
  umount "$r/proc"
  sed -n '/^# >>> probe/,/^# <<< probe/p' "$here/boot.sh" > "$r/gateway-test/probe.sh"
  # Only what is tested starts: no hardware, no other services, no journal.
  rm -rf "$r"/etc/systemd/system/*.wants "$r/etc/systemd/journald.conf.d"
  for unit in network-online.target systemd-sysctl.service systemd-udevd.service systemd-journald.service \
    systemd-journald.socket systemd-journald-dev-log.socket systemd-tmpfiles-setup.service; do
    ln -sf /dev/null "$r/etc/systemd/system/$unit"
  done
  printf '[Unit]\nDefaultDependencies=no\nWants=gateway.service probe.service\n' > "$r/etc/systemd/system/boot.target"
  mkdir -p "$r/etc/systemd/system/gateway.service.d"
  printf '[Unit]\nDefaultDependencies=no\n[Service]\nStandardOutput=append:/gateway-test/log\nStandardError=append:/gateway-test/log\n' \
    > "$r/etc/systemd/system/gateway.service.d/boot.conf"
  printf '[Unit]\nDefaultDependencies=no\nAfter=gateway.service\n[Service]\nType=oneshot\n%s\n%s\n' \
    'ExecStart=/bin/bash -c "exec /bin/bash /gateway-test/probe.sh >/gateway-test/verdict 2>&1"' \
    'ExecStopPost=/bin/systemctl --force poweroff' > "$r/etc/systemd/system/probe.service"
  (
    echo "$BASHPID" > "$BOOT_CGROUP/cgroup.procs"
    # script(1) gives a terminal, which systemd wants for its console.
    BOOT_STAGE=boot exec timeout -s KILL "$SECONDS_MAX" script -qfec \
      "unshare -m -p -i -u -n -C -f --kill-child '$here/boot.sh' '$build'" "$BOOT_WORK/console" </dev/null >/dev/null
  ) || true
  [ -s "$r/gateway-test/verdict" ] || { tail -5 "$BOOT_WORK/console"; skip "systemd does not boot in namespaces here"; }
  cat "$r/gateway-test/verdict"
  grep -q '^boot: ok$' "$r/gateway-test/verdict" && return
  echo "--- the service's log"; cat "$r/gateway-test/log"
  echo "--- the console"; tail -30 "$BOOT_WORK/console"
  exit 1
}

# Inside the namespaces: mounts what systemd expects, and becomes it.
boot() {
  local r=$BOOT_WORK/root node
  mount -t proc proc "$r/proc"
  mount --bind "$r/proc/sys" "$r/proc/sys"
  mount -o remount,ro,bind "$r/proc/sys"
  mount -t sysfs sysfs "$r/sys"
  mount -t cgroup2 cgroup2 "$r/sys/fs/cgroup"
  # As systemd mounts it on a host, with the folder that systemd-tmpfiles makes. Not every kernel has it.
  if mount -t bpf -o mode=0700 bpf "$r/sys/fs/bpf" 2>/dev/null; then
    chroot "$r" install -d -m 0700 -o gateway -g gateway /sys/fs/bpf/gateway
  fi
  mount -t tmpfs tmpfs "$r/dev"
  mkdir "$r"/dev/{shm,pts,mqueue,hugepages}
  ln -s pts/ptmx "$r/dev/ptmx"
  for node in null zero full random urandom tty; do
    touch "$r/dev/$node"
    mount --bind "/dev/$node" "$r/dev/$node"
  done
  touch "$r/dev/console"
  mount --bind "$(readlink /proc/self/fd/0)" "$r/dev/console"
  mount -t tmpfs tmpfs "$r/run"
  mount -t tmpfs tmpfs "$r/tmp"
  ip link set lo up
  cd "$r"
  pivot_root . mnt
  umount -l /mnt
  exec env -i container=other PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=boot.target --log-target=console --log-color=no --show-status=no
}

case $BOOT_STAGE in
  copy) copy; exit ;;
  boot) boot ;;
esac
exit

# The rest runs in the booted copy.
# >>> probe
show() { systemctl show gateway -p "$1" --value; }
expect() { [ "$2" = "$3" ] && echo "ok: $1" || { echo "boot: $1: expected $3, got $2"; exit 1; }; }

expect "started and said that it is ready" "$(show ActiveState)" active
status=/proc/$(show MainPID)/status
expect "runs as gateway" "$(awk '/^Uid:/ { print $2 }' "$status")" "$(id -u gateway)"
# BPF, PERFMON, NET_ADMIN, NET_BIND_SERVICE: bits 39, 38, 12, 10 (capabilities(7)).
expect "has the four capabilities and no more" "$(awk '/^CapBnd:/ { print $2 }' "$status")" 000000c000001400
expect "is under seccomp" "$(awk '/^Seccomp:/ { print $2 }' "$status")" 2
expect "keeps its state to itself" "$(stat -c '%U %a' /var/lib/gateway)" "gateway 700"
expect "serves" "$(curl -s -m 5 -o /dev/null -w '%{http_code}' http://127.0.0.1:8080/healthz)" 200
# A kernel without BPF is no fault of the unit; a refusal by its sandbox is.
expect "has the kernel's help, or the kernel has none" \
  "$(grep -cE 'kernel plane loaded|kernel plane is off' /gateway-test/log) $(grep -cE 'kernel plane.*(not permitted|CAP_)' /gateway-test/log)" "1 0"
grep -oE 'kernel plane .*' /gateway-test/log; grep -oE 'engine=.*io_uring|engine=.*epoll' /gateway-test/log
systemctl reload gateway
expect "reloads" $? 0
cp /etc/gateway/gateway.yaml /gateway-test/good.yaml
echo "bogus: 1" >> /etc/gateway/gateway.yaml
systemctl reload gateway 2>/dev/null
expect "refuses to reload a wrong configuration" $? 1
expect "goes on with the old one" "$(show ActiveState)" active
pid=$(show MainPID)
kill -9 "$pid"
for _ in $(seq 100); do [ "$(show ActiveState)" = failed ] && break; sleep 0.1; done
expect "is started again after kill -9, and not again with a wrong configuration" "$(show NRestarts) $(show ExecMainStatus)" "1 2"
cp /gateway-test/good.yaml /etc/gateway/gateway.yaml
systemctl start gateway
expect "starts with the right one" $? 0
systemctl stop gateway
expect "ends cleanly" "$(show Result) $(show ExecMainStatus)" "success 0"
echo "boot: ok"
# <<< probe
