/* thread_exec N US BURN: N children; in each a thread that is not the leader execs BURN. */
#include "workload.h"

static char *target;
static char us_text[32];

static void *exec_body(void *us)
{
	char *argv[] = { target, us_text, NULL };

	burn_us((long)us);
	execv(target, argv);
	die(target);
}

static void *forever(void *unused)
{
	for (;;)
		burn_us(1000);
	return unused;
}

int main(int argc, char **argv)
{
	long n = number(argc, argv, 1, 20), us = number(argc, argv, 2, 2000);

	if (argc < 4)
		return 2;
	target = argv[3];
	snprintf(us_text, sizeof(us_text), "%ld", us);
	for (long i = 0; i < n; i++) {
		pid_t pid = fork_or_die();

		if (!pid) {
			pthread_t thread;

			thread_or_die(&thread, 0, forever, NULL);
			thread_or_die(&thread, 0, exec_body, (void *)us);
			thread_or_die(&thread, 0, forever, NULL);
			if (i % 2)
				pthread_exit(NULL); /* the leader is a zombie when the exec comes */
			forever(NULL);
		}
		reap(pid);
	}
	truth("forks", n);
	truth("execs", n);
	truth("exits", n);
	return 0;
}
