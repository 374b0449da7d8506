/* daemons N US: N double-forked daemons that outlive this program. */
#include "workload.h"

int main(int argc, char **argv)
{
	long n = number(argc, argv, 1, 10), us = number(argc, argv, 2, 30000);

	truth("forks", 2 * n);
	truth("exits", 2 * n);
	for (long i = 0; i < n; i++) {
		pid_t pid = fork_or_die();

		if (!pid) {
			if (setsid() < 0)
				die("setsid");
			if (!fork_or_die())
				burn_us(us);
			_exit(0);
		}
		reap(pid);
	}
	return 0;
}
