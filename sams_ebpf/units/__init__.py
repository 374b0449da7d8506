"""Unit files and Slurm hooks, put in place by `sams-ebpf install-units`."""
