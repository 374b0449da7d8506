/* lives N COMMAND…: N times fork, exec, wait; says how long all took (`elapsed_ns`). */
#include "workload.h"

int main(int argc, char **argv)
{
	long n = number(argc, argv, 1, 1000);
	int64_t began = clock_ns(CLOCK_MONOTONIC);

	if (argc < 3)
		return 2;
	for (long i = 0; i < n; i++) {
		pid_t pid = fork_or_die();

		if (!pid) {
			execv(argv[2], argv + 2);
			die(argv[2]);
		}
		reap(pid);
	}
	truth("elapsed_ns", clock_ns(CLOCK_MONOTONIC) - began);
	truth("forks", n);
	truth("execs", n);
	truth("exits", n);
	return 0;
}
