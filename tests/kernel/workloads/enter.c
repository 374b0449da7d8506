/* enter FILE COMMAND…: come into a cgroup by way of its `cgroup.procs`, then exec.
 * With `-` for FILE it only execs.
 *
 * Whoever moves while it runs may be charged a tick between the move and the event that
 * tells of it, which no set-up can see (cases.py: `moves`); under an emulator on a busy host
 * that is one entry in ten. One that sleeps meanwhile has nothing to be charged: a child
 * made by vfork() writes, and this process does not run before that has ended.
 */
#include "workload.h"

#include <sys/wait.h>

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
		mover = vfork();
		if (!mover)
			_exit(write(fd, self, length) != length);
		if (mover < 0 || waitpid(mover, &status, 0) != mover || status)
			die(argv[1]);
		close(fd);
	}
	execvp(argv[2], argv + 2);
	die(argv[2]);
}
