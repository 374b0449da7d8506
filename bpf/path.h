/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * The path of an executable, by a bounded walk from its dentry up, across mounts.
 * The path is built from the end of `path` backwards: a cut one keeps its end.
 */
#ifndef SAMS_PATH_H
#define SAMS_PATH_H

#include "maps.h"

_Static_assert(__builtin_offsetof(struct sams_name, script) ==
		       __builtin_offsetof(struct sams_name, path) + SAMS_PATH_MAX,
	       "script has to follow path: see resolve()");

#define SAMS_DEPTH 64 /* components and mounts walked */
#define SAMS_NAME  255

static __always_inline int starts_with_memfd(const char *name)
{
	return name[0] == 'm' && name[1] == 'e' && name[2] == 'm' && name[3] == 'f' &&
	       name[4] == 'd' && name[5] == ':';
}

/* One step of resolve(): the name of `dentry` in front of the path, then its folder. */
struct climb {
	struct sams_name *name;
	struct dentry *dentry;
	struct mount *mount;
	u32 whole; /* the path is complete */
};

STEP climb_next(u32 i __attribute__((unused)), struct climb *climb)
{
	struct sams_name *name = climb->name;
	struct dentry *dentry = climb->dentry, *parent = READ(dentry, d_parent);
	const unsigned char *text;
	u64 length;
	u32 at;

	if (dentry == READ(climb->mount, mnt.mnt_root)) {
		struct mount *above = READ(climb->mount, mnt_parent);

		if (above != climb->mount) {
			climb->dentry = READ(climb->mount, mnt_mountpoint);
			climb->mount = above;
			return 0;
		}
		if (dentry == parent) {
			climb->whole = 1;
			return 1;
		}
	}
	length = READ(dentry, d_name.len);
	text = READ(dentry, d_name.name);
	/* The position is kept in the row: the verifier then sees every round alike. */
	at = SAMS_PATH_MAX - *(volatile u32 *)&name->length;
	if (length > SAMS_NAME || length + 1 > at)
		return 1;
	barrier_var(length);
	length &= SAMS_NAME; /* all bits set: for the verifier, where the test above was lost */
	at -= length;
	barrier_var(at);
	/* at + length is within `path`; what the verifier sees is that it is within the
	 * row, since `script` follows and is no shorter than the longest name. */
	bpf_probe_read_kernel(name->path + (at & (SAMS_PATH_MAX - 1)), length, text);
	if (dentry == parent && starts_with_memfd(name->path + (at & (SAMS_PATH_MAX - 1))))
		name->flags |= SAMS_MEMFD;
	at -= 1;
	barrier_var(at);
	name->path[at & (SAMS_PATH_MAX - 1)] = '/';
	*(volatile u32 *)&name->length = SAMS_PATH_MAX - at;
	climb->dentry = parent;
	/* A file system that is mounted nowhere: memfd and the like. */
	climb->whole = dentry == parent;
	return climb->whole;
}

/* Fill path, length and flags of `name` for the file of `task`; flags may hold some already. */
static __always_inline void resolve(struct sams_name *name, struct task_struct *task)
{
	struct mm_struct *mm = READ(task, mm);
	struct file *file = mm ? READ(mm, exe_file) : 0;
	struct climb climb = {.name = name};

	name->length = 0;
	if (!file) {
		name->flags |= SAMS_UNKNOWN;
		return;
	}
	climb.dentry = READ(file, f_path.dentry);
	climb.mount = container(READ(file, f_path.mnt), struct mount, mnt);
	/* hlist_bl_unhashed(): the name has gone from its folder */
	if (!READ(climb.dentry, d_hash.pprev) && READ(climb.dentry, d_parent) != climb.dentry)
		name->flags |= SAMS_DELETED;
	REPEAT(SAMS_DEPTH, climb_next, climb);
	if (!climb.whole)
		name->flags |= SAMS_CUT;
}
#endif
