#!/usr/bin/env bash
# What the paper's trainings would take: the tables of docs/paper_runs.md. Nothing is trained; no GPU, no text needed.
#
#   bash scripts/paper_table.sh          a minute; prints two tables
#   UTILISATION=0.3                      assumed share of a GPU's peak
#
# One training: scripts/{wmt,lm}/train.sh paper MODEL DATA RUN --dry-run.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/find_environment.sh"
exec python "$root/scripts/run.py" experiments.paper_table "$@"
