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

/* Fill path, length and flags of `name` for the file of `task`; flags may hold some already. */
static __always_inline void resolve(struct sams_name *name, struct task_struct *task)
{
	struct mm_struct *mm = READ(task, mm);
	struct file *file = mm ? READ(mm, exe_file) : 0;
	struct vfsmount *vfsmount;
	struct dentry *dentry;
	struct mount *mount;
	int i;

	name->length = 0;
	if (!file) {
		name->flags |= SAMS_UNKNOWN;
		return;
	}
	dentry = READ(file, f_path.dentry);
	vfsmount = READ(file, f_path.mnt);
	mount = container(vfsmount, struct mount, mnt);
	/* hlist_bl_unhashed(): the name has gone from its folder */
	if (!READ(dentry, d_hash.pprev) && READ(dentry, d_parent) != dentry)
		name->flags |= SAMS_DELETED;

	for (i = 0; i < SAMS_DEPTH; i++) {
		struct dentry *parent = READ(dentry, d_parent);
		const unsigned char *text;
		u32 length, at;

		if (dentry == READ(mount, mnt.mnt_root)) {
			struct mount *above = READ(mount, mnt_parent);

			if (above != mount) {
				dentry = READ(mount, mnt_mountpoint);
				mount = above;
				continue;
			}
			if (dentry == parent)
				return;
		}
		length = READ(dentry, d_name.len);
		text = READ(dentry, d_name.name);
		/* The position is kept in the row: the verifier then sees every round alike. */
		at = SAMS_PATH_MAX - *(volatile u32 *)&name->length;
		if (length > SAMS_NAME || length + 1 > at)
			break;
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
		if (dentry == parent)
			return; /* of a file system that is mounted nowhere: memfd and the like */
		dentry = parent;
	}
	name->flags |= SAMS_CUT;
}
#endif
