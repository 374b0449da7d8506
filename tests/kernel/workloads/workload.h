/* What the workloads share: their truth, a measured burn, and no silent failure.
 *
 * Truth: lines "key value" appended to the file $TRUTH. A workload counts what it causes
 * (forks, execs, exits of processes, not threads); its own start, exec and exit are the
 * driver's to count.
 */
#ifndef WORKLOAD_H
#define WORKLOAD_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

__attribute__((noreturn, unused)) static void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	_exit(99);
}

__attribute__((unused)) static void truth(const char *key, long value)
{
	const char *path = getenv("TRUTH");
	char line[64];
	int fd, length;

	if (!path)
		return;
	length = snprintf(line, sizeof(line), "%s %ld\n", key, value);
	fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, line, length) != length)
		die("TRUTH");
	close(fd);
}

__attribute__((unused)) static int64_t clock_ns(clockid_t clock)
{
	struct timespec now;

	if (clock_gettime(clock, &now))
		die("clock_gettime");
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Uses CPU in user mode until the calling thread has used `us` microseconds more. */
__attribute__((unused)) static void burn_us(long us)
{
	int64_t end = clock_ns(CLOCK_THREAD_CPUTIME_ID) + us * 1000LL;
	volatile unsigned int work = 1;

	while (clock_ns(CLOCK_THREAD_CPUTIME_ID) < end)
		for (int i = 0; i < 2000; i++)
			work = work * 1103515245u + 12345u;
}

__attribute__((unused)) static void *burn_thread(void *us)
{
	burn_us((long)us);
	return NULL;
}

__attribute__((unused)) static pid_t fork_or_die(void)
{
	pid_t pid = fork();

	if (pid < 0)
		die("fork");
	return pid;
}

__attribute__((unused)) static void reap(pid_t pid)
{
	int status;

	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			die("waitpid");
	if (WIFEXITED(status) && WEXITSTATUS(status) == 99)
		_exit(99);
}

__attribute__((unused)) static void thread_or_die(pthread_t *thread, int detached,
						  void *(*body)(void *), void *argument)
{
	pthread_attr_t attributes;
	int failed;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 64 << 10);
	if (detached)
		pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	/* Threads that are being torn down count towards limits for a moment. */
	for (int tries = 0; (failed = pthread_create(thread, &attributes, body, argument)); tries++) {
		if (failed != EAGAIN || tries > 2000) {
			errno = failed;
			die("pthread_create");
		}
		usleep(1000);
	}
	pthread_attr_destroy(&attributes);
}

__attribute__((unused)) static long number(int argc, char **argv, int at, long otherwise)
{
	return argc > at ? strtol(argv[at], NULL, 10) : otherwise;
}

#endif
