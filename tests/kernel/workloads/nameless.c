/* nameless N BURN FOLDER: N times each: exec of a copy of BURN in a memfd, of a copy that is
 * deleted before its exec, and of one that is deleted while it runs.
 */
#include "workload.h"
#include <sys/mman.h>
#include <sys/sendfile.h>

static void copy(const char *from, int to)
{
	struct stat about;
	int fd = open(from, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || fstat(fd, &about))
		die(from);
	if (sendfile(to, fd, NULL, about.st_size) != about.st_size)
		die("sendfile");
	close(fd);
}

static void run(int fd, const char *path)
{
	char *argv[] = { "nameless", "1000", NULL }, byte;
	int started[2];
	pid_t pid;

	if (pipe2(started, O_CLOEXEC))
		die("pipe2");
	pid = fork_or_die();
	if (!pid) {
		if (fd >= 0)
			fexecve(fd, argv, environ);
		else
			execve(path, argv, environ);
		die("exec");
	}
	close(started[1]);
	if (read(started[0], &byte, 1) < 0) /* its end comes with the exec */
		die("read");
	close(started[0]);
	if (path)
		unlink(path);
	reap(pid);
}

int main(int argc, char **argv)
{
	long n = number(argc, argv, 1, 10), execs = 0;
	char path[PATH_MAX];

	if (argc < 4)
		return 2;
	for (long i = 0; i < n; i++) {
		int fd = memfd_create("hidden", MFD_CLOEXEC);

		if (fd < 0)
			die("memfd_create");
		copy(argv[2], fd);
		run(fd, NULL);
		close(fd);

		for (int early = 0; early < 2; early++) {
			snprintf(path, sizeof(path), "%s/%s", argv[3], early ? "gone" : "going");
			fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
			if (fd < 0)
				die(path);
			copy(argv[2], fd);
			close(fd);
			if (early) {
				fd = open(path, O_RDONLY | O_CLOEXEC);
				unlink(path);
				run(fd, NULL);
				close(fd);
			} else {
				run(-1, path);
			}
		}
		execs += 3;
	}
	truth("forks", execs);
	truth("execs", execs);
	truth("exits", execs);
	return 0;
}
