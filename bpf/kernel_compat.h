/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * Everything that differs between kernels and between loaders, by feature and never by
 * version. The programs read kernel memory, name maps and declare themselves through
 * these macros alone.
 */
#ifndef SAMS_KERNEL_COMPAT_H
#define SAMS_KERNEL_COMPAT_H

#ifdef SAMS_BCC
#include "bcc.h"
#include "record.h"
#else
#include "kernel_types.h"
#include "record.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#define MAP(name)		   (&(name))
#define OPTION(type, name, preset) const volatile type name = preset

/* READ(pointer, field.of.it): one probe read; the value is 0 where it cannot be read. */
#define READ(pointer, field)                                                                 \
	({                                                                                   \
		typeof(pointer) _from = (pointer);                                           \
		typeof(_from->field) _value;                                                 \
		bpf_core_read(&_value, sizeof(_value), &_from->field);                       \
		_value;                                                                      \
	})

/*
 * PROGRAM(name, "tracepoint") { … ARG(0) … }
 *
 * The arguments of a tracepoint come with their types, and the verifier lets programs load
 * through such a pointer and all that is reached from it, at the price of one instruction:
 * LOAD(TYPED, …). Pointers made from numbers (keys, container()) have no type and are read
 * by the helper: LOAD(BARE, …). Typed or not, what cannot be read is 0.
 */
#ifndef NO_TYPED_POINTERS
#define PROGRAM(name, tracepoint) \
	SEC("tp_btf/" tracepoint) \
	int name(u64 *ctx)
#define ARG(n)			     (ctx[n])
#define CURRENT()		     bpf_get_current_task_btf()

/* An argument as a number, to be reckoned with. */
#define NUMBER(n)                                                    \
	({                                                           \
		u64 _number;                                         \
		bpf_probe_read_kernel(&_number, sizeof(_number), &ctx[n]); \
		_number;                                             \
	})
#define LOAD(typing, pointer, field) ((typing) == TYPED ? (pointer)->field : READ(pointer, field))
#endif

#define TASK_DEAD     0x80
#define PF_EXITING    0x4
#endif

enum typing { BARE, TYPED };

#ifdef NO_TYPED_POINTERS
#ifndef SAMS_BCC
#define PROGRAM(name, tracepoint) \
	SEC("raw_tp/" tracepoint) \
	int name(struct bpf_raw_tracepoint_args *ctx)
#endif
#define ARG(n)			     (ctx->args[n])
#define CURRENT()		     ((struct task_struct *)bpf_get_current_task())
#define NUMBER(n)		     ARG(n)
#define LOAD(typing, pointer, field) ((void)(typing), READ(pointer, field))
#endif

#define container(pointer, type, member) \
	((type *)((char *)(pointer) - bpf_core_field_offset(type, member)))

#ifndef SAMS_BCC
static __always_inline u32 task_state(struct task_struct *task, enum typing how)
{
	struct task_struct___before_5_14 *old = (void *)task;

	if (bpf_core_field_exists(task->__state))
		return LOAD(how, task, __state);
	return LOAD(how, old, state);
}

static __always_inline u64 mm_rss_pages(struct mm_struct *mm)
{
	struct mm_struct___before_6_2 *old = (void *)mm;
	s64 file, anon, shmem;

	/* MM_FILEPAGES 0, MM_ANONPAGES 1, MM_SWAPENTS 2, MM_SHMEMPAGES 3 */
	if (bpf_core_type_exists(struct mm_rss_stat___before_6_2)) {
		file = READ(old, rss_stat.count[0].counter);
		anon = READ(old, rss_stat.count[1].counter);
		shmem = READ(old, rss_stat.count[3].counter);
	} else {
		file = READ(mm, rss_stat[0].count);
		anon = READ(mm, rss_stat[1].count);
		shmem = READ(mm, rss_stat[3].count);
	}
	if (file < 0)
		file = 0;
	if (anon < 0)
		anon = 0;
	if (shmem < 0)
		shmem = 0;
	return file + anon + shmem;
}

static __always_inline struct rq *run_queue(struct task_struct *task)
{
	struct cfs_rq *cfs_rq = 0;

	if (!bpf_core_field_exists(task->se.cfs_rq) || !bpf_core_field_exists(cfs_rq->rq))
		return 0;
	cfs_rq = LOAD(TYPED, task, se.cfs_rq);
	return cfs_rq ? LOAD(TYPED, cfs_rq, rq) : 0;
}
#endif

static __always_inline u32 mount_namespace(struct task_struct *task, enum typing how)
{
	struct nsproxy *proxy = LOAD(how, task, nsproxy);
	struct mnt_namespace *namespace = proxy ? LOAD(how, proxy, mnt_ns) : 0;

	return namespace ? LOAD(how, namespace, ns.inum) : 0;
}

