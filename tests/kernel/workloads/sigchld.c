/* sigchld N US: N children under SIGCHLD ignored: the kernel reaps them itself. */
#include "workload.h"

int main(int argc, char **argv)
{
	long n = number(argc, argv, 1, 100), us = number(argc, argv, 2, 1000);

	signal(SIGCHLD, SIG_IGN);
	for (long i = 0; i < n; i++) {
		pid_t pid = fork_or_die();

		if (!pid) {
			burn_us(us);
			_exit(0);
		}
		if (i % 8 == 7)
			while (wait(NULL) > 0)
				;
	}
	while (wait(NULL) > 0)
		;
	truth("forks", n);
	truth("exits", n);
	return 0;
}
