#!/bin/sh
# job.sh FOLDER: a small job of many kinds, 20-40 s on two CPUs. What it makes goes to FOLDER.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$1
mkdir -p "$work/src"
cd "$work"

# 1. A compile: a library of generated sources, and the programs of this job, by make.
awk -v folder=src -f "$here/sources.awk"
cp "$here/solver.c" "$here/stage.c" src/
make -s -j2 -f "$here/project.mk"

# 2. A pipeline of thousands of short commands.
i=0
while [ "$i" -lt 700 ]; do
	echo "sample $i value $((i * 7919 % 1000))" | sed 's/value/v/' | cut -d' ' -f2,4 | tr ' ' ','
	i=$((i + 1))
done | sort -t, -k2 -n | uniq >values.csv
test "$(wc -l <values.csv)" -eq 700

# 3. A threaded solver.
./solver 2 900

# 4. A program that prepares its data and then becomes another.
./prepare ./simulate
