/* split FIRST N HOLD_MS SEED FOLDER FILE: N children exec FOLDER/second-SLOT, at a random moment.
 *
 * HOLD_MS 0: one after another, each after 0-12 ms of work. Else all at once, on the last CPU,
 * where after that nothing forks; each works on until HOLD_MS to 1.5 HOLD_MS (at most 5 s more)
 * have passed. This program itself stays on the first CPU.
 */
#include "workload.h"
#include "split.h"
#include <sys/mman.h>

static void pin(int cpu)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus))
		die("sched_setaffinity");
}

static void collect(pid_t pid, struct split *slot)
{
	siginfo_t info;
	long long earlier = -1;

	if (waitid(P_PID, pid, &info, WEXITED | WNOWAIT))
		die("waitid");
	/* A zombie's clock stands still once it has left its CPU. */
	for (;;) {
		slot->total = clock_ns((clockid_t)((~(unsigned int)pid << 3) | 2));
		if (slot->total == earlier)
			break;
		earlier = slot->total;
		usleep(2000);
	}
	reap(pid);
}

int main(int argc, char **argv)
{
	long first = number(argc, argv, 1, 0), n = number(argc, argv, 2, 10);
	long hold_ms = number(argc, argv, 3, 0), cpus = sysconf(_SC_NPROCESSORS_ONLN);
	struct split *slots;
	pid_t *pids = calloc(n, sizeof(*pids));
	int fd;

	if (argc < 7 || !pids)
		return 2;
	srand(number(argc, argv, 4, 1));
	fd = open(argv[6], O_RDWR | O_CLOEXEC);
	slots = mmap(NULL, (first + n) * sizeof(*slots), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (fd < 0 || slots == MAP_FAILED)
		die(argv[6]);
	pin(0);
	for (long i = 0; i < n; i++) {
		long slot = first + i, work = rand() % 12000, spread = hold_ms / 2;
		int64_t end;

		if (spread > 5000)
			spread = 5000;
		end = clock_ns(CLOCK_MONOTONIC) + (hold_ms + rand() % (spread + 1)) * 1000000LL;
		pids[i] = fork_or_die();
		if (!pids[i]) {
			char path[PATH_MAX], text[32];
			char *next[] = { path, text, argv[6], NULL };

			snprintf(path, sizeof(path), "%s/second-%ld", argv[5], slot);
			snprintf(text, sizeof(text), "%ld", slot);
			slots[slot].before = 0; /* its page is there when it counts */
			pin(hold_ms ? cpus - 1 : i % cpus);
			if (hold_ms)
				while (clock_ns(CLOCK_MONOTONIC) < end)
					;
			else
				burn_us(work);
			slots[slot].before = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
			execv(path, next);
			die(path);
		}
		if (!hold_ms)
			collect(pids[i], &slots[slot]);
	}
	if (hold_ms)
		for (long i = 0; i < n; i++)
			collect(pids[i], &slots[first + i]);
	truth("forks", n);
	truth("execs", n);
	truth("exits", n);
	return 0;
}
