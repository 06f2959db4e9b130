#!/usr/bin/env bash
# BLEU, chrF++ and chrF (sacreBLEU, with signatures), perplexity and routing of a run on validation and test sets.
#
#   bash scripts/wmt/score.sh RUN                 the best checkpoint -> RUN/scores.best.json
#   bash scripts/wmt/score.sh RUN --average 5     the mean of the last 5 -> RUN/scores.average5.json
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$ROOT/scripts/find_environment.sh"
PYTHONWARNINGS=ignore exec python "$ROOT/scripts/run.py" experiments.score wmt "$@"
