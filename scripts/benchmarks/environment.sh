# shellcheck shell=bash
# What all benchmarks run in; to be sourced. Sets $root, and puts the virtual environment on the PATH.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$root/scripts/find_environment.sh"
export OMP_NUM_THREADS=1   # the threads are set per measurement
# Keep freed memory: glibc gives blocks above 32 MiB back to the kernel at once, and a new page costs more than
# the numbers that are written to it (docs/performance.md).
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000
export PYTHONWARNINGS=ignore
