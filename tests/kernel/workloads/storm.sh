#!/bin/sh
# storm.sh N [COMMAND…]: N times COMMAND (/bin/true) from a shell.
n=$1
shift
[ $# -gt 0 ] || set -- /bin/true
i=0
while [ "$i" -lt "$n" ]; do
	"$@"
	i=$((i + 1))
done
printf 'forks %d\nexecs %d\nexits %d\n' "$n" "$n" "$n" >>"$TRUTH"
