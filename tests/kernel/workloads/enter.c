/* enter FILE COMMAND…: come into a cgroup by way of its `cgroup.procs`, then exec.
 * With `-` for FILE it only execs.
 *
 * Whoever moves while it runs may be charged a tick between the move and the event that
 * tells of it, which no set-up can see (cases.py: `moves`); under an emulator on a busy host
 * that is one entry in ten. One that sleeps meanwhile has nothing to be charged: a child writes
 * once this process sleeps, waiting for it. (Of a vfork() it would wait uninterruptibly: such
 * a sleeper is charged some 8 µs by its move.)
 */
#include "workload.h"

#include <sys/wait.h>

/* Until it is off its CPU: on its way there it is charged once more. */
static void wait_asleep(const char *pid)
{
	char path[64], state;
	const char *name_end;

	snprintf(path, sizeof(path), "/proc/%s/stat", pid);
	do {
		char text[512];
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);

		if (length <= 0)
			_exit(1);
		close(fd);
		text[length] = 0;
		name_end = strrchr(text, ')');
		state = name_end ? name_end[2] : 'R';
	} while (state == 'R');
	usleep(100);
}

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	if (strcmp(argv[1], "-")) {
		int fd = open(argv[1], O_WRONLY | O_CLOEXEC), length, status;
		char self[16];
		pid_t mover;

		if (fd < 0)
			die(argv[1]);
		length = snprintf(self, sizeof(self), "%d", getpid());
		mover = fork_or_die();
		if (!mover) {
			wait_asleep(self);
			_exit(write(fd, self, length) != length);
		}
		if (waitpid(mover, &status, 0) != mover || status)
			die(argv[1]);
		close(fd);
	}
	execvp(argv[2], argv + 2);
	die(argv[2]);
}
