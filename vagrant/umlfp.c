/* User-mode Linux (as of 6.1) sets a process's floating point registers from a buffer that is
 * too short where the CPU has more of them than it knows (AMX): ptrace(2) answers EFAULT, and
 * init dies. Preloaded, this gives the rest as it was. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

#define XSTATE 0x202 /* NT_X86_XSTATE of elf.h */

long ptrace(enum __ptrace_request request, ...)
{
	static long (*libc)(enum __ptrace_request, ...);
	static char all[1 << 16]; /* one thread only, and its stack is small */
	struct iovec *given, whole = {all, sizeof all};
	void *address, *data;
	va_list rest;
	int pid;

	va_start(rest, request);
	pid = va_arg(rest, int);
	address = va_arg(rest, void *);
	data = va_arg(rest, void *);
	va_end(rest);
	if (!libc)
		libc = (long (*)(enum __ptrace_request, ...))dlsym(RTLD_NEXT, "ptrace");
	given = data;
	if (request == PTRACE_SETREGSET && address == (void *)XSTATE &&
		!libc(PTRACE_GETREGSET, pid, address, &whole) && given->iov_len < whole.iov_len) {
		memcpy(all, given->iov_base, given->iov_len);
		data = &whole;
	}
	return libc(request, pid, address, data);
}
