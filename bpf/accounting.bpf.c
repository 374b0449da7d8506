// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0)
/*
 * CPU accounting per executable for the processes of jobs.
 *
 * A task of a job has a row that remembers how much of its counters has been charged so
 * far. *Settling* a task charges the rest to the executable that the task is now. Tasks
 * are settled when they exec, move between cgroups, exit, are freed, and when the
 * collector harvests. Whatever the order, the charges of a task add up to its own final
 * counter, which is what the kernel charged to its cgroup.
 */
#include "maps.h"
#include "path.h"

#ifndef SAMS_BCC
char LICENSE[] SEC("license") = "Dual BSD/GPL";
#endif

#define INDEX(id) ((id) & 0xfff)
#define WORDS	  (SAMS_PATH_MAX / 8)
#define PROBES	  4

enum { SCRATCH_NEW, SCRATCH_EXEC, SCRATCH_MOVE, SCRATCH_ADOPT };

/* ---- the programs' own cost ------------------------------------------------------- */

static __always_inline struct sams_node *the_node(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(MAP(node), &zero);
}

static __always_inline struct sams_cost *this_cpu(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(MAP(costs), &zero);
}

static __always_inline int is_off(void)
{
	struct sams_node *all = the_node();

	return !all || all->tripped;
}

/* Time of the begin of an event that is sampled by chance, 0 for one that is not. */
static __always_inline u64 enter(void)
{
	return bpf_get_prandom_u32() % SAMS_COST_SAMPLE ? 0 : bpf_ktime_get_ns();
}

static __always_inline void leave(u64 begin)
{
	struct sams_cost *cost;
	struct sams_node *all;
	u64 now, spent;

	if (!begin)
		return;
	cost = this_cpu();
	all = the_node();
	if (!cost || !all)
		return;
	now = bpf_ktime_get_ns();
	spent = now - begin;
	/* An interrupt, or a CPU that was taken away, is not the programs' own time. */
	if (spent > SAMS_COST_MOST_NS)
		spent = SAMS_COST_MOST_NS;
	spent *= SAMS_COST_SAMPLE;
	cost->events += SAMS_COST_SAMPLE;
	cost->sampled_ns += spent;
	if (now - cost->window_start_ns > 1000000000ULL) {
		cost->window_start_ns = now;
		cost->window_ns = 0;
	}
	cost->window_ns += spent;
	if (option_limit_ns && cost->window_ns > option_limit_ns)
		all->tripped = 1;
}

/* ---- reading a task --------------------------------------------------------------- */

struct columns {
	u64 of[SAMS_COLUMNS];
};

static __always_inline void read_columns(struct task_struct *task, enum typing how,
					 u64 now[SAMS_COLUMNS])
{
	now[SAMS_CPU] = LOAD(how, task, se.sum_exec_runtime);
	now[SAMS_UTIME] = LOAD(how, task, utime);
	now[SAMS_STIME] = LOAD(how, task, stime);
	if (bpf_core_field_exists(task->ioac)) {
		now[SAMS_READ_BYTES] = LOAD(how, task, ioac.read_bytes);
		now[SAMS_WRITE_BYTES] = LOAD(how, task, ioac.write_bytes);
	} else {
		now[SAMS_READ_BYTES] = 0;
		now[SAMS_WRITE_BYTES] = 0;
	}
	now[SAMS_MINOR_FAULTS] = LOAD(how, task, min_flt);
	now[SAMS_MAJOR_FAULTS] = LOAD(how, task, maj_flt);
	now[SAMS_VOLUNTARY] = LOAD(how, task, nvcsw);
	now[SAMS_INVOLUNTARY] = LOAD(how, task, nivcsw);
}

#include "clock.h"

/* ---- slots and totals ------------------------------------------------------------- */

static __always_inline struct sams_slot *slot_of(u32 id)
{
	u32 index = INDEX(id);
	struct sams_slot *slot = bpf_map_lookup_elem(MAP(slots), &index);

	if (slot && (slot->id != id || slot->state != SAMS_SLOT_USED))
		slot = 0;
	barrier_var(slot); /* or clang asks for the state again instead of for the pointer */
	return slot;
}

/* Id of the slot whose cgroup a task is in, 0 for none. */
static __always_inline u32 place_of(struct task_struct *task)
{
	u64 cgroup = task_cgroup_id(task, option_controller);
	u32 *id = bpf_map_lookup_elem(MAP(cgroups), &cgroup);

	return id ? *id : 0;
}

static __always_inline struct sams_counters *counters_of(struct sams_slot *slot, u32 index,
							 u32 state)
{
	struct sams_total_key key = {.slot_id = slot->id, .index = index};
	struct sams_total *total;

	if (index != SAMS_OVERFLOW) {
		total = bpf_map_lookup_elem(MAP(totals), &key);
		if (total)
			return &total->counters;
	}
	return state & SAMS_ROW_OUTSIDE ? &slot->overflow_outside : &slot->overflow;
}

static __always_inline void lose(struct sams_slot *slot, enum sams_lost cause)
{
	__sync_fetch_and_add(&slot->lost[cause], 1);
}

static __always_inline void peak(struct sams_counters *counters, u64 pages)
{
	if (pages > counters->max_rss_pages)
		counters->max_rss_pages = pages;
}

enum settling {
	FORWARD,  /* charge nothing while the counter is behind what was charged */
	BOUNDARY, /* charge exactly up to the counter, back as well as forth */
};

static __always_inline void settle_cpu(struct sams_task *row, struct sams_counters *counters,
				       u64 now_ns, enum settling how)
{
	int i;

	for (i = 0; i < 4; i++) {
		u64 seen = *(volatile u64 *)&row->charged[SAMS_CPU];
		s64 delta = now_ns - seen;

		if (delta == 0 || (delta < 0 && how == FORWARD))
			break;
		if (replace(&row->charged[SAMS_CPU], seen, now_ns)) {
			__sync_fetch_and_add(&counters->column[SAMS_CPU], delta);
			break;
		}
	}
}

static __always_inline void settle(struct sams_task *row, struct sams_counters *counters,
				   u64 now[SAMS_COLUMNS], enum settling how)
{
	int i;

	settle_cpu(row, counters, now[SAMS_CPU], how);
#pragma unroll
	for (i = SAMS_CPU + 1; i < SAMS_COLUMNS; i++) {
		s64 delta = now[i] - row->charged[i];

		/* Less than before: read by the harvest, and settled by the task itself since. */
		if (delta > 0) {
			row->charged[i] = now[i];
			__sync_fetch_and_add(&counters->column[i], delta);
		}
	}
}

/*
 * The counters of the image that the task is, with the execs, forks and the death added that
 * its row has kept for them: a look-up of totals less at each of these events.
 */
static __always_inline struct sams_counters *image_of(struct sams_task *row,
						      struct sams_slot *slot)
{
	struct sams_counters *counters;
	u64 image = 0, died;
	int i;

