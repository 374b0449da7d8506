/* killed N THREADS: N children with THREADS threads each, ended by SIGKILL at work. */
#include "workload.h"

static void *forever(void *unused)
{
	for (;;)
		burn_us(1000);
	return unused;
}

int main(int argc, char **argv)
{
	long n = number(argc, argv, 1, 20), threads = number(argc, argv, 2, 4);

	for (long i = 0; i < n; i++) {
		pid_t pid = fork_or_die();

		if (!pid) {
			pthread_t thread;

			for (long t = 1; t < threads; t++)
				thread_or_die(&thread, 0, forever, NULL);
			if (i % 3 == 2)
				pthread_exit(NULL);
			forever(NULL);
		}
		usleep(3000 + 977 * i % 9000);
		if (kill(pid, SIGKILL))
			die("kill");
		reap(pid);
	}
	truth("forks", n);
	truth("exits", n);
	return 0;
}
