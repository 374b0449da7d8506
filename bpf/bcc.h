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
#undef container

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

#define MAP(name) ((void *)bpf_pseudo_fd(1, MAP_##name))
#define OPTION(type, name, preset)

#define PROGRAM(name, tracepoint)                           \
	__attribute__((section(".bpf.fn." #name), used)) \
	int name(struct bpf_raw_tracepoint_args *ctx)

#define READ(pointer, field)                                                                 \
	({                                                                                   \
		typeof(pointer) _from = (pointer);                                           \
		typeof(_from->field) _value;                                                 \
		if (bpf_probe_read_kernel((void *)&_value, sizeof(_value),                   \
					  (const void *)&_from->field))                      \
			__builtin_memset((void *)&_value, 0, sizeof(_value));                \
		_value;                                                                      \
	})

#define bpf_core_field_offset(type, field) offsetof(type, field)

#endif
