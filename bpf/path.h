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

static __always_inline u64 mix(u64 hash, u64 word)
{
	hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
	return hash ^ (hash >> 32);
}

/* Where the way up from a file stands. */
struct climb {
	struct sams_name *name; /* to put the path together in; 0: only `sum` is wanted */
	struct dentry *dentry;
	struct mount *mount;
	struct dentry *root; /* of `mount` */
	u64 sum;	     /* of the dentries and names met */
	u32 whole;	     /* the path is complete */
	u32 nowhere;	     /* in a file system that is mounted nowhere: memfd and the like */
};

/* What a climb needs of a dentry. The fields have stood together in this order since
 * 26fe575028703 ("vfs: make it possible to access the dentry hash/len as one 64-bit entry")
 * (in v3.10), unless the kernel was built to shuffle its structures. */
struct component {
	struct dentry *parent;
	u32 hash;
	u32 length;
	const unsigned char *text;
};

static __always_inline void read_component(struct dentry *dentry, struct component *to)
{
	u32 parent = bpf_core_field_offset(struct dentry, d_parent);

	if (bpf_core_field_offset(struct dentry, d_name.hash) == parent + 8 &&
	    bpf_core_field_offset(struct dentry, d_name.len) == parent + 12 &&
	    bpf_core_field_offset(struct dentry, d_name.name) == parent + 16) {
		bpf_probe_read_kernel(to, sizeof(*to), (char *)dentry + parent);
		return;
	}
	to->parent = READ(dentry, d_parent);
	to->hash = READ(dentry, d_name.hash);
	to->length = READ(dentry, d_name.len);
	to->text = READ(dentry, d_name.name);
}

/* Put "/text" in front of the path. 1: there is no room. */
static __always_inline int prepend(struct sams_name *name, struct component *component,
				   u32 nowhere)
{
	u64 length = component->length;
	/* The position is kept in the row: the verifier then sees every round alike. */
	u32 at = SAMS_PATH_MAX - *(volatile u32 *)&name->length;

	if (length > SAMS_NAME || length + 1 > at)
		return 1;
	barrier_var(length);
	length &= SAMS_NAME; /* all bits set: for the verifier, where the test above was lost */
	at -= length;
	barrier_var(at);
	/* at + length is within `path`; what the verifier sees is that it is within the
	 * row, since `script` follows and is no shorter than the longest name. */
	bpf_probe_read_kernel(name->path + (at & (SAMS_PATH_MAX - 1)), length, component->text);
	if (nowhere && starts_with_memfd(name->path + (at & (SAMS_PATH_MAX - 1))))
		name->flags |= SAMS_MEMFD;
	at -= 1;
	barrier_var(at);
	name->path[at & (SAMS_PATH_MAX - 1)] = '/';
	*(volatile u32 *)&name->length = SAMS_PATH_MAX - at;
	return 0;
}

/* One step up: over a mount, or over the name of a dentry to its folder. */
STEP climb_next(u32 i __attribute__((unused)), struct climb *climb)
{
	struct dentry *dentry = climb->dentry;
	struct component component = {};
	struct mount *above;

	if (dentry == climb->root) {
		above = READ(climb->mount, mnt_parent);
		if (above != climb->mount) {
			climb->dentry = READ(climb->mount, mnt_mountpoint);
			climb->mount = above;
			climb->root = READ(above, mnt.mnt_root);
			return 0;
		}
	}
	read_component(dentry, &component);
	if (dentry == component.parent) {
		climb->whole = 1;
		if (dentry == climb->root)
			return 1;
		climb->nowhere = 1;
	}
	climb->sum = mix(mix(climb->sum, (u64)dentry),
			 (u64)component.hash << 32 | component.length);
	if (climb->name && prepend(climb->name, &component, climb->nowhere)) {
		climb->whole = 0;
		return 1;
	}
	climb->dentry = component.parent;
	return climb->whole & 1; /* a number that the verifier sees to be 0 or 1 */
}

/* Begin at the file of `task`. Flags of its name, as far as they can be told from here. */
static __always_inline u32 start(struct climb *climb, struct task_struct *task, enum typing how)
{
	struct mm_struct *mm = LOAD(how, task, mm);
	struct file *file = mm ? LOAD(how, mm, exe_file) : 0;
	struct dentry *dentry;
	struct inode *inode;
	struct {
		struct vfsmount *mnt;
		struct dentry *dentry;
	} path = {}; /* struct path, so since 2.6.19 */

	__builtin_memset(climb, 0, sizeof(*climb));
	if (!file)
		return SAMS_UNKNOWN;
	/* As numbers: the verifier does not let typed pointers be reckoned with. */
	bpf_probe_read_kernel(&path, sizeof(path),
			      (char *)file + bpf_core_field_offset(struct file, f_path));
	climb->dentry = path.dentry;
	climb->mount = container(path.mnt, struct mount, mnt);
	climb->root = READ(path.mnt, mnt_root);
	inode = LOAD(how, file, f_inode);
	climb->sum = mix(mix(option_seed, LOAD(how, inode, i_ino)),
			 LOAD(how, inode, i_generation));
	dentry = LOAD(how, file, f_path.dentry);
	/* hlist_bl_unhashed(): the name has gone from its folder */
	if (!LOAD(how, dentry, d_hash.pprev) && LOAD(how, dentry, d_parent) != dentry)
		return SAMS_DELETED;
	return 0;
}

/*
 * A number for the chain of dentries from the file to the top, 0 if there is none. It holds
 * the address, name hash and length of each, and the file's inode number and generation. Two
 * names that are there at the same time differ in an address; for one that comes after
 * another at the same address to be taken for it, 32 bits of hash and as many of the
 * inode's generation would have to be the same by chance. What has no folder has no hash
 * either, so that its text must be looked at.
 */
static __always_inline u64 chain_of(const struct climb *start)
{
#ifdef NO_BPF_LOOP
	(void)start;
	return 0;
#else
	struct climb climb = *start;

	if (!climb.dentry)
		return 0;
	REPEAT(SAMS_DEPTH, climb_next, climb);
	return climb.whole && !climb.nowhere ? climb.sum : 0;
#endif
}

/* Fill path and length of `name`, and what flags the path adds. */
static __always_inline void resolve(struct sams_name *name, struct climb *climb)
{
	name->length = 0;
	if (!climb->dentry)
		return;
	climb->name = name;
	REPEAT(SAMS_DEPTH, climb_next, *climb);
	if (!climb->whole)
		name->flags |= SAMS_CUT;
}
#endif
