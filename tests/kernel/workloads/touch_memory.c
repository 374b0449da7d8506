/* touch_memory MB: a child touches MB megabytes and exits: its teardown costs CPU too. */
#include "workload.h"
#include <sys/mman.h>

int main(int argc, char **argv)
{
	size_t size = (size_t)number(argc, argv, 1, 1000) << 20;
	pid_t pid = fork_or_die();

	if (!pid) {
		char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (memory == MAP_FAILED)
			die("mmap");
		madvise(memory, size, MADV_NOHUGEPAGE);
		for (size_t at = 0; at < size; at += 4096)
			memory[at] = 1;
		_exit(0);
	}
	reap(pid);
	truth("forks", 1);
	truth("exits", 1);
	return 0;
}
