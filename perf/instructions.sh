#!/bin/bash
# Instructions of the hot path's functions, counted by callgrind: exact, and the same from run to run, so that one per cent
# more is seen where a stopwatch sees noise. The release build is what is counted.
#
#   perf/instructions.sh                 counts, beside the committed baseline (perf/instructions.tsv)
#   perf/instructions.sh --check         fails where a count is more than TOLERANCE per cent above it, or a case is missing
#   perf/instructions.sh --update        writes the baseline: commit it with the reason
#   perf/instructions.sh CASE…           these cases only
#
# Each case runs twice with different repetitions, and the difference is divided: start and end cost nothing.
# Environment: TOLERANCE (5). Needs: valgrind. The counts hold for x86_64 with AVX2, which memchr and simdutf8 choose at run
# time; elsewhere --check says so and checks nothing.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=perf/lib.sh
. "$root/perf/lib.sh"
baseline=$root/perf/instructions.tsv
few=200 many=1200

mode=show cases=()
for argument in "$@"; do
  case $argument in
    --check) mode=check ;;
    --update) mode=update ;;
    --help | -h) usage; exit 0 ;;
    -*) echo "$0: unknown option $argument" >&2; usage >&2; exit 2 ;;
    *) cases+=("$argument") ;;
  esac
done

# The baseline has all cases or is none.
[ $mode != update ] || [ ${#cases[@]} -eq 0 ] || { echo "$0: --update writes all cases, not ${cases[*]} alone" >&2; exit 2; }

# On a machine where it cannot be, a check is not a failure.
lacks() {
  [ $mode = check ] && { echo "skipped: instruction counts: $1"; exit 0; }
  fail "$1"
}
command -v valgrind >/dev/null || lacks "needs valgrind (apt-get install valgrind)"
[ "$(uname -m)" = x86_64 ] && grep -qw avx2 /proc/cpuinfo || lacks "the baseline is for x86_64 with AVX2"

program=$(cd "$root" && cargo build -q --release --locked -p gateway --example hot_path --message-format json \
  | sed -nE 's/.*"executable":"([^"]*hot_path)".*/\1/p' | tail -1)
[ -x "$program" ] || { echo "$0: the example hot_path was not built" >&2; exit 1; }
[ ${#cases[@]} -gt 0 ] || mapfile -t cases < <("$program")

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

# Instructions of one run of the program.
count() {
  # The environment is part of what a program reads at its start.
  env -i PATH="$PATH" valgrind --quiet --tool=callgrind --callgrind-out-file="$out/raw" "$program" "$1" "$2" 2>"$out/log" \
    || { cat "$out/log" >&2; exit 1; }
  sed -nE 's/^(totals|summary): ([0-9]+).*/\2/p' "$out/raw" | tail -1
}

for case in "${cases[@]}"; do
  a=$(count "$case" $few)
  b=$(count "$case" $many)
  printf '%s\t%d\n' "$case" $(((b - a + (many - few) / 2) / (many - few)))
done > "$out/now"

if [ $mode = update ]; then
  { echo "# Instructions for one repetition of each case of gateway/examples/hot_path.rs: perf/instructions.sh --update"
    cat "$out/now"; } > "$baseline"
  cat "$baseline"
  exit 0
fi

touch "$baseline"
awk -F '\t' -v tolerance="${TOLERANCE:-5}" -v check=$mode '
  /^#/ { next }
  FNR == NR { base[$1] = $2; next }
  FNR == 1 { printf "%-22s %12s %12s %9s\n", "case", "baseline", "now", "change" }
  {
    if (!($1 in base)) { printf "%-22s %12s %12d %9s\n", $1, "-", $2, "new"; bad = 1; next }
    change = 100 * ($2 - base[$1]) / base[$1]
    over = change > tolerance
    if (over) bad = 1
    printf "%-22s %12d %12d %+8.1f%%%s\n", $1, base[$1], $2, change, over ? "  MORE" : (change < -tolerance ? "  less: --update" : "")
  }
  END { if (bad && check == "check") exit 1 }' "$baseline" "$out/now" || {
  echo "instructions: a case costs more than its baseline allows, or has none; find out why, or --update with the reason" >&2
  exit 1
}
