#!/bin/sh
# Slurm Epilog: ends the accounting of this job's run. It calls no Slurm command, waits for
# nothing and always succeeds. As part of a larger Epilog: run this file from it, with
# `|| true`.

export PATH=/usr/sbin:/usr/bin:/sbin:/bin
jobs=/run/sams-ebpf/jobs

case $SLURM_JOB_ID in '' | *[!0-9]*) exit 0 ;; esac

now=
read -r now _ </proc/uptime

# Every unit of this job id: on a requeue, SLURM_JOB_RESTART_COUNT is already the next
# run's here, so it cannot tell which run is ending. The next run's Prolog comes later.
units="sams-ebpf@$SLURM_JOB_ID.service"
for folder in "$jobs/$SLURM_JOB_ID" "$jobs/$SLURM_JOB_ID".*; do
	[ -d "$folder" ] || continue
	# For a collector that has not been started yet: it closes the job at once. And the time
	# tells it what is not this run's any more.
	{ [ -e "$folder/ended" ] || echo "$now" >"$folder/ended"; } 2>/dev/null
	[ "$folder" = "$jobs/$SLURM_JOB_ID" ] || units="$units sams-ebpf@${folder##*/}.service"
done
# fail: a start that is still waiting its turn is not cancelled, see above.
# shellcheck disable=SC2086
timeout -k 1 10 systemctl --no-block --job-mode=fail stop $units </dev/null 2>/dev/null
exit 0