	for (i = 0; i < 4; i++) {
		image = *(volatile u64 *)&row->image;
		if (!(image & SAMS_IMAGE_OWED) ||
		    replace(&row->image, image, image & ~SAMS_IMAGE_OWED))
			break;
	}
	counters = counters_of(slot, image >> 32, row->state);
	if (i < 4 && image & SAMS_IMAGE_OWED) {
		__sync_fetch_and_add(&counters->forks, image & SAMS_IMAGE_FORKS);
		if (image & SAMS_IMAGE_EXEC)
			__sync_fetch_and_add(&counters->execs, 1);
	}
	died = *(volatile u64 *)&row->died_pages;
	if (died && replace(&row->died_pages, died, 0)) {
		__sync_fetch_and_add(&counters->exits, 1);
		peak(counters, died - 1);
	}
	return counters;
}

/* Settle a task of a slot at these counters; `pages`: a peak of its memory, 0 for none. */
SUBPROGRAM charge(struct sams_task *row, struct sams_slot *slot, struct columns *now,
		  enum settling how, u64 pages)
{
	struct sams_counters *counters;

	if (!row || !slot || !now)
		return 0;
	counters = image_of(row, slot);
	settle(row, counters, now->of, how);
	peak(counters, pages);
	return 0;
}

/* No task has run for longer than it is old, by clocks that may go a little differently; nor
 * less than it had at its exit, a slice aside that was put too far. */
static __always_inline int is_possible(struct sams_task *row, u64 cpu_ns)
{
	u64 age_ns = bpf_ktime_get_boot_ns() - row->start_ns;

	if (row->state & SAMS_ROW_EXITING && cpu_ns + option_slice_ns < row->exit_ns)
		return 0;
	return cpu_ns <= age_ns + age_ns / 256 + 1000000000ULL;
}

/* Of a task whose free was not seen, what is known. */
SUBPROGRAM charge_unseen(struct sams_task *row, struct sams_slot *slot)
{
	if (!row || !slot)
		return 0;
	if (is_possible(row, row->exit_ns))
		settle_cpu(row, image_of(row, slot), row->exit_ns, FORWARD);
	lose(slot, SAMS_LOST_MISSED_DEATHS);
	return 0;
}

/* The CPU of the current task up to this moment. */
static __always_inline u64 cpu_of_current(struct task_struct *current, struct sams_slot *slot)
{
	s64 slice = running_slice(current);

	if (slice < 0) {
		lose(slot, SAMS_LOST_SPLITS);
		slice = 0;
	}
	return LOAD(TYPED, current, se.sum_exec_runtime) + slice;
}

/* ---- executables ------------------------------------------------------------------ */

/* The words of one path, or of two, from where it begins to its end. */
struct words {
	u64 *a;
	u64 *b;
	u64 sum;
	u32 first;
};

static long hash_next(u32 i, struct words *words)
{
	u32 word = words->first + i;

	if (word >= WORDS)
		return 1;
	barrier_var(word); /* or clang turns the mask into a pointer that the verifier loses */
	words->sum = mix(words->sum, words->a[word & (WORDS - 1)]);
	return 0;
}

static long compare_next(u32 i, struct words *words)
{
	u32 word = words->first + i;

	if (word >= WORDS)
		return 1;
	barrier_var(word);
	words->sum = words->a[word & (WORDS - 1)] ^ words->b[word & (WORDS - 1)];
	return words->sum != 0;
}

/* Hash of flags and path; zeroes what stands before the path in its first word. */
static __always_inline u64 hash_of(struct sams_name *name)
{
	u32 at = SAMS_PATH_MAX - name->length, word = at / 8, before = at % 8 * 8;
	struct words words = {
		.a = (u64 *)name->path,
		.sum = mix(option_seed, name->flags),
		.first = word,
	};

	barrier_var(word);
	if (word < WORDS) /* BPF on a big-endian host would shift the other way: see the build */
		words.a[word & (WORDS - 1)] = words.a[word & (WORDS - 1)] >> before << before;
	REPEAT(WORDS, hash_next, words);
	return words.sum ? words.sum : 1;
}

static __always_inline int same_name(struct sams_name *a, struct sams_name *b)
{
	struct words words = {
		.a = (u64 *)a->path,
		.b = (u64 *)b->path,
		.first = (SAMS_PATH_MAX - a->length) / 8,
	};

	if (a->length != b->length || a->flags != b->flags)
		return 0;
	REPEAT(WORDS, compare_next, words);
	return !words.sum;
}

/* A new row among the slot's totals: its index, or SAMS_OVERFLOW. */
static __always_inline u32 new_total(struct sams_slot *slot, u64 hash)
{
	struct sams_total total = {.hash = hash};
	struct sams_total_key key = {.slot_id = slot->id};
	int i;

	key.index = slot->names;
	for (i = 0; i < 8; i++) {
		long error;

		if (key.index >= option_quota)
			return SAMS_OVERFLOW;
		error = bpf_map_update_elem(MAP(totals), &key, &total, BPF_NOEXIST);
		if (!error) {
			slot->names = key.index + 1;
			return key.index;
		}
		if (error != -17) /* EEXIST: another CPU was first with this index */
			return SAMS_OVERFLOW;
		key.index++;
	}
	return SAMS_OVERFLOW;
}

/* Index of the row of what `climb` starts from, made if need be; the name is written first. */
static __always_inline u32 row_by_name(struct sams_slot *slot, struct climb *climb, u32 flags,
				       const char *script, u32 which)
{
	struct sams_name *name = bpf_map_lookup_elem(MAP(scratch), &which), *known;
	struct sams_name_key key = {.slot_id = slot->id};
	int i;

	if (!name)
		return SAMS_OVERFLOW;
	name->flags = flags;
	resolve(name, climb);
	if (name->length > SAMS_PATH_MAX)
		return SAMS_OVERFLOW;
	key.hash = hash_of(name);
	for (i = 0; i < PROBES; i++) {
		known = bpf_map_lookup_elem(MAP(names), &key);
		if (!known) {
			long length = 0;
			u32 index = new_total(slot, key.hash);

			if (index == SAMS_OVERFLOW)
				break;
			name->index = index;
			if (script)
				length = bpf_probe_read_kernel_str(name->script, SAMS_SCRIPT_MAX,
								   script);
			name->script_length = length > 0 ? length : 0;
			if (!bpf_map_update_elem(MAP(names), &key, name, BPF_NOEXIST))
				return index;
			/* Another CPU was first, or the map is full: this total stays empty. */
			known = bpf_map_lookup_elem(MAP(names), &key);
			if (!known)
				break;
		}
		if (same_name(name, known)) {
			if (script && !known->script_length) {
				long length = bpf_probe_read_kernel_str(
					known->script, SAMS_SCRIPT_MAX, script);

				known->script_length = length > 0 ? length : 0;
			}
			return known->index;
		}
		key.hash++;
	}
	lose(slot, SAMS_LOST_EXECUTABLES_FULL);
	return SAMS_OVERFLOW;
}

/* Index of the row of what `task` executes. */
static __always_inline u32 executable_of(struct sams_slot *slot, struct task_struct *task,
					 enum typing how, u32 state, struct linux_binprm *bprm,
					 u32 which)
{
	struct sams_chain_key key = {.slot_id = slot->id};
	struct climb climb;
	u32 index, *known;
	const char *script = 0;

	key.flags = state & SAMS_ROW_OUTSIDE ? SAMS_OUTSIDE : 0;
	if (option_host_mounts && mount_namespace(task, how) != option_host_mounts)
		key.flags |= SAMS_FOREIGN;
	key.flags |= start(&climb, task, how);
	if (bprm && LOAD(TYPED, bprm, filename) != LOAD(TYPED, bprm, interp))
		script = READ(bprm, filename);
	if (!script) {
		key.sum = chain_of(&climb);
		known = key.sum ? bpf_map_lookup_elem(MAP(chains), &key) : 0;
		if (known)
			return *known;
	}
	index = row_by_name(slot, &climb, key.flags, script, which);
	if (key.sum && index != SAMS_OVERFLOW)
		bpf_map_update_elem(MAP(chains), &key, &index, BPF_ANY);
	return index;
}

