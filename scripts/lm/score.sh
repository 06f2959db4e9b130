#!/usr/bin/env bash
# Perplexity per token and per word, and routing, of a run on validation and test text.
#
#   bash scripts/lm/score.sh RUN                  the best checkpoint -> RUN/scores.best.json
#   bash scripts/lm/score.sh RUN --average 5      the mean of the last 5 -> RUN/scores.average5.json
#   bash scripts/lm/score.sh RUN --checkpoint last|FILE.pt           another -> scores.last.json, scores.FILE.json
#
# A sample is as long as in training; tiny and small score its last tokens only (a sliding window: 32 of 128, 512 of
# 1,024), paper all of them. A word is what white space delimits, or the end of a line.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../find_environment.sh"
exec python "$root/scripts/run.py" experiments.score lm "$@"
