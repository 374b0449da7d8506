/* pingpong N: N round trips over two pipes between two processes on the last CPU. */
#include "workload.h"

int main(int argc, char **argv)
{
	long n = number(argc, argv, 1, 100000);
	int there[2], back[2];
	char byte = 0;
	cpu_set_t cpus;
	int64_t began;
	pid_t pid;

	CPU_ZERO(&cpus);
	CPU_SET(sysconf(_SC_NPROCESSORS_ONLN) - 1, &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus) || pipe(there) || pipe(back))
		die("pingpong");
	pid = fork_or_die();
	if (!pid) {
		close(there[1]);
		while (read(there[0], &byte, 1) == 1)
			if (write(back[1], &byte, 1) != 1)
				die("write");
		_exit(0);
	}
	close(there[0]);
	began = clock_ns(CLOCK_MONOTONIC);
	for (long i = 0; i < n; i++)
		if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
			die("round trip");
	truth("elapsed_ns", clock_ns(CLOCK_MONOTONIC) - began);
	close(there[1]);
	reap(pid);
	truth("forks", 1);
	truth("exits", 1);
	return 0;
}
