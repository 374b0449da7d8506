/* chain N US: exec itself N times, burning in each image. */
#include "workload.h"

int main(int argc, char **argv)
{
	long n = number(argc, argv, 1, 200), us = number(argc, argv, 2, 200);
	char left[32];
	char *next[] = { argv[0], left, argc > 2 ? argv[2] : "200", NULL };

	burn_us(us);
	if (n <= 0)
		return 0;
	truth("execs", 1);
	snprintf(left, sizeof(left), "%ld", n - 1);
	execv("/proc/self/exe", next);
	die("execv");
}
