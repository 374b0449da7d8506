/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * How long the current task has run since its counter was last brought up to date.
 */
#ifndef SAMS_CLOCK_H
#define SAMS_CLOCK_H

/*
 * A task's counter is brought up to date at every tick. What seems to be a longer slice is a
 * CPU that was taken away from this machine and of which the scheduler has not been told yet
 * (steal time is taken off when the run queue's clock moves on): how much of it the task ran,
 * nobody can tell. Negative then.
 */
static __always_inline s64 believable(s64 slice)
{
	if (slice > (s64)option_slice_ns)
		return -1;
	return slice > 0 ? slice : 0;
}

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
	return believable(slice);
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
 * The headers of a distribution do not describe run queues. But rq->clock as it was when a
 * task came to its CPU stands in sched_info.last_arrival, and rq->clock_task of the same
 * moment in se.exec_start, until that is brought up to date. So the former gives the
 * distance of rq->clock from the CPU's clock counter, once; and their difference, the time
 * of interrupts and steal until then (0 on kernels that do not take it off). It only grows,
 * and what is seen once exec_start has moved on looks smaller: the largest is right.
 *
 * After a second on the CPU without a switch it may be too old, and is not used.
 */
#define SAMS_CLOCK_AGE 1000000000ULL
#define CLOCK_LAG(cost) (*(s64 *)&(cost)->clock_samples)

static __always_inline void note_lag(struct sams_cost *cost, s64 lag)
{
	if (lag > CLOCK_LAG(cost))
		CLOCK_LAG(cost) = lag;
}

static __always_inline s64 running_slice(struct task_struct *current)
{
	struct bpf_perf_event_value value = {};
	struct sams_cost *cost = this_cpu();
	u64 arrival, start, now;
	s64 slice;

	if (!option_slices || !cost || !cost->clock_offset_ns)
		return -1;
	if (bpf_perf_event_read_value(MAP(clocks), BPF_F_CURRENT_CPU, &value, sizeof(value)))
		return -1;
	now = value.counter + cost->clock_offset_ns;
	arrival = READ(current, sched_info.last_arrival);
	start = READ(current, se.exec_start);
	note_lag(cost, arrival - start);
	if ((s64)(now - arrival) > (s64)SAMS_CLOCK_AGE)
		return -1;
	slice = now - CLOCK_LAG(cost) - start;
	return believable(slice);
}

/*
 * Attached for a moment by the loader. The task that leaves is the one that came at the
 * switch before, when this program read the counter and its exec_start. Both are kept
 * where the programs' own cost stands later, which begins anew after a second.
 */
PROGRAM(on_calibrate, "sched_switch")
{
	struct bpf_perf_event_value value = {};
	struct task_struct *leaving = (void *)ARG(1), *coming = (void *)ARG(2);
	struct sams_cost *cost = this_cpu();
	u64 arrival = READ(leaving, sched_info.last_arrival);
	s64 offset;

	if (!cost)
		return 0;
	if (bpf_perf_event_read_value(MAP(clocks), BPF_F_CURRENT_CPU, &value, sizeof(value)))
		return 0;
	/* The idle task, PID 0, has no exec_start. */
	if (cost->window_start_ns && READ(leaving, pid)) {
		offset = arrival - cost->window_start_ns;
		if (!cost->clock_offset_ns || offset > cost->clock_offset_ns)
			cost->clock_offset_ns = offset;
		note_lag(cost, arrival - cost->window_ns);
	}
	cost->window_start_ns = value.counter;
	cost->window_ns = READ(coming, se.exec_start);
	return 0;
}

#endif

#endif
