/* enter FILE COMMAND…: move itself by writing to a cgroup's `cgroup.procs`, then exec.
 * With `-` for FILE it only execs.
 */
#include "workload.h"

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	if (strcmp(argv[1], "-")) {
		int fd = open(argv[1], O_WRONLY | O_CLOEXEC);

		if (fd < 0)
			die(argv[1]);
		/* Reading its clock brings its counter up to date: hardly anything is pending
		 * that a tick during the move could charge to the wrong cgroup. */
		clock_ns(CLOCK_THREAD_CPUTIME_ID);
		if (write(fd, "0", 1) != 1)
			die(argv[1]);
		close(fd);
	}
	execvp(argv[2], argv + 2);
	die(argv[2]);
}
