/* detached N US: N detached threads, at most 50 at once. */
#include "workload.h"

static long running;

static void *body(void *us)
{
	burn_us((long)us);
	__atomic_sub_fetch(&running, 1, __ATOMIC_SEQ_CST);
	return NULL;
}

int main(int argc, char **argv)
{
	long n = number(argc, argv, 1, 1000), us = number(argc, argv, 2, 50);
	pthread_t thread;

	for (long i = 0; i < n; i++) {
		while (__atomic_add_fetch(&running, 0, __ATOMIC_SEQ_CST) >= 50)
			usleep(200);
		__atomic_add_fetch(&running, 1, __ATOMIC_SEQ_CST);
		thread_or_die(&thread, 1, body, (void *)us);
	}
	while (__atomic_add_fetch(&running, 0, __ATOMIC_SEQ_CST))
		usleep(200);
	truth("forks", 0);
	return 0;
}
