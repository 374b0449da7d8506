/* spawn N COMMAND…: N children by posix_spawn and N by vfork. */
#include "workload.h"
#include <spawn.h>

int main(int argc, char **argv)
{
	const long n = number(argc, argv, 1, 100);

	if (argc < 3)
		return 2;
	for (volatile long i = 0; i < n; i++) {
		pid_t pid;

		if ((errno = posix_spawn(&pid, argv[2], NULL, NULL, argv + 2, environ)))
			die("posix_spawn");
		reap(pid);
		pid = vfork();
		if (pid < 0)
			die("vfork");
		if (!pid) {
			execve(argv[2], argv + 2, environ);
			_exit(99);
		}
		reap(pid);
	}
	truth("forks", 2 * n);
	truth("execs", 2 * n);
	truth("exits", 2 * n);
	return 0;
}