/* ---- rows of tasks and processes -------------------------------------------------- */

static __always_inline int is_leader(struct task_struct *task, enum typing how)
{
	return LOAD(how, task, pid) == LOAD(how, task, tgid);
}

static __always_inline void drop_task(u64 key, struct sams_slot *slot)
{
	if (!bpf_map_delete_elem(MAP(tasks), &key) && slot)
		__sync_fetch_and_add(&slot->tasks, -1);
}

/* Is this row the task's own, not one of an earlier task at the same address? */
static __always_inline int is_row_of(struct sams_task *row, struct task_struct *task,
				     enum typing how)
{
	u64 start_ns = LOAD(how, task, start_boottime);
	u32 pid, tgid = LOAD(how, task, tgid);

	if (row->tgid != tgid)
		return 0;
	if (row->start_ns == start_ns)
		return 1;
	/* A thread that execs takes over the birth of its leader, and the two swap their
	 * numbers (de_thread()). One that is being made is a copy of who makes it, the leader maybe,
	 * but for whom it follows. One that has exited becomes nothing any more: a leader at its
	 * address is that of a later process which got the number of the former. */
	pid = LOAD(how, task, pid);
	if (pid != tgid || row->pid == tgid || row->state & SAMS_ROW_EXITING ||
	    LOAD(how, task, group_leader) != task)
		return 0;
	row->pid = pid;
	row->start_ns = start_ns;
	return 1;
}

/*
 * The row of a task, 0 if it has none. A row whose task's free was not seen stays until
 * the harvest finds it, or a task of a job comes to its address.
 */
static __always_inline struct sams_task *row_of(struct task_struct *task, enum typing how)
{
	u64 key = (u64)task;
	struct sams_task *row = bpf_map_lookup_elem(MAP(tasks), &key);

	return row && is_row_of(row, task, how) ? row : 0;
}

enum keeping { KEPT, NO_ROOM, THERE_ALREADY };

static __always_inline enum keeping keep_task(struct task_struct *task, enum typing how,
					      struct sams_task *row, struct sams_slot *slot)
{
	u64 key = (u64)task;
	long error;

	row->pid = LOAD(how, task, pid);
	row->tgid = LOAD(how, task, tgid);
	row->start_ns = LOAD(how, task, start_boottime);
	error = bpf_map_update_elem(MAP(tasks), &key, row, BPF_NOEXIST);
	if (error == -17) { /* EEXIST */
		struct sams_task *stale = bpf_map_lookup_elem(MAP(tasks), &key);

		if (stale && is_row_of(stale, task, how))
			return THERE_ALREADY;
		if (stale) {
			struct sams_slot *its = slot_of(stale->slot_id);

			if (its)
				charge_unseen(stale, its);
			drop_task(key, its);
		}
		error = bpf_map_update_elem(MAP(tasks), &key, row, BPF_NOEXIST);
	}
	if (error) {
		struct sams_node *all = the_node();

		if (all)
			all->refused = 1;
		lose(slot, SAMS_LOST_TASKS_FULL);
		return NO_ROOM;
	}
	__sync_fetch_and_add(&slot->tasks, 1);
	return KEPT;
}

/* A row for the process of a task that is not its only thread; 0 if there is one already. */
static __always_inline int keep_process(struct task_struct *task, enum typing how,
					struct sams_slot *slot, u32 state, u64 flags)
{
	struct sams_process process = {.slot_id = slot->id, .state = state};
	u64 key = (u64)LOAD(how, task, signal);

	return !bpf_map_update_elem(MAP(processes), &key, &process, flags);
}

static __always_inline int has_threads(struct task_struct *task, enum typing how)
{
	struct signal_struct *signal = LOAD(how, task, signal);

	return LOAD(how, signal, nr_threads) > 1;
}

/* ---- a second look at the dead ------------------------------------------------------ */

static __always_inline struct sams_dying *dying_here(void)
{
	u32 zero = 0;

	/* The exact set-up sees the last switch itself. */
	return option_exact ? 0 : bpf_map_lookup_elem(MAP(dying), &zero);
}

static __always_inline void wait_for_death(struct sams_dying *queue, u64 key)
{
	if (!queue)
		return;
	queue->task[queue->noted++ % SAMS_DYING] = key;
	if (queue->noted - queue->looked > SAMS_DYING)
		queue->looked++; /* the oldest had to give way */
}

/*
 * The tasks of jobs that exited on this CPU wait in a queue. Each new task, exec and exit there,
 * whosesoever, looks at the next one: once it has had its last switch, its counter is final. It
 * is kept in the row, in case that the free goes unseen.
 */
static __always_inline void look_again(void)
{
	struct sams_dying *queue = dying_here();
	struct task_struct *task;
	struct sams_task *row;
	u64 key, cpu_ns, begin;

	if (!queue || queue->looked == queue->noted || is_off())
		return;
	begin = enter();
	key = queue->task[queue->looked++ % SAMS_DYING];
	task = (void *)key;
	if (task_state(task, BARE) & TASK_DEAD) {
		row = bpf_map_lookup_elem(MAP(tasks), &key);
		cpu_ns = READ(task, se.sum_exec_runtime);
		/* The birth last, so that what was read is this task's. */
		if (row && row->start_ns == READ(task, start_boottime) && is_possible(row, cpu_ns))
			row->exit_ns = cpu_ns;
	} else if (READ(task, flags) & PF_EXITING) {
		wait_for_death(queue, key);
	} /* else the memory is another task's */
	leave(begin);
}

/* ---- new tasks -------------------------------------------------------------------- */

