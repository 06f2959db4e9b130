#!/usr/bin/env bash
# One table and one picture of runs that scripts/{wmt,lm}/train.sh trained and score.sh scored.
#
#   bash scripts/compare.sh RUN... [--against MODEL]    writes compare.md, .json, .png, .html to OUT=runs/compare; also
#                                                     how much better each is than MODEL's, seed by seed
#   SCORES=average5                         those of averaged checkpoints (default: best)
#   QUALITY="test ppl"                      what the picture shows (default: test BLEU, or test ppl)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/find_environment.sh"
exec python "$root/scripts/run.py" experiments.compare "$@" \
  --out "${OUT:-$root/runs/compare}" --scores "${SCORES:-best}" --quality "${QUALITY:-}"
