/* zombies N US HOLD: N children die and stay zombies. With HOLD 1 it says `ready` and waits
 * to be killed with its zombies; with 0 it works for a while, and leaves them to init.
 */
#include "workload.h"

int main(int argc, char **argv)
{
	long n = number(argc, argv, 1, 30), us = number(argc, argv, 2, 2000);
	long hold = number(argc, argv, 3, 0);

	for (long i = 0; i < n; i++) {
		siginfo_t info;
		pid_t pid = fork_or_die();

		if (!pid) {
			pthread_t thread;

			if (i % 2)
				thread_or_die(&thread, 0, burn_thread, (void *)us);
			burn_us(us);
			_exit(0);
		}
		if (waitid(P_PID, pid, &info, WEXITED | WNOWAIT))
			die("waitid");
	}
	truth("forks", n);
	truth("exits", n);
	burn_us(us);
	if (hold) {
		truth("ready", 1);
		for (;;)
			pause();
	}
	return 0;
}