static __always_inline void new_task(struct task_struct *child, struct task_struct *parent)
{
	u64 key = (u64)child, begin;
	struct sams_task *origin = row_of(parent, TYPED), *kept, row = {};
	struct sams_slot *slot = 0, *home = 0, *owner;
	int process, inside = 0, same;
	u32 slot_id = place_of(child); /* of a slot in use it is never 0 */

	if ((!slot_id && !origin) || is_off())
		return;
	begin = enter();
	process = is_leader(child, TYPED);
	if (origin) {
		home = slot_of(origin->slot_id);
		inside = home && !(origin->state & SAMS_ROW_OUTSIDE);
	}
	if (slot_id)
		slot = slot_of(slot_id);
	if (slot) {
		owner = slot;
		if (inside && slot->id == home->id)
			row.state = SAMS_ROW_NATIVE;
	} else {
		if (!home)
			return;
		owner = home;
		row.state = SAMS_ROW_NATIVE | SAMS_ROW_OUTSIDE;
	}
	same = row.state && (row.state & SAMS_ROW_OUTSIDE) == (origin->state & SAMS_ROW_OUTSIDE);
	row.slot_id = owner->id;
	row.image = same ? origin->image & ~SAMS_IMAGE_OWED : SAMS_IMAGE(SAMS_OVERFLOW);
	if (!process) {
		row.state |= SAMS_ROW_THREADED;
		if (origin)
			row.rss_base_pages = origin->rss_base_pages;
	}
	if (keep_task(child, TYPED, &row, owner) == THERE_ALREADY)
		return; /* moved into the job before we were told that it exists */
	if (process) {
		if (inside) {
			__sync_fetch_and_add(&home->forks, 1);
			__sync_fetch_and_add(&origin->image, 1);
			if (!slot || slot->id != home->id) /* CLONE_INTO_CGROUP */
				__sync_fetch_and_add(&home->moved_out, 1);
		}
		if (slot) {
			if (!row.state)
				__sync_fetch_and_add(&slot->adopted, 1);
			__sync_fetch_and_add(&slot->live, 1);
		}
	} else if (home && !(origin->state & SAMS_ROW_THREADED)) {
		origin->state |= SAMS_ROW_THREADED;
		keep_process(child, TYPED, home, origin->state, BPF_ANY);
	}
	/* Last, when little else is known: what follows is checked once for all that came before. */
	if (!same) {
		row.image = SAMS_IMAGE(
			executable_of(owner, child, TYPED, row.state, 0, SCRATCH_NEW));
		kept = bpf_map_lookup_elem(MAP(tasks), &key);
		if (kept)
			kept->image = row.image;
	}
	leave(begin);
}

PROGRAM(on_new_task, "task_newtask")
{
	look_again();
	new_task((void *)ARG(0), CURRENT());
	return 0;
}

/* ---- exec ------------------------------------------------------------------------- */

/* Peak of the image that ends, in pages: the kernel keeps that of the process over all images. */
static __always_inline u64 image_peak(struct task_struct *task, struct sams_task *row,
				      struct mm_struct *mm)
{
	struct signal_struct *signal = LOAD(TYPED, task, signal);
	u64 most = LOAD(TYPED, signal, maxrss);

	if (most > row->rss_base_pages)
		return most;
	return mm ? LOAD(TYPED, mm, hiwater_rss) : 0;
}

static __always_inline void exec(struct task_struct *task, struct linux_binprm *bprm)
{
	struct sams_task *row = row_of(task, TYPED);
	struct sams_slot *slot;
	struct columns now;
	u64 begin, most;

	if (!row || is_off())
		return;
	begin = enter();
	slot = slot_of(row->slot_id);
	if (!slot)
		return;
	read_columns(task, TYPED, now.of);
	now.of[SAMS_CPU] = cpu_of_current(task, slot);
	most = image_peak(task, row, 0); /* the old memory has gone, and is in `maxrss` */
	charge(row, slot, &now, FORWARD, most);
	if (most)
		row->rss_base_pages = most;
	row->image = SAMS_IMAGE(executable_of(slot, task, TYPED, row->state, bprm, SCRATCH_EXEC)) |
		     SAMS_IMAGE_EXEC;
	leave(begin);
}

PROGRAM(on_exec, "sched_process_exec")
{
	look_again();
	exec((void *)ARG(0), (void *)ARG(2));
	return 0;
}

/* ---- death ------------------------------------------------------------------------ */

/* Whether the process dies with this task, of whose thread it is the last; counts its death. */
static __always_inline int process_died(struct task_struct *task, struct sams_task *row,
					struct sams_slot *slot)
{
	struct signal_struct *signal = LOAD(TYPED, task, signal);
	int live = LOAD(TYPED, signal, live.counter);
	u32 state = row->state;
	u64 key = (u64)signal;

	if (!(state & SAMS_ROW_THREADED)) {
		if (live) {
			/* Taken up at the moment in which it made its first thread. */
			keep_process(task, TYPED, slot, state, BPF_NOEXIST);
			return 0;
		}
	} else {
		struct sams_process *process;

		if (live)
			return 0;
		process = bpf_map_lookup_elem(MAP(processes), &key);
		if (!process)
			return 0;
		/* Threads may stand in several cgroups. */
		if (process->slot_id != slot->id)
			slot = slot_of(process->slot_id);
		state = process->state;
		/* Two threads may both see live == 0: who deletes the row counts the death. */
		if (bpf_map_delete_elem(MAP(processes), &key))
			return 0;
	}
	if (slot && !(state & SAMS_ROW_OUTSIDE)) {
		__sync_fetch_and_add(&slot->exits, 1);
		__sync_fetch_and_add(&slot->live, -1);
	}
	return 1;
}

/* What is known here is kept in the row, in case that nothing of the task is seen any more. */
static __always_inline void exits(struct task_struct *task)
{
	struct sams_task *row = row_of(task, TYPED);
	struct sams_slot *slot;
	u64 begin;

	if (!row || is_off())
		return;
	begin = enter();
	slot = slot_of(row->slot_id);
	if (!slot)
		return;
	row->state |= SAMS_ROW_EXITING;
	row->exit_ns = cpu_of_current(task, slot);
	if (process_died(task, row, slot))
		row->died_pages = 1 + image_peak(task, row, LOAD(TYPED, task, mm));
	wait_for_death(dying_here(), (u64)task);
	leave(begin);
}

PROGRAM(on_exit, "sched_process_exit")
{
	look_again();
	exits((void *)ARG(0));
	return 0;
}

/* Word of its moves (see `tell_move`). */
static __always_inline void forget_move(u64 task, enum sams_witness witness)
{
	struct sams_move_key key = {.task = task, .witness = witness};

	bpf_map_delete_elem(MAP(moves), &key);
}

static __always_inline void forget_moves(u64 task)
{
	forget_move(task, SAMS_TOLD);
	forget_move(task, SAMS_FOUND);
}

/* No room for its row: all it ever ran goes to the overflow row of its job. */
static __always_inline void charge_refused(struct task_struct *task)
{
	struct sams_node *all = the_node();
	struct sams_slot *slot;
	u32 id;

	if (!all || !all->refused || all->tripped)
		return;
	id = place_of(task);
	slot = id ? slot_of(id) : 0;
	if (option_exact)
		forget_moves((u64)task);
	if (slot && slot->lost[SAMS_LOST_TASKS_FULL])
		__sync_fetch_and_add(&slot->overflow.column[SAMS_CPU],
				     LOAD(TYPED, task, se.sum_exec_runtime));
}

/* The task's counters will not change any more: charge what is missing, let the row go. */
static __always_inline void finalise(struct task_struct *task)
{
	struct sams_task *row = row_of(task, TYPED);
	struct sams_slot *slot;
	struct columns now;
	u64 begin;

	if (!row) {
		charge_refused(task);
		return;
	}
	if (is_off())
		return;
	begin = enter();
	slot = slot_of(row->slot_id);
	if (slot) {
		read_columns(task, TYPED, now.of);
		charge(row, slot, &now, BOUNDARY, 0);
	}
	drop_task((u64)task, slot);
	if (option_exact)
		forget_moves((u64)task);
	leave(begin);
}

PROGRAM(on_free, "sched_process_free")
{
	finalise((void *)ARG(0));
	return 0;
}

/* The exact set-up: the last switch away from a task, instead of its free. */
PROGRAM(on_switch, "sched_switch")
{
	struct task_struct *previous = (void *)ARG(1);

	if (task_state(previous, TYPED) & TASK_DEAD)
		finalise(previous);
	return 0;
}

