/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * What `kernel_types.h` and libbpf's headers are for the compiled object, for BCC: the
 * headers of the running kernel, and their private structures as far as they are read.
 * Maps are made by libbpf from the object and come as descriptors, -DMAP_<name>=<fd>.
 */
#ifndef SAMS_BCC_H
#define SAMS_BCC_H

#include <linux/cgroup-defs.h>
#include <linux/binfmts.h>
#include <linux/dcache.h>
#include <linux/fs.h>
#include <linux/kernfs.h>
#include <linux/mm_types.h>
#include <linux/mount.h>
#include <linux/ns_common.h>
#include <linux/nsproxy.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>

#undef current
#undef READ

/* The head of fs/mount.h has been so since 7d6fec45a5131 ("vfs: start hiding vfsmount
 * guts series") (in v3.3). */
struct mount {
	struct hlist_node mnt_hash;
	struct mount *mnt_parent;
	struct dentry *mnt_mountpoint;
	struct vfsmount mnt;
};

#define SEC(name)	__attribute__((section(name), used))
#define barrier_var(var) asm volatile("" : "=r"(var) : "0"(var))

#define NO_BPF_LOOP
#define NO_TYPED_POINTERS
#define NO_FETCHING_ATOMICS
#define MAP(name) ((void *)bpf_pseudo_fd(1, MAP_##name))
#define OPTION(type, name, preset)

#define PROGRAM(name, tracepoint)                           \
	__attribute__((section(".bpf.fn." #name), used)) \
	int name(struct bpf_raw_tracepoint_args *ctx)

/* Where it cannot read, the helper leaves zeroes. */
#define READ(pointer, field)                                                                 \
	({                                                                                   \
		typeof(pointer) _from = (pointer);                                           \
		typeof(_from->field) _value;                                                 \
		bpf_probe_read_kernel((void *)&_value, sizeof(_value),                       \
				      (const void *)&_from->field);                          \
		_value;                                                                      \
	})

static __always_inline u32 task_state(struct task_struct *task, int how)
{
	(void)how;
	return READ(task, TASK_STATE); /* __state or state, told by the loader */
}

/* `struct mm_rss_stat` went in f1a7941243c1 ("mm: convert mm's rss stats into
 * percpu_counter") (in v6.2): the counters stand in an array either way. */
struct mm_rss_stat;
#define RSS_IS_OLD \
	__builtin_types_compatible_p(typeof(((struct mm_struct *)0)->rss_stat), struct mm_rss_stat)

static __always_inline u64 mm_rss_pages(struct mm_struct *mm)
{
	/* MM_FILEPAGES 0, MM_ANONPAGES 1, MM_SHMEMPAGES 3 */
	const int kinds[] = {0, 1, 3};
	s64 pages, sum = 0;
	int i;

#pragma unroll
	for (i = 0; i < 3; i++) {
		size_t at = offsetof(struct mm_struct, rss_stat) +
			    (RSS_IS_OLD ? kinds[i] * sizeof(long)
					: kinds[i] * sizeof(struct percpu_counter) +
						  offsetof(struct percpu_counter, count));

		if (!bpf_probe_read_kernel(&pages, sizeof(pages), (char *)mm + at) && pages > 0)
			sum += pages;
	}
	return sum;
}

#define SSID(name) SSID_##name
#if IS_ENABLED(CONFIG_CGROUP_CPUACCT)
#define SSID_cpuacct cpuacct_cgrp_id
#else
#define SSID_cpuacct -1
#endif
#if IS_ENABLED(CONFIG_CGROUP_SCHED)
#define SSID_cpu cpu_cgrp_id
#else
#define SSID_cpu -1
#endif
#if IS_ENABLED(CONFIG_CPUSETS)
#define SSID_cpuset cpuset_cgrp_id
#else
#define SSID_cpuset -1
#endif
#if IS_ENABLED(CONFIG_MEMCG)
#define SSID_memory memory_cgrp_id
#else
#define SSID_memory -1
#endif
#if IS_ENABLED(CONFIG_CGROUP_DEVICE)
#define SSID_devices devices_cgrp_id
#else
#define SSID_devices -1
#endif
#if IS_ENABLED(CONFIG_CGROUP_FREEZER)
#define SSID_freezer freezer_cgrp_id
#else
#define SSID_freezer -1
#endif
#if IS_ENABLED(CONFIG_CGROUP_PIDS)
#define SSID_pids pids_cgrp_id
#else
#define SSID_pids -1
#endif
#if IS_ENABLED(CONFIG_BLK_CGROUP)
#define SSID_io io_cgrp_id
#else
#define SSID_io -1
#endif

struct mnt_namespace {
#ifdef MOUNT_NAMESPACE_COUNTED /* told by the loader */
	atomic_t count;
#endif
	struct ns_common ns;
};

#define bpf_core_field_exists(field) 1
#define bpf_core_field_offset(type, field) offsetof(type, field)

#endif
