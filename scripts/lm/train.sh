#!/usr/bin/env bash
# Train one language model of the paper's tables. Again the same: go on from the last checkpoint.
#
#   bash scripts/lm/train.sh PRESET MODEL DATA RUN [further flags of fairseq-train]
#   bash scripts/lm/train.sh --help     all presets and models (scripts/experiments: presets, models.toml)
#   GPUS=n SEED=1        processes (default: the GPUs there are); fewer GPUs take more batches per update
#
#   PRESET  tiny   CPU                      8 x   128 tokens x update-freq  1 =   1,024 per update,  1,900 updates
#           small  one GPU, about an hour  16 x 1,024 tokens x update-freq  4 =  65,536 per update,  4,000 updates
#           paper  any GPUs                16 x 1,024 tokens x update-freq 16 = 262,144 per update, 60,000 updates
#   MODEL   dense, switch, topk-s4, xmoe-s4, ...; paper: switch is 8 experts x 3072, topk-s2 and xmoe-s2 16 x 1536,
#           xmoe-s4 32 x 768, xmoe-s8 64 x 384
#   DATA    a folder of data-prep, e.g. data/lm-sample
#   RUN     folder for checkpoints, run.json, train.log
#
# small is sized by guess: nobody has timed it. As published (paper, OpenWebText perplexity): switch 20.11, topk-s2
# 19.81, xmoe-s2 19.57, xmoe-s4 19.49, xmoe-s8 19.46, dense 22.61.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$ROOT/scripts/find_environment.sh"
PYTHONWARNINGS=ignore exec python "$ROOT/scripts/run.py" experiments.train lm "$@"