/* `id` replaced `union kernfs_node_id`, whose u64 stood at the same place and name, in 67c0496e87d1
 * ("kernfs: convert kernfs_node->id from union kernfs_node_id to u64") (in v5.5). */
static __always_inline u64 cgroup_kernfs_id(struct cgroup *cgroup, enum typing how)
{
	struct kernfs_node *node = LOAD(how, cgroup, kn);

	return node ? LOAD(how, node, id) : 0;
}

/* Place of a v1 controller in css_set.subsys, negative for the v2 tree and for a controller
 * that this kernel was built without. */
#ifndef SAMS_BCC
#define SSID(name)                                                                  \
	(bpf_core_enum_value_exists(enum cgroup_subsys_id, name##_cgrp_id) ?        \
		 (int)bpf_core_enum_value(enum cgroup_subsys_id, name##_cgrp_id) : \
		 -1)
#endif

static __always_inline int ssid_of(u32 controller)
{
	switch (controller) {
	case SAMS_CPUACCT:
		return SSID(cpuacct);
	case SAMS_CPU_CONTROLLER:
		return SSID(cpu);
	case SAMS_CPUSET:
		return SSID(cpuset);
	case SAMS_MEMORY:
		return SSID(memory);
	case SAMS_DEVICES:
		return SSID(devices);
	case SAMS_FREEZER:
		return SSID(freezer);
	case SAMS_PIDS:
		return SSID(pids);
	case SAMS_BLKIO:
		return SSID(io);
	default:
		return -1;
	}
}

/* Number of the task's cgroup in the tree of `controller`, 0 if it has none. */
static __always_inline u64 task_cgroup_id(struct task_struct *task, u32 controller)
{
	struct css_set *set = LOAD(TYPED, task, cgroups);
	struct cgroup_subsys_state *css = 0;
	struct cgroup *cgroup;
	int ssid;

	if (!set)
		return 0;
	if (controller == SAMS_V2) {
		cgroup = LOAD(TYPED, set, dfl_cgrp);
		return cgroup ? cgroup_kernfs_id(cgroup, TYPED) : 0;
	}
	ssid = ssid_of(controller);
	if (ssid < 0)
		return 0;
	bpf_probe_read_kernel(&css, sizeof(css),
			      (char *)set + bpf_core_field_offset(struct css_set, subsys) +
				      (ssid & 15) * sizeof(css));
	cgroup = css ? READ(css, cgroup) : 0;
	return cgroup ? cgroup_kernfs_id(cgroup, BARE) : 0;
}

/*
 * SUBPROGRAM name(…): a function that the verifier checks once and not at every call, which
 * keeps the loading short. Arguments that point to memory came with e5069b9c23b3 ("bpf:
 * Support pointers in global func args") (in v5.12).
 */
#ifdef NO_TYPED_POINTERS
#define SUBPROGRAM static __always_inline int
#else
#define SUBPROGRAM __attribute__((noinline)) int
#endif

/* The same where all arguments are numbers: 51c39bb1d5d1 ("bpf: Introduce function-by-function
 * verification") (in v5.6). BCC has no such functions. */
#ifdef SAMS_BCC
#define SEPARATE static __always_inline int
#else
#define SEPARATE __attribute__((noinline)) int
#endif

/*
 * REPEAT(times, step, state): step(i, &state) until it says 1. bpf_loop() came with
 * e6f2dd0f8067 ("bpf: Add bpf_loop helper") (in v5.17); without it only short walks pass
 * the verifier.
 */
#ifdef NO_BPF_LOOP
#ifdef SAMS_BCC
#define SAMS_GROUP_THREADS 10 /* 5.10's verifier gives up somewhere above */
#else
#define SAMS_GROUP_THREADS 64
#endif
#define STEP		   static __always_inline long
#define REPEAT(times, step, state)                 \
	for (u32 _i = 0; _i < (times); _i++) {     \
		if (step(_i, &(state)))            \
			break;                     \
	}
#else
#define SAMS_GROUP_THREADS (1 << 16)
#define STEP		   static long
#define REPEAT(times, step, state) bpf_loop(times, step, &(state), 0)
#endif

/*
 * Replace *place by `now` if it still is `seen`; says whether it did. Two settlings of
 * one task (the harvest's and the task's own) then never both charge the same time.
 * Fetching atomics came with 5ffa25502b5a ("bpf: Add instructions for atomic_[cmp]xchg")
 * (in v5.12); before it the harvest may meet a task's own settling within some 100 ns.
 */
static __always_inline int replace(u64 *place, u64 seen, u64 now)
{
#ifdef NO_FETCHING_ATOMICS
	(void)seen;
	*(volatile u64 *)place = now;
	return 1;
#else
	return __sync_val_compare_and_swap(place, seen, now) == seen;
#endif
}

#endif
