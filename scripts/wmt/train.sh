#!/usr/bin/env bash
# Train one translation model of the paper's tables. Again the same: go on from the last checkpoint.
#
#   bash scripts/wmt/train.sh PRESET MODEL DATA RUN [further flags of fairseq-train]
#   bash scripts/wmt/train.sh --help     all presets and models (scripts/experiments: presets, models.toml)
#   GPUS=n SEED=1        processes (default: the GPUs there are); fewer GPUs take more batches per update
#
#   PRESET  tiny   CPU                      1 x    600 tokens x update-freq  1 =       600 per update,  1,800 updates
#           small  one GPU, about an hour   1 x  8,192 tokens x update-freq  4 =    32,768 per update, 12,000 updates
#           paper  2 GPUs                   2 x 16,384 tokens x update-freq 32 = 1,048,576 per update, 10 epochs
#   MODEL   dense, switch, topk-s4, xmoe-s4, ...; paper: switch is 32 experts x 2048, topk-s2 and xmoe-s2 64 x 1024,
#           xmoe-s4 128 x 512; experts in the encoder only (tiny: in both)
#   DATA    a folder of data-prep, e.g. data/mt-sample
#   RUN     folder for checkpoints, run.json, train.log
#
# The best checkpoint is that of the best validation BLEU of detokenised text. small is sized by guess: nobody has
# timed it. As published (paper, mean of 5 pairs): topk-s2 28.2 BLEU, xmoe-s2 28.7, xmoe-s4 28.7.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$ROOT/scripts/find_environment.sh"
PYTHONWARNINGS=ignore exec python "$ROOT/scripts/run.py" experiments.train wmt "$@"