/* ---- moves between cgroups -------------------------------------------------------- */

static __always_inline void count_move(struct sams_slot *from, struct sams_slot *to)
{
	if (from && to && from->id == to->id)
		return;
	if (from) {
		__sync_fetch_and_add(&from->moved_out, 1);
		__sync_fetch_and_add(&from->live, -1);
	}
	if (to) {
		__sync_fetch_and_add(&to->moved_in, 1);
		__sync_fetch_and_add(&to->live, 1);
	}
}

/*
 * The kernel charges a task's run to the cgroup in which it finds the task, and tells of a move
 * a moment after it: what is charged in between, at a tick, a switch or by the move itself, is
 * the new cgroup's already. The exact set-up looks at every charge (sched_stat_runtime, just
 * before the cgroup's) where it goes. The first one after a move tells at which counter of the
 * task the cgroups changed over. Whether this charge or the event comes first, and however they
 * overlap: each leaves word before it looks for the other's, and who takes the told one away
 * carries over what the event, which settles at the counter as it stands, put on the wrong side.
 */
static __always_inline u32 in_use(u32 slot_id)
{
	return slot_id && slot_of(slot_id) ? slot_id : 0;
}

static __always_inline u32 place_of_row(struct sams_task *row)
{
	return row && !(row->state & SAMS_ROW_OUTSIDE) ? row->slot_id : 0;
}

static __always_inline int same_move(struct sams_move *a, struct sams_move *b)
{
	return a && a->place == b->place && a->start_ns == b->start_ns;
}

static __always_inline void add_cpu(u32 slot_id, u32 index, u32 state, s64 ns)
{
	struct sams_slot *slot = slot_id ? slot_of(slot_id) : 0;

	if (slot)
		__sync_fetch_and_add(&counters_of(slot, index, state)->column[SAMS_CPU], ns);
}

static __always_inline struct sams_move *move_of(u64 task, enum sams_witness witness)
{
	struct sams_move_key key = {.task = task, .witness = witness};

	return bpf_map_lookup_elem(MAP(moves), &key);
}

/* The cgroups of the task of this move changed over at `since_ns`. */
static __always_inline void carry_over(u64 task, struct sams_move *told, u64 since_ns)
{
	struct sams_move_key key = {.task = task, .witness = SAMS_TOLD};
	struct sams_move move = *told;
	s64 ns = move.at_ns - since_ns;

	if (bpf_map_delete_elem(MAP(moves), &key) || ns <= 0)
		return;
	add_cpu(move.from_id, move.from_index, move.from_state, -ns);
	add_cpu(move.to_id, move.to_index, move.to_state, ns);
}

/* Leave word of a move, before anything is done about it. */
SUBPROGRAM tell_move(u64 task, struct sams_move *move)
{
	struct sams_move_key key = {.task = task, .witness = SAMS_TOLD};
	struct sams_move *told, *found;

	if (!move)
		return 0;
	if (bpf_map_update_elem(MAP(moves), &key, move, BPF_ANY)) {
		struct sams_slot *slot = slot_of(move->to_id ? move->to_id : move->from_id);

		if (slot)
			lose(slot, SAMS_LOST_SPLITS);
		return 0;
	}
	found = move_of(task, SAMS_FOUND);
	told = move_of(task, SAMS_TOLD);
	if (told && same_move(found, move))
		carry_over(task, told, found->at_ns);
	return 0;
}

/* A charge of `delta` ns is about to go to the cgroup of this task. */
static __always_inline void look_at_charge(struct task_struct *task, u64 delta)
{
	struct sams_move_key key = {.task = (u64)task, .witness = SAMS_FOUND};
	struct sams_task *row = row_of(task, TYPED);
	struct sams_move move = {.place = place_of(task)}, *told, *found;
	u32 was = place_of_row(row);

	barrier();
	/* Last: whoever changed the row left word of it before. */
	told = move_of((u64)task, SAMS_TOLD);
	if (!told && move.place == was)
		return;
	move.place = in_use(move.place);
	move.start_ns = LOAD(TYPED, task, start_boottime);
	move.at_ns = LOAD(TYPED, task, se.sum_exec_runtime) - delta;
	found = bpf_map_lookup_elem(MAP(moves), &key);
	if (same_move(found, &move)) {
		move.at_ns = found->at_ns; /* this charge is not the first one there */
	} else if (!same_move(told, &move)) {
		/* A task that exits is not moved any more. */
		if (move.place == in_use(was) ||
		    LOAD(TYPED, task, flags) & PF_EXITING || is_off())
			return;
		bpf_map_update_elem(MAP(moves), &key, &move, BPF_ANY);
	}
	told = move_of((u64)task, SAMS_TOLD);
	if (same_move(told, &move))
		carry_over((u64)task, told, move.at_ns);
	else if (place_of_row(row_of(task, TYPED)) != move.place)
		return; /* the event is still to come */
	bpf_map_delete_elem(MAP(moves), &key);
}

PROGRAM(on_charge, "sched_stat_runtime")
{
	struct task_struct *task = (void *)ARG(0);
	struct css_set *set;
	int i;

	/* Once more if it was moved meanwhile. */
	for (i = 0; i < 2; i++) {
		set = LOAD(TYPED, task, cgroups);
		look_at_charge(task, ARG(1));
		barrier();
		if (LOAD(TYPED, task, cgroups) == set)
			break;
	}
	return 0;
}

/*
 * A process of several threads moves with its group, or with its leader where threads move
 * one by one. After the first thread of a group its row says where it is, and nothing more
 * happens.
 */
static __always_inline void move_process(struct task_struct *task, struct sams_slot *to,
					 u32 slot_id, u32 state)
{
	u64 key = (u64)READ(task, signal);
	struct sams_process *process = bpf_map_lookup_elem(MAP(processes), &key);
	struct sams_slot *from = 0;

	if (!process) {
		if (to && keep_process(task, BARE, to, 0, BPF_NOEXIST))
			count_move(0, to);
		return;
	}
	if (!(process->state & SAMS_ROW_OUTSIDE))
		from = slot_of(process->slot_id);
	count_move(from, to);
	if (!to && !(state & SAMS_ROW_OUTSIDE)) {
		bpf_map_delete_elem(MAP(processes), &key);
		return;
	}
	process->slot_id = slot_id;
	process->state = state;
}

/*
 * One move of cgroup_attach_task: a task, or all threads of a group, which run one image.
 * What would be dear to tell for each thread is told once: the rows of that image in the
 * job it comes to (`inside`), and of descendants that left the job it was in (`outside`).
 */
struct walk {
	u64 at;	  /* thread_node of the next task */
	u64 head; /* where the walk ends; 0: after one task */
	u32 to_id;
	u32 from_id;
	u32 inside;
	u32 outside;
};

