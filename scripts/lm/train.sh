#!/usr/bin/env bash
# Train one language model of the paper's tables. Again the same: go on from the last checkpoint.
#
#   bash scripts/lm/train.sh PRESET MODEL DATA RUN [further flags of fairseq-train]
#   bash scripts/lm/train.sh --help     all presets and models (scripts/experiments: presets, models.toml)
#   bash scripts/lm/train.sh PRESET MODEL DATA RUN --dry-run     what it would take: GB, FLOPs, hours; trains nothing
#   GPUS=n SEED=1        processes (default: the GPUs there are); fewer GPUs take more batches per update. A preset for
#                        the CPU trains there, unless GPUS is given: then on them, in fp32 as it was
#
# DATA is a folder of data-prep, e.g. data/lm-sample; RUN one for checkpoints, run.json, train.log.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../find_environment.sh"
exec python "$root/scripts/run.py" experiments.train lm "$@"
