/* waiter THREADS [CLOCKS]: THREADS threads work until the file $STOP exists; with CLOCKS 1 they
 * read their clock every few microseconds, which brings the kernel's counters up to date.
 */
#include "workload.h"

static volatile int stop;

static void *body(void *clocks)
{
	volatile unsigned int work = 1;

	while (clocks && !stop)
		burn_us(1000);
	/* No system call: the kernel brings its counters up to date at ticks and switches only. */
	while (!stop)
		for (int i = 0; i < 10000; i++)
			work = work * 1103515245u + 12345u;
	return NULL;
}

int main(int argc, char **argv)
{
	long threads = number(argc, argv, 1, 1);
	const char *file = getenv("STOP");
	pthread_t thread[64];

	if (!file || threads > 64)
		return 2;
	for (long i = 0; i < threads; i++)
		thread_or_die(&thread[i], 0, body, (void *)number(argc, argv, 2, 0));
	truth("ready", 1);
	while (access(file, F_OK))
		usleep(2000);
	stop = 1;
	for (long i = 0; i < threads; i++)
		pthread_join(thread[i], NULL);
	return 0;
}
