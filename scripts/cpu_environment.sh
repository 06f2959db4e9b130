# shellcheck shell=bash
# To be sourced: find_environment.sh, for what trains and times models on a CPU. One thread, unless a measurement sets
# more. Freed memory is kept: glibc gives blocks above 32 MiB back to the kernel at once, and a new page costs more
# than the numbers that are written to it (docs/performance.md).
. "$(dirname "${BASH_SOURCE[0]}")/find_environment.sh"
export OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000