/* Arguments: as in `struct walk`, two numbers in one; `group`: all of its threads come along. */
SEPARATE move(u64 key, u64 slots, u64 rows, u32 group)
{
	struct task_struct *task = (void *)key;
	u32 to_id = slots, from_id = slots >> 32, inside = rows, outside = rows >> 32;
	struct sams_slot *to = to_id ? slot_of(to_id) : 0, *from;
	struct sams_task *row = row_of(task, BARE), fresh = {};
	struct sams_move change = {.place = to ? to->id : 0};
	struct columns now;
	int with_process = group || is_leader(task, BARE), was_inside;

	if (READ(task, exit_state) || READ(task, flags) & PF_EXITING)
		return 0; /* the kernel leaves it where it was: cgroup_migrate_add_task() */
	change.start_ns = READ(task, start_boottime);
	if (to) {
		change.to_id = to->id;
		change.to_index = inside;
	}
	if (!row) {
		if (!to)
			return 0;
		fresh.slot_id = to->id;
		fresh.image = SAMS_IMAGE(inside);
		if (has_threads(task, BARE))
			fresh.state = SAMS_ROW_THREADED;
		read_columns(task, BARE, fresh.charged);
		change.at_ns = fresh.charged[SAMS_CPU];
		if (option_exact)
			tell_move(key, &change);
		if (keep_task(task, BARE, &fresh, to) != KEPT) {
			if (option_exact)
				forget_moves(key);
			return 0;
		}
		if (option_exact)
			forget_move(key, SAMS_FOUND);
		if (!fresh.state)
			count_move(0, to);
		else if (with_process)
			move_process(task, to, to->id, 0);
		return 0;
	}
	from = slot_of(row->slot_id);
	was_inside = from && !(row->state & SAMS_ROW_OUTSIDE);
	if (was_inside && to && to->id == from->id)
		return 0; /* between nested cgroups of one job */
	if (!to && !was_inside)
		return 0; /* was outside, stays outside */
	if (from) {
		/* The counters of both cgroups change over at the task's counter as it stands:
		 * a running slice will be charged where the task is when it ends. */
		read_columns(task, BARE, now.of);
		if (option_exact) {
			change.at_ns = now.of[SAMS_CPU];
			change.from_id = from->id;
			change.from_index = row->image >> 32;
			change.from_state = row->state;
			if (!to && row->state & SAMS_ROW_NATIVE) {
				change.to_id = row->slot_id;
				change.to_index = row->slot_id == from_id ? outside : SAMS_OVERFLOW;
				change.to_state = SAMS_ROW_OUTSIDE;
			}
			tell_move(key, &change);
		}
		charge(row, from, &now, BOUNDARY, 0);
	}
	if (to) {
		if (!from || to->id != from->id) {
			row->state &= ~SAMS_ROW_NATIVE;
			if (from)
				__sync_fetch_and_add(&from->tasks, -1);
			__sync_fetch_and_add(&to->tasks, 1);
			row->slot_id = to->id;
		}
		row->state &= ~SAMS_ROW_OUTSIDE;
		row->image = SAMS_IMAGE(inside);
	} else if (row->state & SAMS_ROW_NATIVE) {
		row->state |= SAMS_ROW_OUTSIDE;
		row->image = SAMS_IMAGE(row->slot_id == from_id ? outside : SAMS_OVERFLOW);
	}
	if (option_exact)
		forget_move(key, SAMS_FOUND);
	if (!(row->state & SAMS_ROW_THREADED))
		count_move(was_inside ? from : 0, to);
	else if (with_process)
		move_process(task, to, row->slot_id, row->state);
	if (!to && !(row->state & SAMS_ROW_NATIVE))
		drop_task(key, from);
	return 0;
}

STEP move_next(u32 i __attribute__((unused)), struct walk *walk)
{
	if (!walk->at || walk->at == walk->head)
		return 1;
	move((u64)container((void *)walk->at, struct task_struct, thread_node),
	     (u64)walk->from_id << 32 | walk->to_id, (u64)walk->outside << 32 | walk->inside,
	     !!walk->head);
	walk->at = (u64)READ((struct list_head *)walk->at, next);
	return !walk->head;
}

/* A thread of the group that still has its image: a dead leader has not. */
static __always_inline struct task_struct *with_image(struct task_struct *leader)
{
	struct task_struct *task = leader;
	int i;

	for (i = 0; i < 8 && !READ(task, mm); i++)
		task = container(READ(task, thread_node.next), struct task_struct, thread_node);
	return i < 8 ? task : leader;
}

/* Index of the row, in the job or outside, of what a moving group runs. */
SEPARATE moving_image(u64 leader, u32 slot_id, u32 state)
{
	struct sams_slot *slot = slot_of(slot_id);

	if (!slot)
		return SAMS_OVERFLOW;
	return executable_of(slot, with_image((void *)leader), BARE, state, 0, SCRATCH_MOVE);
}

static __always_inline void plan(struct walk *walk, struct task_struct *task)
{
	u64 key = (u64)READ(task, signal);
	struct sams_process *process = bpf_map_lookup_elem(MAP(processes), &key);
	struct sams_task *row = row_of(task, BARE);
	struct sams_slot *slot = 0;
	u32 state = 0;

	if (walk->to_id) {
		slot = slot_of(walk->to_id);
	} else {
		/* One thread may still be inside when its process is not: its own row goes first. */
		if (row && !(row->state & SAMS_ROW_OUTSIDE))
			slot = slot_of(row->slot_id);
		else if (process && !(process->state & SAMS_ROW_OUTSIDE))
			slot = slot_of(process->slot_id);
		state = SAMS_ROW_OUTSIDE;
	}
	if (!slot)
		return;
	walk->inside = moving_image((u64)task, slot->id, state);
	if (state) {
		walk->from_id = slot->id;
		walk->outside = walk->inside;
	}
}

PROGRAM(on_attach, "cgroup_attach_task")
{
	struct cgroup *cgroup = (void *)ARG(0);
	struct task_struct *task = (void *)ARG(2);
	struct sams_slot *slot;
	u64 begin, cgroup_id;
	struct walk walk = {.outside = SAMS_OVERFLOW};
	u32 *id;

	if (READ(READ(cgroup, root), hierarchy_id) != option_hierarchy || is_off())
		return 0;
	begin = enter();
	cgroup_id = cgroup_kernfs_id(cgroup, TYPED);
	id = bpf_map_lookup_elem(MAP(cgroups), &cgroup_id);
	if (id)
		walk.to_id = *id;
	walk.at = NUMBER(2) + bpf_core_field_offset(struct task_struct, thread_node);
	if (ARG(3)) {
		walk.head = (u64)READ(task, signal) +
			    bpf_core_field_offset(struct signal_struct, thread_head);
		walk.at = (u64)READ((struct list_head *)walk.head, next);
	}
	plan(&walk, (void *)NUMBER(2));
	REPEAT(SAMS_GROUP_THREADS, move_next, walk);
	if (walk.head && walk.at != walk.head && walk.to_id) {
		slot = slot_of(walk.to_id);
		if (slot)
			lose(slot, SAMS_LOST_THREADS);
	}
	leave(begin);
	return 0;
}

/* ---- cgroups come and go ---------------------------------------------------------- */

/* The verifier sees that the place is within the path, whatever the compiler makes of it. */
static __always_inline char byte_at(const char *path, u32 at)
{
	at &= SAMS_CGROUP_PATH - 1;
	barrier_var(at);
	return path[at];
}

static __always_inline int is_digit(char c)
{
	return c >= '0' && c <= '9';
}

