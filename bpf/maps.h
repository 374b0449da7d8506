/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * The maps. All are pre-allocated: programs at tracepoints must not allocate on kernels
 * before 6.1. The loader sets the sizes. Never LRU: a map that is full must be told, and what
 * is read must not be another key's by then.
 */
#ifndef SAMS_MAPS_H
#define SAMS_MAPS_H

#include "kernel_compat.h"
#include "record.h"

#ifndef SAMS_BCC
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__type(key, u64);
	__type(value, struct sams_task);
} tasks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u64);
	__type(value, struct sams_process);
} processes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct sams_move_key);
	__type(value, struct sams_move);
} moves SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct sams_total_key);
	__type(value, struct sams_total);
} totals SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct sams_name_key);
	__type(value, struct sams_name);
} names SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct sams_chain_key);
	__type(value, u32); /* index of its total */
} chains SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, u64); /* kernfs id of a cgroup in the set's hierarchy */
	__type(value, u32);
} cgroups SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SAMS_SLOTS);
	__type(key, u32);
	__type(value, struct sams_slot);
} slots SEC(".maps");

/* Places in `slots` that nobody has: taken by on_mkdir and by collectors, put back by them. */
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, SAMS_SLOTS);
	__uint(key_size, 0);
	__uint(value_size, sizeof(u32));
} free_slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, SAMS_SLOTS);
	__type(key, u64); /* hash of a job's cgroup path */
	__type(value, u32);
} jobs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SAMS_SLOTS);
	__type(key, u32);
	__type(value, struct sams_claim);
} claims SEC(".maps");

/* By place of the slot: CLOCK_BOOTTIME at which the job's cgroup was last made again. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SAMS_SLOTS);
	__type(key, u32);
	__type(value, u64);
} remade SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct sams_total_key);
	__type(value, struct sams_split);
} splits SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct sams_node);
} node SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct sams_cost);
} costs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct sams_dying);
} dying SEC(".maps");

/* Where a path is put together: one per program, since an interrupt may run another. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 4);
	__type(key, u32);
	__type(value, struct sams_name);
} scratch SEC(".maps");

/* PERF_COUNT_SW_CPU_CLOCK of each CPU: the scheduler's clock, readable at any moment.
 * The elements outlive the process that opened them (BPF_F_PRESERVE_ELEMS). */
struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_PRESERVE_ELEMS);
	__type(key, u32);
	__type(value, u32);
} clocks SEC(".maps");
#endif

/* Options, set by the loader before the programs are loaded; constant from then on. */
OPTION(u32, option_controller, 0);   /* whose tree: enum sams_controller */
OPTION(s32, option_hierarchy, 0);    /* its id, as in /proc/PID/cgroup */
OPTION(u32, option_quota, 1024);     /* executables per slot */
OPTION(u32, option_host_mounts, 0);  /* inode of the host's mount namespace, 0: unknown */
OPTION(u32, option_exact, 0);	     /* on_switch and on_charge are attached */
OPTION(u32, option_slices, 1);	     /* the CPU clocks are there */
OPTION(u64, option_seed, 0);	     /* of the executables' hash */
OPTION(u64, option_limit_ns, 0);     /* of the programs' own time per CPU and second, 0: none */
OPTION(u64, option_slice_ns, 0);     /* a longer slice has time in it that the task did not run */
OPTION(u32, option_parents, 0);	     /* how many of the following are in use */
#ifndef SAMS_BCC
const volatile u64 option_parent_hash[SAMS_PARENTS] = {}; /* of folders of job cgroups */
#define PARENT_HASH(i) option_parent_hash[i]
#else
static __always_inline u64 parent_hash(u32 i)
{
	switch (i) {
	case 0:
		return PARENT_0;
	case 1:
		return PARENT_1;
	case 2:
		return PARENT_2;
	case 3:
		return PARENT_3;
	case 4:
		return PARENT_4;
	case 5:
		return PARENT_5;
	case 6:
		return PARENT_6;
	default:
		return PARENT_7;
	}
}
#define PARENT_HASH(i) parent_hash(i)
#endif

#endif
