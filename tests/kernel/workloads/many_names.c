/* many_names FOLDER N BURN US: N copies of BURN under N names, each run once. */
#include "workload.h"
#include <sys/sendfile.h>

int main(int argc, char **argv)
{
	long n = number(argc, argv, 2, 100);
	char path[PATH_MAX], *us = argc > 4 ? argv[4] : "200";
	struct stat about;
	int from;

	if (argc < 4)
		return 2;
	from = open(argv[3], O_RDONLY | O_CLOEXEC);
	if (from < 0 || fstat(from, &about))
		die(argv[3]);
	for (long i = 0; i < n; i++) {
		off_t offset = 0;
		pid_t pid;
		int to;

		snprintf(path, sizeof(path), "%s/name-%06ld", argv[1], i);
		to = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
		if (to < 0 || sendfile(to, from, &offset, about.st_size) != about.st_size)
			die(path);
		close(to);
		pid = fork_or_die();
		if (!pid) {
			char *next[] = { path, us, NULL };

			execv(path, next);
			die(path);
		}
		reap(pid);
		unlink(path);
	}
	truth("forks", n);
	truth("execs", n);
	truth("exits", n);
	return 0;
}
