#!/usr/bin/env bash
# Find t of a trained model on validation data, and write a checkpoint that holds it.
#
#   bash scripts/pick_threshold.sh CHECKPOINT --data DATA --budget B        the largest t at which a token takes at
#                                                                           most B experts on average
#   bash scripts/pick_threshold.sh CHECKPOINT --data DATA --max-loss X      the smallest t that costs at most X bits
#                                                                           per token against the checkpoint as it is
#   --per-layer        each layer its own t, so that all take the same number of experts on average
#   --output NEW.pt    default: CHECKPOINT with .picked.pt; every fairseq command opens it
#
#   DATA   a folder of data-prep, e.g. data/lm-sample
#
# The model is loaded once; each t tried is one pass over the validation set. Prints a table of them all.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$ROOT/scripts/find_environment.sh"
PYTHONWARNINGS=ignore exec python "$ROOT/scripts/tools/pick_threshold.py" "$@"
