/* pid_again N US: N children one after another that all have the same PID. */
#include "workload.h"
#include <linux/sched.h>

int main(int argc, char **argv)
{
	long n = number(argc, argv, 1, 100), us = number(argc, argv, 2, 500), made = 0;
	pid_t first = fork_or_die();

	if (!first)
		_exit(0);
	reap(first);
	made++;
	for (long tries = 0; made < n; tries++) {
		struct clone_args arguments = {
			.exit_signal = SIGCHLD,
			.set_tid = (uint64_t)(uintptr_t)&first,
			.set_tid_size = 1,
		};
		long pid = syscall(SYS_clone3, &arguments, sizeof(arguments));

		if (pid == 0) {
			if (made % 2) {
				pthread_t thread;

				thread_or_die(&thread, 0, burn_thread, (void *)us);
				pthread_join(thread, NULL);
			}
			burn_us(us);
			_exit(0);
		}
		if (pid > 0) {
			if (pid != first)
				_exit(98);
			reap(pid);
			made++;
		} else if (errno != EEXIST || tries > 100 * n) {
			die("clone3 with set_tid");
		}
	}
	truth("forks", made);
	truth("exits", made);
	truth("reused", made - 1);
	return 0;
}
