/* cflags: -nostartfiles
 * split_second SLOT FILE: reads its CPU clock before anything else, libc's own start included.
 */
#include "workload.h"
#include "split.h"

__attribute__((used)) volatile struct timespec now; /* written by _start */

__attribute__((used, noreturn)) static void second(long *stack)
{
	char **argv = (char **)(stack + 1), *digit;
	long slot = 0;
	long long ns;
	int fd;

	for (digit = argv[1]; *digit; digit++)
		slot = slot * 10 + *digit - '0';
	ns = now.tv_sec * 1000000000LL + now.tv_nsec;
	/* Raw calls: libc is not set up here. */
	asm volatile("syscall" : "=a"(fd)
		     : "0"((long)SYS_open), "D"(argv[2]), "S"((long)O_WRONLY), "d"(0L)
		     : "rcx", "r11", "memory");
	{
		register long at asm("r10") = slot * sizeof(struct split) +
					      __builtin_offsetof(struct split, after);
		long written;

		asm volatile("syscall" : "=a"(written)
			     : "0"((long)SYS_pwrite64), "D"((long)fd), "S"(&ns), "d"(sizeof(ns)), "r"(at)
			     : "rcx", "r11", "memory");
		asm volatile("syscall" : : "a"((long)SYS_exit_group), "D"(written == sizeof(ns) ? 0L : 99L)
			     : "rcx", "r11", "memory");
	}
	__builtin_unreachable();
}

asm(".globl _start\n"
    "_start:\n"
    "	mov $228, %eax\n" /* clock_gettime */
    "	mov $2, %edi\n"	  /* CLOCK_PROCESS_CPUTIME_ID */
    "	lea now(%rip), %rsi\n"
    "	syscall\n"
    "	mov %rsp, %rdi\n"
    "	and $-16, %rsp\n"
    "	call second\n");
