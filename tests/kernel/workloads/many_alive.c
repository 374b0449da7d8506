/* many_alive FOLDER EXECUTABLES LIVE BURN: EXECUTABLES copies of BURN have run once, and LIVE
 * processes of them stay, each using a little CPU every 100 ms, until $STOP exists.
 */
#include "workload.h"
#include <sys/sendfile.h>

int main(int argc, char **argv)
{
	long n = number(argc, argv, 2, 200), live = number(argc, argv, 3, 100);
	const char *stop = getenv("STOP");
	char path[PATH_MAX];
	struct stat about;
	int from;

	if (argc == 2) { /* one of the live */
		while (access(argv[1], F_OK)) {
			burn_us(100);
			usleep(100000);
		}
		return 0;
	}
	if (argc < 5 || !stop)
		return 2;
	from = open(argv[4], O_RDONLY | O_CLOEXEC);
	if (from < 0 || fstat(from, &about))
		die(argv[4]);
	for (long i = 0; i < n; i++) {
		char *once[] = { path, "100", NULL };
		off_t offset = 0;
		pid_t pid;
		int to;

		snprintf(path, sizeof(path), "%s/name-%06ld", argv[1], i);
		to = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
		if (to < 0 || sendfile(to, from, &offset, about.st_size) != about.st_size)
			die(path);
		close(to);
		pid = fork_or_die();
		if (!pid) {
			execv(path, once);
			die(path);
		}
		reap(pid);
	}
	for (long i = 0; i < live; i++)
		if (!fork_or_die()) {
			char *stay[] = { "many_alive", (char *)stop, NULL };

			execv("/proc/self/exe", stay);
			die("/proc/self/exe");
		}
	truth("ready", 1);
	for (long i = 0; i < live; i++)
		wait(NULL);
	return 0;
}
