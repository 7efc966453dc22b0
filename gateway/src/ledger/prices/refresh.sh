#!/bin/sh
# Makes list.csv, the list prices that are built in, from a table of list prices in dollars per million tokens:
#   refresh.sh TABLE.csv YYYY-MM-DD > list.csv
# The table's columns are named in its first line; those named below are taken, whatever their order.
set -eu
[ $# = 2 ] || { echo "usage: refresh.sh TABLE.csv YYYY-MM-DD" >&2; exit 2; }
cat <<END
# List prices of $2: published prices of the providers, US dollars per million tokens, gathered by the project.
# Made by refresh.sh. Empty: the provider names no such price. Sorted by provider and model.
# provider,model,input,output,cached,write 5m,write 1h,>200k input,>200k output,>200k cached,priority input,priority output,flex input,flex output,batch input,batch output
END
awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next }
{
  n = split("provider model input output cache_read cache_write_5m cache_write_1h input_over_200k output_over_200k cache_read_over_200k input_priority output_priority input_flex output_flex input_batch output_batch", names, " ")
  line = ""
  for (i = 1; i <= n; i++) line = line (i > 1 ? "," : "") $(at[names[i]])
  sub(/,+$/, "", line)
  print line
}' "$1" | LC_ALL=C sort -t, -k1,1 -k2,2 -u
