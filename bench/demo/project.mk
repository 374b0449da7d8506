# The demo's project: a library of generated parts, and the programs of the job.
parts := $(patsubst src/%.c,build/%.o,$(wildcard src/part*.c))

all: build/libparts.a solver prepare simulate

build/%.o: src/%.c
	@mkdir -p build
	gcc -O2 -c -o $@ $<

build/libparts.a: $(parts)
	ar rcs $@ $^

solver: src/solver.c
	gcc -O2 -pthread -o $@ $<

prepare: src/stage.c
	gcc -O1 -DPREPARE -o $@ $<

simulate: src/stage.c
	gcc -O2 -o $@ $<
