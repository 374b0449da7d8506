/* leader_first THREADS US: the main thread leaves at once, the others work on. */
#include "workload.h"

int main(int argc, char **argv)
{
	long n = number(argc, argv, 1, 16), us = number(argc, argv, 2, 20000);
	pthread_t thread;

	for (long i = 0; i < n; i++)
		thread_or_die(&thread, 1, burn_thread, (void *)(us * (i + 1) / n));
	truth("forks", 0);
	pthread_exit(NULL);
}
