#!/usr/bin/env bash
# BLEU, chrF++ and chrF (sacreBLEU, with signatures), perplexity and routing of a run on validation and test sets.
#
#   bash scripts/wmt/score.sh RUN                 the best checkpoint -> RUN/scores.best.json
#   bash scripts/wmt/score.sh RUN --average 5     the mean of the last 5 -> RUN/scores.average5.json
#   bash scripts/wmt/score.sh RUN --checkpoint last|FILE.pt           another -> scores.last.json, scores.FILE.json
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../find_environment.sh"
exec python "$root/scripts/run.py" experiments.score wmt "$@"
