/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * What the kernel side and the collector share: the keys and values of the maps.
 * This header owns them; `sams_ebpf/layout.py` mirrors them, and a test compares the
 * two by way of the object's BTF. Times are ns, sizes bytes, if not said otherwise.
 */
#ifndef SAMS_RECORD_H
#define SAMS_RECORD_H

#define SAMS_PATH_MAX	 1024 /* a longer path keeps its end and is marked as cut */
#define SAMS_SCRIPT_MAX	 256
#define SAMS_CGROUP_PATH 256
#define SAMS_PARENTS	 8
#define SAMS_SLOTS	 512
#define SAMS_OVERFLOW	 0xffffffffu /* index of a slot's own overflow row */
#define SAMS_COLUMNS	 9

/* Flags of an executable; the numbers are those of the wire format. */
enum sams_flag {
	SAMS_DELETED = 1,
	SAMS_MEMFD = 2,
	SAMS_CUT = 4,
	SAMS_FOREIGN = 8,
	SAMS_OVERFLOWED = 16,
	SAMS_OUTSIDE = 32,
	SAMS_UNKNOWN = 64,
};

/* State bits of a task's or a process's row. */
enum sams_state {
	SAMS_ROW_OUTSIDE = 1, /* left the job's cgroup, still followed */
	SAMS_ROW_NATIVE = 2,  /* forked inside the job */
	SAMS_ROW_EXITING = 4, /* went through sched_process_exit */
	SAMS_ROW_THREADED = 8, /* its process has a row of its own */
};

enum sams_slot_state {
	SAMS_SLOT_FREE = 0,
	SAMS_SLOT_USED = 1,
};

/* Which tree of cgroups is accounted: v2, or that of a v1 controller. */
enum sams_controller {
	SAMS_V2,
	SAMS_CPUACCT,
	SAMS_CPU_CONTROLLER,
	SAMS_CPUSET,
	SAMS_MEMORY,
	SAMS_DEVICES,
	SAMS_FREEZER,
	SAMS_PIDS,
	SAMS_BLKIO,
};

/* Causes of counted losses; the order is that of `lost` in a slot. */
enum sams_lost {
	SAMS_LOST_TASKS_FULL,	    /* tasks without a row: their CPU went to the overflow row */
	SAMS_LOST_EXECUTABLES_FULL, /* execs counted in the overflow row */
	SAMS_LOST_MISSED_DEATHS,    /* tasks whose free was not seen */
	SAMS_LOST_THREADS,	    /* groups with more threads than one move can settle */
	SAMS_LOST_SPLITS,	    /* boundaries settled without the running slice */
	SAMS_LOST_CGROUPS_FULL,	    /* nested cgroups that could not be noted */
	SAMS_LOST_TRIPPED,	    /* the programs switched themselves off */
	SAMS_LOST_KINDS,
};

/* What one settling charges, in this order, to the columns of a task and of a total. */
enum sams_column {
	SAMS_CPU, /* se.sum_exec_runtime */
	SAMS_UTIME,
	SAMS_STIME,
	SAMS_READ_BYTES,
	SAMS_WRITE_BYTES,
	SAMS_MINOR_FAULTS,
	SAMS_MAJOR_FAULTS,
	SAMS_VOLUNTARY,
	SAMS_INVOLUNTARY,
};

struct sams_counters {
	__s64 column[SAMS_COLUMNS];
	__u64 execs;
	__u64 forks;
	__u64 exits;
	__u64 max_rss_pages;
};

struct sams_total_key {
	__u32 slot_id;
	__u32 index; /* 0, 1, 2, …: the collector counts up until it finds no more */
};

struct sams_total {
	struct sams_counters counters;
	__u64 hash; /* with slot_id the key of its name; 0: given up, never charged */
};

struct sams_name_key {
	__u32 slot_id;
	__u32 zero;
	__u64 hash;
};

struct sams_name {
	__u32 index;
	__u32 flags;
	__u32 length;	     /* of the path, which stands at the end of its field */
	__u32 script_length; /* with the closing zero; 0: no script was seen */
	char path[SAMS_PATH_MAX];
	char script[SAMS_SCRIPT_MAX];
};

/* Which executable a chain of dentries was found to be: see path.h. Where there is no room for
 * another one, its text is looked at each time. */
struct sams_chain_key {
	__u32 slot_id;
	__u32 flags;
	__u64 sum;
};

