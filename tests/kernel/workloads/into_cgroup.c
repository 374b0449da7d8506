/* into_cgroup FOLDER N US: N children by clone3(CLONE_INTO_CGROUP) into the cgroup v2 FOLDER. */
#include "workload.h"
#include <linux/sched.h>

int main(int argc, char **argv)
{
	long n = number(argc, argv, 2, 50), us = number(argc, argv, 3, 1000);
	int fd;

	if (argc < 2)
		return 2;
	fd = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		die(argv[1]);
	for (long i = 0; i < n; i++) {
		struct clone_args arguments = {
			.flags = CLONE_INTO_CGROUP,
			.exit_signal = SIGCHLD,
			.cgroup = (uint64_t)fd,
		};
		long pid = syscall(SYS_clone3, &arguments, sizeof(arguments));

		if (pid < 0)
			die("clone3 into a cgroup");
		if (!pid) {
			/* A process there may have children of its own. */
			if (i % 5 == 0) {
				pid_t child = fork_or_die();

				burn_us(us);
				if (child)
					reap(child);
				_exit(0);
			}
			burn_us(us);
			_exit(0);
		}
		reap(pid);
	}
	truth("cloned", n);
	truth("cloned_forks", (n + 4) / 5);
	return 0;
}
