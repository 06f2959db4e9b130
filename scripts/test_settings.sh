#!/usr/bin/env bash
# The tests as other processors would run them: other instructions, other orders of summation, two threads.
# Each setting has an order of the tests of its own; a line for each says PASS or FAIL, and the order's seed.
#
#   bash scripts/test_settings.sh                   all tests in each setting
#   bash scripts/test_settings.sh tests/moe -n 1    pytest with these arguments in each
#
# To repeat a failure: the line's variable, and pytest --randomly-seed=SEED. Exit status 1 if a setting failed.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$ROOT/scripts/setup.sh"
PATH=$(cd "${VENV:-$ROOT/.venv}" && pwd)/bin:$PATH
cd "$ROOT"
export OMP_WAIT_POLICY=passive   # a thread that waits sleeps: two a process are more than there are cores
unset MKL_CBWR ATEN_CPU_CAPABILITY OMP_NUM_THREADS
cores=$(python -c 'import os; print(os.cpu_count())')
status=0
lines=()
settings=(
    OMP_NUM_THREADS=1   # as scripts/test.sh
    OMP_NUM_THREADS=2
    MKL_CBWR=COMPATIBLE
    ATEN_CPU_CAPABILITY=default
    ATEN_CPU_CAPABILITY=avx2
)
for setting in "${settings[@]}"; do
    seed=$RANDOM
    result=PASS
    env "$setting" pytest -n "$cores" --dist worksteal "--randomly-seed=$seed" "$@" || { result=FAIL; status=1; }
    lines+=("$result $setting --randomly-seed=$seed")
    echo "${lines[-1]}"
done
printf '%s\n' "" "${lines[@]}"
exit "$status"
