// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0)
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";
