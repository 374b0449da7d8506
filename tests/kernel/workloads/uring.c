/* uring N KB: N reads of KB kilobytes from /dev/urandom, each forced onto an io_uring worker. */
#include "workload.h"
#include <linux/io_uring.h>
#include <sys/mman.h>

#define ENTRIES 64

int main(int argc, char **argv)
{
	long n = number(argc, argv, 1, 500), size = number(argc, argv, 2, 64) << 10;
	struct io_uring_params params = { 0 };
	char *ring, *buffers;
	struct io_uring_sqe *sqes;
	unsigned int *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
	struct io_uring_cqe *cqes;
	long done = 0, sent = 0;
	int ring_fd, file;

	ring_fd = syscall(SYS_io_uring_setup, ENTRIES, &params);
	if (ring_fd < 0)
		die("io_uring_setup");
	if (!(params.features & IORING_FEAT_SINGLE_MMAP)) {
		errno = ENOSYS;
		die("io_uring of before 5.4");
	}
	ring = mmap(NULL, params.cq_off.cqes + params.cq_entries * sizeof(*cqes),
		    PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_fd, IORING_OFF_SQ_RING);
	sqes = mmap(NULL, params.sq_entries * sizeof(*sqes), PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_POPULATE, ring_fd, IORING_OFF_SQES);
	buffers = mmap(NULL, ENTRIES * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		       -1, 0);
	file = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
	if (ring == MAP_FAILED || sqes == MAP_FAILED || buffers == MAP_FAILED || file < 0)
		die("io_uring set-up");
	sq_tail = (unsigned int *)(ring + params.sq_off.tail);
	sq_mask = (unsigned int *)(ring + params.sq_off.ring_mask);
	sq_array = (unsigned int *)(ring + params.sq_off.array);
	cq_head = (unsigned int *)(ring + params.cq_off.head);
	cq_tail = (unsigned int *)(ring + params.cq_off.tail);
	cq_mask = (unsigned int *)(ring + params.cq_off.ring_mask);
	cqes = (struct io_uring_cqe *)(ring + params.cq_off.cqes);

	while (done < n) {
		long batch = 0;
		unsigned int head;

		while (batch < 8 && sent < n) {
			unsigned int at = *sq_tail & *sq_mask;

			memset(&sqes[at], 0, sizeof(*sqes));
			sqes[at].opcode = IORING_OP_READ;
			sqes[at].flags = IOSQE_ASYNC;
			sqes[at].fd = file;
			sqes[at].addr = (uint64_t)(uintptr_t)(buffers + size * (sent % ENTRIES));
			sqes[at].len = size;
			sq_array[at] = at;
			__atomic_store_n(sq_tail, *sq_tail + 1, __ATOMIC_RELEASE);
			batch++;
			sent++;
		}
		if (syscall(SYS_io_uring_enter, ring_fd, batch, batch ? batch : 1,
			    IORING_ENTER_GETEVENTS, NULL, 0) < 0 && errno != EINTR)
			die("io_uring_enter");
		head = *cq_head;
		while (head != __atomic_load_n(cq_tail, __ATOMIC_ACQUIRE)) {
			int result = cqes[head & *cq_mask].res;

			if (result != size) {
				errno = result < 0 ? -result : EIO;
				die("read on a worker");
			}
			head++;
			done++;
		}
		__atomic_store_n(cq_head, head, __ATOMIC_RELEASE);
	}
	truth("forks", 0);
	/* What the process used less what this thread used: the workers' share. */
	truth("worker_ns", clock_ns(CLOCK_PROCESS_CPUTIME_ID) - clock_ns(CLOCK_THREAD_CPUTIME_ID));
	return 0;
}
