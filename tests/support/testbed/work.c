// SPDX-License-Identifier: Apache-2.0
// A job's workload that knows what it took. One program under several names, each name an
// executable of its own:
//
//   short           ends at once
//   burn MS         takes MS milliseconds of CPU
//   eat MB FILE     touches MB megabytes, then burns for ever; its CPU time so far (ns)
//                   stands in FILE, also when it is killed
//   work WORD...    runs the others, one after another, as children: `short=N`, `burn=MS`,
//                   `eat=MB`; ends early on SIGTERM. Its last act is one line of JSON: CPU
//                   of itself and all its children (getrusage), and what it ran.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static volatile sig_atomic_t stopped;
static unsigned long ran_short, ran_burn, ran_eat;

static uint64_t own_cpu_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

static void burn_until(uint64_t cpu_ns)
{
	while (own_cpu_ns() < cpu_ns)
		;
}

static int eat(size_t megabytes, const char *truth)
{
	int file = open(truth, O_RDWR | O_CREAT | O_TRUNC, 0666);

	if (file < 0 || ftruncate(file, sizeof(uint64_t)))
		return 1;
	volatile uint64_t *cpu_ns =
		mmap(NULL, sizeof(uint64_t), PROT_WRITE, MAP_SHARED, file, 0);
	for (size_t i = 0; i < megabytes; i++) {
		memset(malloc(1 << 20), 1, 1 << 20);
		*cpu_ns = own_cpu_ns();
	}
	for (;;)
		*cpu_ns = own_cpu_ns();
}

static void run_child(const char *folder, const char *name, const char *first, const char *second)
{
	char path[4096];
	char *arguments[] = { path, (char *)first, (char *)second, NULL };
	pid_t child;

	snprintf(path, sizeof(path), "%s/%s", folder, name);
	if (posix_spawn(&child, path, NULL, NULL, arguments, environ)) {
		perror(path);
		_exit(1);
	}
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		kill(child, SIGKILL);
}

static unsigned long long microseconds(int who)
{
	struct rusage usage;

	getrusage(who, &usage);
	return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000ULL +
	       usage.ru_utime.tv_usec + usage.ru_stime.tv_usec;
}

static void on_term(int signal)
{
	(void)signal;
	stopped = true;
}

static int work(char *self, char **words)
{
	/* What this process took before it executed this program is not this program's. */
	unsigned long long before = microseconds(RUSAGE_SELF);
	struct sigaction action = { .sa_handler = on_term };
	const char *folder = dirname(self);
	char line[256];

	sigaction(SIGTERM, &action, NULL);
	for (; *words && !stopped; words++) {
		const char *value = strchr(*words, '=') + 1;

		if (!strncmp(*words, "short=", 6)) {
			for (long n = atol(value); n > 0 && !stopped; n--, ran_short++)
				run_child(folder, "short", NULL, NULL);
		} else if (!strncmp(*words, "burn=", 5)) {
			ran_burn++;
			run_child(folder, "burn", value, NULL);
		} else if (!strncmp(*words, "eat=", 4)) {
			snprintf(line, sizeof(line), "/tmp/eaten.%s", getenv("SLURM_JOB_ID"));
			ran_eat++;
			run_child(folder, "eat", value, line);
		} else {
			return 2;
		}
	}
	int size = snprintf(line, sizeof(line),
			    "{\"cpu_us\": %llu, \"work\": 1, \"short\": %lu, \"burn\": %lu, \"eat\": %lu}\n",
			    microseconds(RUSAGE_SELF) - before + microseconds(RUSAGE_CHILDREN),
			    ran_short, ran_burn, ran_eat);
	_exit(write(1, line, size) == size ? 0 : 1);
}

int main(int count, char **words)
{
	char self[4096] = { 0 };

	if (readlink("/proc/self/exe", self, sizeof(self) - 1) < 0)
		return 1;
	const char *name = strrchr(self, '/') + 1;
	if (!strcmp(name, "short"))
		return 0;
	if (!strcmp(name, "burn") && count == 2)
		burn_until(own_cpu_ns() + atol(words[1]) * 1000000ULL);
	else if (!strcmp(name, "eat") && count == 3)
		return eat(atol(words[1]), words[2]);
	else if (!strcmp(name, "work"))
		return work(self, words + 1);
	return 0;
}
