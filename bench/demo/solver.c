/* solver THREADS STEPS: heat on a square plate by Jacobi's method, rows shared out to threads. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#define SIZE 1600

static double plates[2][SIZE][SIZE];
static long threads, steps;
static pthread_barrier_t barrier;

static void *work(void *argument)
{
	long self = (long)argument;
	long first = 1 + (SIZE - 2) * self / threads, last = 1 + (SIZE - 2) * (self + 1) / threads;

	for (long step = 0; step < steps; step++) {
		double(*from)[SIZE] = plates[step % 2], (*to)[SIZE] = plates[(step + 1) % 2];

		for (long y = first; y < last; y++)
			for (long x = 1; x < SIZE - 1; x++)
				to[y][x] = 0.25 * (from[y - 1][x] + from[y + 1][x] + from[y][x - 1] +
						   from[y][x + 1]);
		pthread_barrier_wait(&barrier);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t thread[64];
	double sum = 0;

	threads = argc > 1 ? atol(argv[1]) : 2;
	steps = argc > 2 ? atol(argv[2]) : 500;
	if (threads < 1 || threads > 64)
		return 2;
	for (long x = 0; x < SIZE; x++)
		plates[0][0][x] = plates[1][0][x] = 100.0;
	pthread_barrier_init(&barrier, NULL, threads);
	for (long i = 1; i < threads; i++)
		if (pthread_create(&thread[i], NULL, work, (void *)i))
			return 1;
	work((void *)0);
	for (long i = 1; i < threads; i++)
		pthread_join(thread[i], NULL);
	for (long x = 0; x < SIZE; x++)
		sum += plates[steps % 2][10][x];
	printf("row 10: %.6f\n", sum / SIZE);
	return 0;
}
