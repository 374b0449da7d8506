/* Where both sides of an exec leave their readings: an array of these in one file. */
#ifndef SPLIT_H
#define SPLIT_H
struct split {
	long long before; /* CPU clock of the process, its last act before execve */
	long long after;  /* the same clock, its first act in the new image */
	long long total;  /* the same clock when it is dead and has left its CPU */
};
#endif
