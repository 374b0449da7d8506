/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * How long the current task has run since its counter was last brought up to date.
 */
#ifndef SAMS_CLOCK_H
#define SAMS_CLOCK_H

#ifndef SAMS_BCC

/* The CPU's clock counter; negative: it cannot be read. */
static __always_inline s64 clock_counter(void)
{
	return bpf_perf_event_read(MAP(clocks), BPF_F_CURRENT_CPU);
}

/*
 * What the current task has run since its counter was last brought up to date. The
 * counter of the CPU's clock (local_clock()) stands at a constant distance from rq->clock,
 * measured once; rq->clock_task is behind rq->clock by the time of interrupts and steal.
 * Negative: cannot be told here.
 */
static __always_inline s64 running_slice(struct task_struct *current)
{
	struct sams_cost *cost = this_cpu();
	struct rq *rq;
	s64 slice, counter;

	if (!option_slices || !cost || !cost->clock_samples)
		return -1;
	rq = run_queue(current);
	if (!rq || LOAD(TYPED, rq, cpu) != (int)bpf_get_smp_processor_id())
		return -1;
	counter = clock_counter();
	if (counter < 0)
		return -1;
	slice = counter + cost->clock_offset_ns -
		(s64)(LOAD(TYPED, rq, clock) - LOAD(TYPED, rq, clock_task)) -
		(s64)LOAD(TYPED, current, se.exec_start);
	return slice > 0 ? slice : 0;
}

/*
 * Attached for a moment by the loader: how far this CPU's clock counter is from its run
 * queue's clock, which is fresh at a switch. What is read later only makes the distance
 * look smaller, so the largest is the right one.
 */
PROGRAM(on_calibrate, "sched_switch")
{
	struct sams_cost *cost = this_cpu();
	struct rq *rq = run_queue((void *)ARG(2));
	s64 offset, counter;

	if (!cost || !rq || LOAD(TYPED, rq, cpu) != (int)bpf_get_smp_processor_id())
		return 0;
	offset = LOAD(TYPED, rq, clock);
	counter = clock_counter();
	if (counter < 0)
		return 0;
	offset -= counter;
	if (!cost->clock_samples || offset > cost->clock_offset_ns)
		cost->clock_offset_ns = offset;
	cost->clock_samples++;
	return 0;
}

#else

/*
 * The headers of a distribution do not describe run queues. But when a task wakes up its
 * new child on this CPU and within one group, update_curr() has just set the exec_start of
 * the running task to the run queue's clock: the distance from the CPU's clock counter is
 * taken then. It ages as interrupts and steal are taken off, so an older one is not used.
 */
#define SAMS_CLOCK_AGE 1000000000ULL

static __always_inline s64 running_slice(struct task_struct *current)
{
	struct bpf_perf_event_value value = {};
	struct sams_cost *cost = this_cpu();
	s64 slice;

	if (!option_slices || !cost || !cost->clock_samples)
		return -1;
	if (bpf_ktime_get_ns() - cost->clock_samples > SAMS_CLOCK_AGE)
		return -1;
	if (bpf_perf_event_read_value(MAP(clocks), BPF_F_CURRENT_CPU, &value, sizeof(value)))
		return -1;
	slice = (s64)(value.counter + cost->clock_offset_ns) - (s64)READ(current, se.exec_start);
	return slice > 0 ? slice : 0;
}

PROGRAM(on_wakeup_new, "sched_wakeup_new")
{
	struct bpf_perf_event_value value = {};
	struct task_struct *current = (void *)bpf_get_current_task(), *child = (void *)ARG(0);
	struct sams_cost *cost = this_cpu();

	if (!cost || READ(child, se.cfs_rq) != READ(current, se.cfs_rq))
		return 0;
	if (bpf_perf_event_read_value(MAP(clocks), BPF_F_CURRENT_CPU, &value, sizeof(value)))
		return 0;
	cost->clock_offset_ns = (s64)READ(current, se.exec_start) - (s64)value.counter;
	cost->clock_samples = bpf_ktime_get_ns();
	return 0;
}

#endif

#endif