/* job_<digits>, or a SLUID: "s" and 13 of Crockford's base 32. */
static __always_inline int is_job_name(const char *path, u32 at)
{
	char c;
	int i;

	if (byte_at(path, at) == 'j' && byte_at(path, at + 1) == 'o' &&
	    byte_at(path, at + 2) == 'b' && byte_at(path, at + 3) == '_') {
		for (i = 4; i < 16; i++) {
			c = byte_at(path, at + i);
			if (!c)
				return i > 4;
			if (!is_digit(c))
				return 0;
		}
		return 0;
	}
	if (byte_at(path, at) != 's')
		return 0;
	for (i = 1; i < 14; i++) {
		c = byte_at(path, at + i);
		if (!is_digit(c) && !(c >= 'A' && c <= 'Z' && c != 'I' && c != 'L' && c != 'O' &&
				      c != 'U'))
			return 0;
	}
	return !byte_at(path, at + 14);
}

/* Length of the folder of a job's cgroup path, without the "/uid_U" of the v1 layout. */
static __always_inline u32 parent_length(const char *path, u32 slash)
{
	u32 at = slash, i;

	for (i = 0; i < 11; i++) {
		if (at < 6)
			return slash;
		if (!is_digit(byte_at(path, at - 1)))
			break;
		at--;
	}
	if (at == slash || at < 5)
		return slash;
	if (byte_at(path, at - 5) == '/' && byte_at(path, at - 4) == 'u' &&
	    byte_at(path, at - 3) == 'i' && byte_at(path, at - 2) == 'd' &&
	    byte_at(path, at - 1) == '_')
		return at - 5;
	return slash;
}

/*
 * FNV-1a of the first `*length` bytes, as `path_hash` in sams_ebpf/layout.py. Length and sum
 * are kept in memory, where the verifier does not follow them: it would else check what
 * comes after once for every length.
 */
static __always_inline u64 hash_path(const char *path, volatile u32 *length, volatile u64 *sum)
{
	u32 i;

	*sum = 0xcbf29ce484222325ULL;
	for (i = 0; i < SAMS_CGROUP_PATH; i++) {
		if (i >= *length)
			break;
		*sum = (*sum ^ (u8)byte_at(path, i)) * 0x100000001b3ULL;
	}
	return *sum;
}

static __always_inline int is_parent(u64 hash)
{
	u32 i;

	for (i = 0; i < SAMS_PARENTS; i++) {
		if (i < option_parents && PARENT_HASH(i) == hash)
			return 1;
	}
	return 0;
}

static __always_inline void note_cgroup(u64 id, struct sams_slot *slot)
{
	if (bpf_map_update_elem(MAP(cgroups), &id, &slot->id, BPF_ANY))
		lose(slot, SAMS_LOST_CGROUPS_FULL);
	else
		__sync_fetch_and_add(&slot->cgroups, 1);
}

/* A new slot for a job's cgroup, recognised at its making; 0 if there is none left. */
static __always_inline struct sams_slot *new_slot(const char *path, u64 hash)
{
	struct sams_slot *slot;
	struct sams_node *all;
	u32 index, id, i;
	u64 *when;

	all = the_node();
	if (!all || all->closed)
		return 0;
	if (bpf_map_pop_elem(MAP(free_slots), &index)) {
		__sync_fetch_and_add(&all->slots_full, 1);
		return 0;
	}
	slot = bpf_map_lookup_elem(MAP(slots), &index);
	if (!slot)
		return 0;
	id = ((slot->id >> 12) + 1) << 12 | INDEX(index);
	__builtin_memset(slot, 0, sizeof(*slot));
	slot->path_hash = hash;
	slot->birth_ns = bpf_ktime_get_boot_ns();
	for (i = 0; i < 4; i++)
		((u32 *)slot->epoch)[i] = bpf_get_prandom_u32();
	bpf_probe_read_kernel_str(slot->path, sizeof(slot->path), path);
	slot->id = id;
	slot->state = SAMS_SLOT_USED;
	index = INDEX(id);
	when = bpf_map_lookup_elem(MAP(remade), &index);
	if (when)
		*when = 0;
	bpf_map_update_elem(MAP(jobs), &hash, &id, BPF_ANY);
	return slot;
}

/*
 * Whether a cgroup that is made at the path of this slot belongs to a later run of the job: a
 * requeued run has the same path. Between the steps of one run the cgroup also goes and comes,
 * but then the run's collector is there and has not ended, or will be in a moment.
 */
static __always_inline int is_over(struct sams_slot *slot)
{
	u32 index = INDEX(slot->id);
	struct sams_claim *claim = bpf_map_lookup_elem(MAP(claims), &index);

	if (claim && claim->slot_id == slot->id)
		return claim->flags & SAMS_CLAIM_ENDED;
	return bpf_ktime_get_boot_ns() - slot->birth_ns > SAMS_SAME_RUN_NS;
}

static __always_inline void note_remade(struct sams_slot *slot)
{
	u32 index = INDEX(slot->id);
	u64 *when = bpf_map_lookup_elem(MAP(remade), &index);

	if (when)
		*when = bpf_ktime_get_boot_ns();
}

/* The cgroup that encloses this one, 0 at the top. */
static __always_inline struct cgroup *enclosing(struct cgroup *cgroup)
{
	struct cgroup_subsys_state *css = READ(cgroup, self.parent);

	return css ? container(css, struct cgroup, self) : 0;
}

static __always_inline void new_cgroup(struct cgroup *cgroup, const char *kernel_path)
{
	u32 which = SCRATCH_NEW, i, *known;
	volatile u32 *length, *slash;
	u64 id = cgroup_kernfs_id(cgroup, TYPED), parent_id, hash;
	struct cgroup *parent = enclosing(cgroup);
	struct sams_slot *slot;
	struct sams_name *room;
	char *path;
	long size;

	if (!parent)
		return;
	parent_id = cgroup_kernfs_id(parent, BARE);
	known = bpf_map_lookup_elem(MAP(cgroups), &parent_id);
	if (known) {
		slot = slot_of(*known);
		if (slot)
			note_cgroup(id, slot);
		return;
	}
	room = bpf_map_lookup_elem(MAP(scratch), &which);
	if (!room)
		return;
	path = room->path;
	size = bpf_probe_read_kernel_str(path, SAMS_CGROUP_PATH, kernel_path);
	if (size < 2 || size > SAMS_CGROUP_PATH - 1)
		return; /* too long to be a job's */
	length = &room->length;
	slash = &room->index;
	*length = size - 1;
	*slash = 0;
	for (i = 0; i < SAMS_CGROUP_PATH; i++) {
		if (i >= *length)
			break;
		if (byte_at(path, i) == '/')
			*slash = i;
	}
	hash = hash_path(path, length, (u64 *)room->script);
	known = bpf_map_lookup_elem(MAP(jobs), &hash);
	slot = known ? slot_of(*known) : 0;
	if (slot && is_over(slot))
		slot = 0;
	if (slot) {
		/* The cgroup of a run that is known already: removed between steps, made again. */
		note_remade(slot);
	} else {
		if (!is_job_name(path, *slash + 1) || (u32)bpf_get_current_uid_gid())
			return;
		*length = parent_length(path, *slash);
		if (!is_parent(hash_path(path, length, (u64 *)room->script)))
			return;
		slot = new_slot(path, hash);
	}
	if (slot)
		note_cgroup(id, slot);
}

