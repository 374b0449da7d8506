/* burn [US [THREADS]]: use US microseconds of CPU in each of THREADS threads, then exit. */
#include "workload.h"

int main(int argc, char **argv)
{
	long us = number(argc, argv, 1, 1000), threads = number(argc, argv, 2, 1);
	pthread_t thread[64];

	for (long i = 1; i < threads; i++)
		thread_or_die(&thread[i], 0, burn_thread, (void *)us);
	burn_us(us);
	for (long i = 1; i < threads; i++)
		pthread_join(thread[i], NULL);
	return 0;
}
