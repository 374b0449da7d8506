/* forks N US: N children without exec, each burning and forking one child of its own. */
#include "workload.h"

int main(int argc, char **argv)
{
	long n = number(argc, argv, 1, 20), us = number(argc, argv, 2, 2000);

	for (long i = 0; i < n; i++) {
		pid_t pid = fork_or_die();

		if (!pid) {
			pid_t second = fork_or_die();

			burn_us(us);
			if (second)
				reap(second);
			_exit(0);
		}
		reap(pid);
	}
	truth("forks", 2 * n);
	truth("exits", 2 * n);
	return 0;
}
