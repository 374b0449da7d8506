// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0)
/* The same programs for kernels without bpf_loop() and fetching atomics (see kernel_compat.h). */
#define NO_BPF_LOOP
#define NO_TYPED_POINTERS
#define NO_FETCHING_ATOMICS
#include "accounting.bpf.c"
