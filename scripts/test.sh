#!/usr/bin/env bash
# Set up, then everything that must hold before a change lands: ruff, mypy, pytest.
#
#   bash scripts/test.sh                 all; about 11 minutes on 2 cores after set-up
#   bash scripts/test.sh tests/moe -x    the linters, and pytest with these arguments
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$ROOT/scripts/setup.sh"
PATH=$(cd "${VENV:-$ROOT/.venv}" && pwd)/bin:$PATH
cd "$ROOT"
# A process per core, and one for the while in which others wait; more threads would only fight
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check .
ruff format --check .
mypy
pytest -n "$(python -c 'import os; print(os.cpu_count() + 1)')" --dist worksteal "$@"
