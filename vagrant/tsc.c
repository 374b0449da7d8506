/* Prints the frequency of the time stamp counter in kHz. */
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

static double ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC_RAW, &now);
	return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

int main(void)
{
	struct timespec pause = { .tv_nsec = 300000000 };
	double begin = ms();
	unsigned long long ticks = __rdtsc();

	nanosleep(&pause, NULL);
	ticks = __rdtsc() - ticks;
	printf("%.0f\n", ticks / (ms() - begin));
	return 0;
}
