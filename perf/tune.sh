#!/bin/bash
# Sets a dedicated gateway host up for speed and for measurements that repeat, and back again. Root.
#
#   perf/tune.sh --dry-run     says what would change, and why; changes nothing
#   perf/tune.sh               changes it; what was before is kept in /run/gateway-tune (gone with the next boot, as all
#                              changes are)
#   perf/tune.sh --undo        puts back what was before
#
# What a gateway host should have at all times is in systemd/90-gateway.conf, and is set here too. A setting that this
# machine does not have, or does not let one change, is named and left.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=perf/lib.sh
. "$root/perf/lib.sh"
before=${TUNE_STATE:-/run/gateway-tune}

mode=apply
case ${1:-} in
  "") ;;
  --dry-run) mode=dry-run ;;
  --undo) mode=undo ;;
  --help | -h) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
esac

# What a file under /proc or /sys has: the choice in [brackets] where it lists them all.
now() { sed -E 's/.*\[(.*)\].*/\1/; s/[[:space:]]+/ /g' "$1"; }

# Without leading zeros: CPU masks are printed as wide as the machine is (`00000000,00000001`).
bare() { sed -E 's/^[0,]+(.)/\1/' <<<"$1"; }

# A mask that has only this CPU, in groups of 32 bits (bitmap_parse, lib/bitmap-str.c of the kernel).
mask_of() {
  local mask group
  printf -v mask '%x' $((1 << ($1 % 32)))
  for ((group = $1 / 32; group > 0; group--)); do mask+=,00000000; done
  echo "$mask"
}

# set_file VALUE REASON FILE...; a pattern that finds nothing comes as it is, and is named.
set_file() {
  local value=$1 reason=$2 file old
  shift 2
  for file in "$@"; do
    [ -e "$file" ] || { echo "not here: $file ($reason)"; continue; }
    old=$(now "$file")
    [ "$(bare "$old")" != "$(bare "$value")" ] || continue
    echo "$file: $old -> $value ($reason)"
    [ $mode = dry-run ] && continue
    if echo "$value" 2>/dev/null > "$file"; then
      printf '%s\t%s\n' "$file" "$old" >> "$before"
    else
      echo "refused: $file"
    fi
  done
}

# set_by UNDO REASON COMMAND...: for what has no file: runs the command, and keeps UNDO for --undo.
set_by() {
  local back=$1 reason=$2
  shift 2
  echo "$* ($reason)"
  [ $mode = dry-run ] && return
  if "$@" 2>/dev/null; then printf '!\t%s\n' "$back" >> "$before"; else echo "refused: $*"; fi
}

# Puts back what was before. What is refused stays in the file, for another try.
undo() {
  local file old left=0
  [ -e "$before" ] || { echo "nothing to undo: no $before"; return; }
  : > "$before.left"
  # Last change first, so that a file changed twice ends as it was.
  while IFS=$'\t' read -r file old; do
    if [ "$file" = "!" ]; then
      echo "$old"
      # Split at spaces: a command of this script's own.
      # shellcheck disable=SC2086
      $old && continue
    else
      echo "$file: back to $old"
      echo "$old" 2>/dev/null > "$file" && continue
    fi
    echo "refused: ${old}${file:+ ($file)}"
    printf '%s\t%s\n' "$file" "$old" >> "$before.left"
    left=1
  done < <(tac "$before")
  # In the order in which it was done, as before.
  tac "$before.left" > "$before"
  rm -f "$before.left"
  [ $left = 1 ] || { rm -f "$before"; return 0; }
  echo "what was refused is kept in $before" >&2
  return 1
}

# The lines of the sysctl file, so that each value stands in one place.
sysctl_file() {
  local name value
  while IFS='=' read -r name value; do
    name=$(tr -d ' -' <<<"$name")
    set_file "$(sed -E 's/^ +//' <<<"$value")" "see systemd/90-gateway.conf" "/proc/sys/${name//.//}"
  done < <(grep -E '^-?[a-z]' "$root/systemd/90-gateway.conf")
}

