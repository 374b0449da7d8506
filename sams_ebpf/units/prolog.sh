#!/bin/sh
# Slurm Prolog: starts the accounting of this run of the job. It calls no Slurm command,
# waits for nothing and always succeeds: accounting is never a reason to drain a node.
# As part of a larger Prolog: run this file from it, with `|| true`.

export PATH=/usr/sbin:/usr/bin:/sbin:/bin
jobs=/run/sams-ebpf/jobs

case $SLURM_JOB_ID in '' | *[!0-9]*) exit 0 ;; esac

# When this run begins: a requeued run's cgroup has the path of the one before it, and is told
# from it by its time.
now= began=
read -r now _ </proc/uptime
began=$now
# With PrologFlags=RunInJob the job's cgroup is there already, and we are in it.
while read -r line; do
	case $line/ in */"job_$SLURM_JOB_ID"/* | */"${SLURM_JOB_SLUID:-none}"/*) began= ;; esac
done </proc/self/cgroup

# A unit of an earlier run of this job may still be there: requeued after its Epilog did
# not run (slurmd died), or still writing its last batch. Each run has a unit of its own;
# its folder says which names are taken.
run=$SLURM_JOB_ID
number=0
earlier=
umask 077
until mkdir "$jobs/$run" 2>/dev/null; do
	[ -d "$jobs/$run" ] || break # no $jobs at all: the unit says so, and counts all the same
	earlier="$earlier sams-ebpf@$run.service"
	# Its unit may end this moment, and the folder with it. (Not `:`, which ends a shell then.)
	{ [ -e "$jobs/$run/ended" ] || echo "$now" >"$jobs/$run/ended"; } 2>/dev/null
	number=$((number + 1))
	[ "$number" -lt 100 ] || exit 0
	run=$SLURM_JOB_ID.$number
done

# NUL ends each value, so that no value, whatever a user put into it, can look like another.
# shellcheck disable=SC2153
[ ! -d "$jobs/$run" ] || printf '%s\0' \
	"SAMS_EBPF_UPTIME=$began" \
	"SLURM_JOB_ID=$SLURM_JOB_ID" \
	"SLURM_JOB_SLUID=$SLURM_JOB_SLUID" \
	"SLURM_JOB_RESTART_COUNT=${SLURM_JOB_RESTART_COUNT:-$SLURM_RESTART_COUNT}" \
	"SLURM_JOB_START_TIME=$SLURM_JOB_START_TIME" \
	"SLURM_JOB_UID=$SLURM_JOB_UID" \
	"SLURM_JOB_USER=$SLURM_JOB_USER" \
	"SLURM_JOB_ACCOUNT=$SLURM_JOB_ACCOUNT" \
	"SLURM_JOB_PARTITION=$SLURM_JOB_PARTITION" \
	"SLURM_JOB_NAME=$SLURM_JOB_NAME" \
	"SLURM_JOB_NUM_NODES=$SLURM_JOB_NUM_NODES" \
	"SLURM_JOB_CPUS_PER_NODE=$SLURM_JOB_CPUS_PER_NODE" \
	"SLURM_HET_JOB_ID=$SLURM_HET_JOB_ID" \
	"SLURM_CLUSTER_NAME=$SLURM_CLUSTER_NAME" \
	"SLURMD_NODENAME=$SLURMD_NODENAME" \
	>"$jobs/$run/env"

# --no-block hands the request over; `timeout` is for a manager that does not answer.
if [ -n "$earlier" ]; then
	# shellcheck disable=SC2086
	timeout -k 1 10 systemctl --no-block --job-mode=fail stop $earlier </dev/null 2>/dev/null
fi
# A request that timed out may be carried out all the same, so the folder stays.
timeout -k 1 10 systemctl --no-block start "sams-ebpf@$run.service" </dev/null
exit 0
