#!/bin/sh
# storm_until.sh [COMMAND…]: runs COMMAND (/bin/true) again and again until the file $STOP exists.
[ $# -gt 0 ] || set -- /bin/true
i=0
while [ ! -e "$STOP" ]; do
	"$@"
	i=$((i + 1))
done
printf 'forks %d\nexecs %d\nexits %d\n' "$i" "$i" "$i" >>"$TRUTH"
