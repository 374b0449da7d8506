// SPDX-License-Identifier: Apache-2.0
// Preloaded into slurmd where the host mounts cgroup v1 controllers beside the v2 tree:
// /proc/<pid>/cgroup then has one line per hierarchy, and Slurm's cgroup/v2 plugin takes
// only the first. Readers of that file get a copy with nothing but the v2 line.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef int open_fn(const char *path, int flags, ...);

static bool is_membership_file(const char *path)
{
	size_t length = strlen(path);

	return strncmp(path, "/proc/", 6) == 0 && length > 13 &&
	       strcmp(path + length - 7, "/cgroup") == 0;
}

static int copy_of_v2_line(open_fn *real_open, const char *path)
{
	char text[8192];
	int source = real_open(path, O_RDONLY | O_CLOEXEC);

	if (source < 0)
		return source;
	ssize_t size = read(source, text, sizeof(text) - 1);
	close(source);
	int copy = memfd_create("cgroup", MFD_CLOEXEC);
	if (copy < 0 || size < 0)
		return copy;
	text[size] = '\0';
	for (char *line = text, *end; (end = strchr(line, '\n')); line = end + 1) {
		if (strncmp(line, "0::", 3))
			continue;
		if (write(copy, line, end + 1 - line) < 0)
			break;
	}
	lseek(copy, 0, SEEK_SET);
	return copy;
}

static int intercept(const char *name, const char *path, int flags, mode_t mode)
{
	open_fn *real_open = (open_fn *)dlsym(RTLD_NEXT, name);

	return is_membership_file(path) ? copy_of_v2_line(real_open, path)
					: real_open(path, flags, mode);
}

#define DEFINE_OPEN(name)                                        \
	int name(const char *path, int flags, ...)               \
	{                                                        \
		va_list arguments;                               \
		va_start(arguments, flags);                      \
		mode_t mode = va_arg(arguments, mode_t);         \
		va_end(arguments);                               \
		return intercept(#name, path, flags, mode);      \
	}

DEFINE_OPEN(open)
DEFINE_OPEN(open64)
