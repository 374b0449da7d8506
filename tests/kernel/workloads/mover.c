/* mover IN OUT PID N PAUSE_US: write PID to the files OUT and IN in turn, N times each; ends inside.
 * A PID of 0 in `tasks` files: every thread of the process in $MOVE_THREADS_OF, one by one.
 */
#include "workload.h"
#include <dirent.h>

static void put(const char *file, long id)
{
	char text[32];
	int fd = open(file, O_WRONLY | O_CLOEXEC), length = snprintf(text, sizeof(text), "%ld", id);

	if (fd < 0 || write(fd, text, length) != length)
		die(file);
	close(fd);
}

int main(int argc, char **argv)
{
	long pid, n, pause_us, threads[256], count = 0;
	const char *single = getenv("MOVE_THREADS_OF");

	struct sched_param first = { .sched_priority = 1 };

	if (argc < 6)
		return 2;
	/* Between a move and the event that tells of it nobody takes this CPU. */
	sched_setscheduler(0, SCHED_FIFO, &first);
	pid = strtol(argv[3], NULL, 10);
	n = strtol(argv[4], NULL, 10);
	pause_us = strtol(argv[5], NULL, 10);
	if (single) {
		char path[64];
		struct dirent *entry;
		DIR *folder;

		snprintf(path, sizeof(path), "/proc/%s/task", single);
		folder = opendir(path);
		if (!folder)
			die(path);
		while ((entry = readdir(folder)) && count < 256)
			if (entry->d_name[0] != '.')
				threads[count++] = strtol(entry->d_name, NULL, 10);
		closedir(folder);
	} else {
		threads[count++] = pid;
	}
	for (long i = 0; i < n; i++) {
		for (long t = 0; t < count; t++)
			put(argv[2], threads[t]);
		usleep(pause_us);
		for (long t = 0; t < count; t++)
			put(argv[1], threads[t]);
		usleep(pause_us);
	}
	return 0;
}