processors() {
  set_file performance "clocks that rise only when asked make the first events of a burst slow" \
    /sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor
  local turbo="turbo depends on what the neighbours do: off, figures repeat (costs peak speed)"
  if [ -e /sys/devices/system/cpu/intel_pstate/no_turbo ]; then
    set_file 1 "$turbo" /sys/devices/system/cpu/intel_pstate/no_turbo
  else
    # AMD's, and that of acpi-cpufreq.
    set_file 0 "$turbo" /sys/devices/system/cpu/cpufreq/boost
  fi
  set_file 0 "the watchdog takes one hardware counter of each core" /proc/sys/kernel/nmi_watchdog
  # Waking from a deep idle state takes longer than relaying an event.
  if [ -e /dev/cpu_dma_latency ]; then
    echo "idle states: not changed; boot with processor.max_cstate=1 where microseconds count"
  fi
}

memory() {
  set_file madvise "huge pages that come unasked stall the thread that touches them first, and swell resident memory" \
    /sys/kernel/mm/transparent_hugepage/enabled
  set_file 0 "pages that move between NUMA nodes stall pinned threads, whose memory is near them from the start" \
    /proc/sys/kernel/numa_balancing
  set_file 1 "keys and buffers of prompts should not go to disk, nor wait for it" /proc/sys/vm/swappiness
}

# The data plane steers connections to the core that took the packet: that wants a queue a core, and RPS off.
network() {
  local device queues queue cpu
  for device in /sys/class/net/*/device; do
    [ -e "$device" ] || { echo "not here: a network card (queues, ring sizes)"; break; }
    device=$(basename "$(dirname "$device")")
    queues=$(find "/sys/class/net/$device/queues" -maxdepth 1 -name 'rx-*' | wc -l)
    [ "$queues" -ge "$(nproc)" ] \
      || echo "$device: $queues receive queues for $(nproc) cores; more, where it can: ethtool -L $device combined $(nproc)"
    set_file 0 "packets stay on the core that received them; steering goes by it" \
      "/sys/class/net/$device/queues/"rx-*/rps_cpus
    # A send leaves by the queue of its own core, so that its completion comes back there. One queue serves all cores.
    if [ "$queues" -gt 1 ]; then
      cpu=0
      for queue in "/sys/class/net/$device/queues/"tx-*; do
        set_file "$(mask_of $cpu)" "XPS: a core sends by a queue of its own" "$queue/xps_cpus"
        cpu=$(((cpu + 1) % $(nproc --all)))
      done
    fi
    ring_sizes "$device"
  done
}

# A burst of a few thousand small packets while a core is busy must not overflow the card's ring (dropped: seen as rx_missed).
ring_sizes() {
  local most now
  command -v ethtool >/dev/null || { echo "not here: ethtool ($1: ring sizes)"; return; }
  most=$(ethtool -g "$1" 2>/dev/null | awk '/^Pre-set/ { max = 1 } /^Current/ { max = 0 } max && /^RX:/ { print $2 }')
  now=$(ethtool -g "$1" 2>/dev/null | awk '/^Current/ { current = 1 } current && /^RX:/ { print $2 }')
  [[ "$most" =~ ^[0-9]+$ && "$now" =~ ^[0-9]+$ ]] || { echo "$1: its ring size cannot be read"; return; }
  [ "$most" -gt 4096 ] && most=4096
  [ "$now" -ge "$most" ] || set_by "ethtool -G $1 rx $now" "$1: bursts wait instead of being dropped" ethtool -G "$1" rx "$most"
}

# What only the boot line or the machine's layout can give; said, not done.
isolation() {
  local cores=$(($(nproc) - 1))
  [ -s /sys/devices/system/cpu/isolated ] && [ "$(cat /sys/devices/system/cpu/isolated)" != "" ] \
    || echo "isolation: not changed; for the steadiest tail boot with isolcpus=1-$cores nohz_full=1-$cores rcu_nocbs=1-$cores," \
      "leave CPU 0 to interrupts and the control thread, and run the gateway with CPUAffinity=1-$cores"
  [ "$(systemctl is-active irqbalance 2>/dev/null)" != active ] \
    || echo "irqbalance runs: it moves interrupts between cores, and steering follows them; stop it and bind each queue to its core"
}

profiling() {
  set_file 1 "perf may count for processes of the same user" /proc/sys/kernel/perf_event_paranoid
  set_file 0 "perf names the kernel's functions" /proc/sys/kernel/kptr_restrict
}

[ $mode = dry-run ] || [ "$(id -u)" -eq 0 ] || { echo "$0: needs root (--dry-run does not)" >&2; exit 1; }
if [ $mode = undo ]; then
  undo && exit 0 || exit 1
fi
sysctl_file
processors
memory
network
isolation
profiling
[ $mode = dry-run ] || echo "perf/tune.sh --undo puts it back"
