/* Two stages of one process: `prepare NEXT` works and then becomes NEXT; `simulate` works longer. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static void work(double seconds)
{
	volatile unsigned long state = 1;
	clock_t end = clock() + (clock_t)(seconds * CLOCKS_PER_SEC);

	while (clock() < end)
		for (int i = 0; i < 100000; i++)
			state = state * 6364136223846793005ul + 1442695040888963407ul;
}

int main(int argc, char **argv)
{
#ifdef PREPARE
	if (argc < 2)
		return 2;
	work(3);
	execv(argv[1], argv + 1);
	perror(argv[1]);
	return 1;
#else
	(void)argc;
	(void)argv;
	work(5);
	return 0;
#endif
}