/* One row per task, threads included; key: the address of its task_struct. */
struct sams_task {
	__u32 slot_id;
	__u32 pid;
	__u32 tgid;
	__u32 state;
	__u64 image; /* index of its total; and execs and forks that are not in the total yet */
	__u64 start_ns; /* start_boottime: tells a row from a later task at the same address */
	__u64 rss_base_pages; /* signal->maxrss when the image began */
	__u64 charged[SAMS_COLUMNS];
	__u64 exit_ns;	  /* CPU at its exit, or after it: what is charged if its free goes unseen */
	__u64 died_pages; /* its process died with it, and is not in the total yet: 1 + peak */
};
#define SAMS_IMAGE(index) ((__u64)(index) << 32)
#define SAMS_IMAGE_EXEC	  0x80000000ULL /* it began by an exec */
#define SAMS_IMAGE_FORKS  0x7fffffffULL
#define SAMS_IMAGE_OWED	  0xffffffffULL

/* Per CPU: the tasks of jobs that exited there, until they have been seen dead. */
#define SAMS_DYING 16
struct sams_dying {
	__u64 noted;		/* so far: the tail of the queue */
	__u64 looked;		/* at so many of them: its head */
	__u64 task[SAMS_DYING]; /* addresses of their task_structs */
};

/* One row per live process that has, or had, several threads; key: the address of its
 * signal_struct. The row of an only thread says all that there is to say. */
struct sams_process {
	__u32 slot_id;
	__u32 state;
};

/* Who saw it that a task's run is charged to another cgroup now: cgroup_attach_task told, or a
 * charge before that was found there. */
enum sams_witness { SAMS_TOLD, SAMS_FOUND };

struct sams_move_key {
	__u64 task; /* address of its task_struct */
	__u64 witness;
};

/* The exact set-up: a task that changes cgroup. */
struct sams_move {
	__u64 start_ns; /* start_boottime */
	__u64 at_ns;	/* told: its counter then; found: its counter where that charge begins */
	__u32 place;	/* slot of the cgroup that it came to, 0: of none */
	__u32 zero;
	/* Told: the rows on both sides. */
	__u32 from_id;
	__u32 from_index;
	__u32 from_state;
	__u32 to_id;
	__u32 to_index;
	__u32 to_state;
};

struct sams_slot {
	__u32 id; /* low 12 bits: place in the table; the rest: how often it was used */
	__u32 state;
	/* What every life touches stands together. */
	__s64 tasks; /* gauge */
	__s64 live;  /* gauge */
	__u64 forks;
	__u64 exits;
	__u64 names;
	__s64 cgroups; /* gauge */
	__u64 adopted;
	__u64 moved_in;
	__u64 moved_out;
	__u64 path_hash;
	__u64 birth_ns; /* CLOCK_BOOTTIME */
	__u8 epoch[16];
	__u64 lost[SAMS_LOST_KINDS];
	struct sams_counters overflow;
	struct sams_counters overflow_outside;
	char path[SAMS_CGROUP_PATH];
};

enum sams_claim_flag {
	SAMS_CLAIM_BY_HAND = 1, /* the slot of a cgroup that was there before it */
	SAMS_CLAIM_ENDED = 2,	/* the run is over: its cgroup, made again, is another run's */
};

/* The collector's side of a slot; the kernel side only reads it. */
struct sams_claim {
	__u32 slot_id;
	__u32 generation; /* writers so far */
	__u32 pid;	  /* of the collector */
	__u32 flags;	  /* enum sams_claim_flag */
	__u64 begin_ns;	    /* wall clock, ns since the Unix epoch */
	__u64 before_ns;    /* the cgroup's CPU when the slot was made */
	__u64 past_ns;	    /* last readings of cgroups of the job that are gone */
	__u64 cgroup_id;    /* the one that `last_ns` was read from */
	__u64 last_ns;
	__u64 last_read_ns; /* CLOCK_BOOTTIME */
};

/* User and system time of an executable as last reported: neither may ever shrink. */
struct sams_split {
	__u64 user_ns;
	__u64 system_ns;
};

/* One row: what concerns all jobs of a set of programs. */
struct sams_node {
	__u32 tripped; /* the programs took more than their limit and are off */
	__u32 closed;  /* a newer set takes the new jobs */
	__u32 stay;    /* loaded to stay until `unload`, jobs or not */
	__u32 refused; /* some task found no room for its row */
	__u64 slots_full;
};

/* Per CPU: what the programs cost, from one event of a job in SAMS_COST_SAMPLE, by chance.
 * Telling that a task is in no job comes before, and is not in it. */
struct sams_cost {
	__u64 events;
	__u64 sampled_ns;
	__u64 window_start_ns;
	__u64 window_ns;
	__s64 clock_offset_ns; /* rq->clock - the CPU clock counter of this CPU */
	__u64 clock_samples;   /* 0: none yet; with BCC what rq->clock_task is behind rq->clock */
};
/* A job's cgroup made again while nobody has claimed its slot yet is taken for the same run's
 * for so long: Slurm lets a requeued job wait longer, unless told otherwise. */
#define SAMS_SAME_RUN_NS 5000000000ULL

#define SAMS_COST_SAMPLE  64
#define SAMS_COST_MOST_NS 50000 /* no event takes longer by itself */

#endif