PROGRAM(on_mkdir, "cgroup_mkdir")
{
	struct cgroup *cgroup = (void *)ARG(0);
	u64 begin;

	if (READ(READ(cgroup, root), hierarchy_id) != option_hierarchy || is_off())
		return 0;
	begin = enter();
	new_cgroup(cgroup, (const char *)ARG(1));
	leave(begin);
	return 0;
}

PROGRAM(on_rmdir, "cgroup_rmdir")
{
	struct cgroup *cgroup = (void *)ARG(0);
	struct sams_slot *slot;
	u64 id;
	u32 *slot_id;

	if (READ(READ(cgroup, root), hierarchy_id) != option_hierarchy)
		return 0;
	id = cgroup_kernfs_id(cgroup, TYPED);
	slot_id = bpf_map_lookup_elem(MAP(cgroups), &id);
	if (!slot_id)
		return 0;
	slot = slot_of(*slot_id);
	if (!bpf_map_delete_elem(MAP(cgroups), &id) && slot)
		__sync_fetch_and_add(&slot->cgroups, -1);
	return 0;
}

/* ---- run by the collector --------------------------------------------------------- */

/*
 * Charge a task back to its counter where a boundary had been put too far. `seen`: what was
 * charged before the counter was read; another settling since then knows better.
 */
static __always_inline void take_back(struct sams_task *row, struct sams_slot *slot, u64 seen,
				      u64 now_ns)
{
	struct sams_counters *counters = counters_of(slot, row->image >> 32, row->state);

	if (now_ns < seen && replace(&row->charged[SAMS_CPU], seen, now_ns))
		__sync_fetch_and_add(&counters->column[SAMS_CPU], now_ns - seen);
}

/* What became of a row's task: it was settled; the same, but it is on its way from its exit to
 * its last switch; its free went unseen. */
enum found { SETTLED, DYING, UNSEEN };

/* Settle the task of a row, a dead one too whose free is still to come. */
static __always_inline enum found settle_row(u64 key)
{
	struct sams_task *row = bpf_map_lookup_elem(MAP(tasks), &key);
	struct task_struct *task = (void *)key;
	struct columns now;
	struct sams_slot *slot;
	struct mm_struct *mm;
	u64 pages = 0, most, start_ns, seen;
	int exiting, dead;

	if (!row)
		return SETTLED;
	start_ns = row->start_ns;
	seen = *(volatile u64 *)&row->charged[SAMS_CPU];
	slot = slot_of(row->slot_id);
	read_columns(task, BARE, now.of);
	mm = READ(task, mm);
	dead = task_state(task, BARE) & TASK_DEAD;
	exiting = row->state & SAMS_ROW_EXITING;
	/* Last, so that what was read above was this task's; but of a task whose free went unseen
	 * one page may be another's already, and the next not yet. */
	if (!slot || !is_row_of(row, task, BARE) || !is_possible(row, now.of[SAMS_CPU])) {
		/* In the middle of becoming its leader, as no dead thread does; or of being made at
		 * this address, and then looked at when it is done. */
		if (slot && !exiting && READ(task, tgid) == (int)row->tgid && is_leader(task, BARE) &&
		    row->pid != row->tgid)
			return SETTLED;
		/* Freed just now, and seen: its row is gone, or another task's already. */
		row = bpf_map_lookup_elem(MAP(tasks), &key);
		if (!row || row->start_ns != start_ns)
			return SETTLED;
		if (slot) {
			charge_unseen(row, slot);
			__sync_fetch_and_add(&slot->tasks, -1);
		}
		row->slot_id = 0;
		return UNSEEN;
	}
	if (mm && is_leader(task, BARE)) {
		pages = mm_rss_pages(mm);
		most = READ(mm, hiwater_rss);
		if (most > pages)
			pages = most;
	}
	/* Nothing is left to be split: the counter is what its cgroup was charged. */
	if (exiting)
		take_back(row, slot, seen, now.of[SAMS_CPU]);
	charge(row, slot, &now, FORWARD, pages);
	return exiting && !dead ? DYING : SETTLED;
}

/* Take up a task that was in a job's cgroup before the programs were. */
static __always_inline void take_up(struct task_struct *task)
{
	struct sams_task row = {};
	u32 id = place_of(task);
	struct sams_slot *slot = id ? slot_of(id) : 0;

	if (!slot || row_of(task, TYPED))
		return;
	if (LOAD(TYPED, task, exit_state) || LOAD(TYPED, task, flags) & PF_EXITING)
		return;
	row.slot_id = slot->id;
	read_columns(task, TYPED, row.charged);
	row.image = SAMS_IMAGE(executable_of(slot, task, TYPED, 0, 0, SCRATCH_ADOPT));
	if (has_threads(task, TYPED))
		row.state = SAMS_ROW_THREADED;
	if (keep_task(task, TYPED, &row, slot) != KEPT)
		return;
	if (!row.state || keep_process(task, TYPED, slot, 0, BPF_NOEXIST)) {
		__sync_fetch_and_add(&slot->adopted, 1);
		__sync_fetch_and_add(&slot->live, 1);
	}
}

#ifndef SAMS_BCC
/* Over all rows; writes the keys of those whose task has gone unseen, for the collector to
 * delete, and of those whose task is dying, one higher: addresses are even. */
SEC("iter/bpf_map_elem")
int harvest(struct bpf_iter__bpf_map_elem *ctx)
{
	u64 *key_now = ctx->key, key;
	enum found found;

	if (!key_now)
		return 0;
	key = *key_now;
	found = settle_row(key);
	if (found == SETTLED)
		return 0;
	key += found == DYING;
	bpf_seq_write(ctx->meta->seq, &key, sizeof(key));
	return 0;
}

SEC("iter/task")
int adopt(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;

	if (task)
		take_up(task);
	return 0;
}
#else
/*
 * Iterators need kernel BTF. Without it the collector runs these by hand, for one row or
 * task at a time (BPF_PROG_TEST_RUN of raw tracepoints, 1b4d60ec162f ("bpf: Enable
 * BPF_PROG_TEST_RUN for raw_tracepoint") (in v5.10)).
 */
PROGRAM(harvest, "")
{
	return settle_row(ARG(0));
}

#define SAMS_PROCESSES 1024 /* looked through for a process, the latest before us first */
#define SAMS_THREADS   256  /* looked through for one of its threads */

/*
 * Arguments: process and thread, as numbers of the first PID namespace, and which half of
 * the address of the thread's task_struct to return; 0: not found.
 */
PROGRAM(find, "")
{
	struct task_struct *leader = (void *)bpf_get_current_task(), *task;
	int pid = ARG(0), tid = ARG(1), i;

	leader = READ(leader, group_leader);
	for (i = 0; i < SAMS_PROCESSES && READ(leader, pid) != pid; i++)
		leader = container(READ(leader, tasks.prev), struct task_struct, tasks);
	if (i == SAMS_PROCESSES)
		return 0;
	task = leader;
	for (i = 0; i < SAMS_THREADS && READ(task, pid) != tid; i++)
		task = container(READ(task, thread_node.next), struct task_struct, thread_node);
	if (i == SAMS_THREADS)
		return 0;
	return ARG(2) ? (u64)task >> 32 : (u64)task;
}

/* Arguments: the address that `find` gave, and the thread's number again. */
PROGRAM(adopt, "")
{
	struct task_struct *task = (void *)ARG(0);

	if (READ(task, pid) == (int)ARG(1))
		take_up(task);
	return 0;
}
#endif
