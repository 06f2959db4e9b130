#!/usr/bin/env bash
# How long whole updates take (fairseq's trainer: loss, backward, clipping, Adam, statistics, budgets) of a model with
# experts at half the dense FFN's FLOPs, as ratios to the dense model's; and where the time of an update goes.
#
#   bash scripts/benchmark_training.sh [--size demo-mt demo-lm claims-lm] [--threads 1 2] [--rounds 5] [--out FOLDER]
#
# SIZE: demo-mt, demo-lm (presets `tiny`), claims-lm (preset `claims`, 1,024 tokens per update); code (4+2 layers, D 256,
# FFN 1,024, 32 experts in encoder layers 2 and 4); wmt (2+2 layers, D 512, FFN 2,048, 64 experts on both sides).
# In turn in one process: dense, native, plain, dense where only the MoE layers' FFNs are as wide as the experts that
# a token takes, Hugging Face's block (where installed) and fairscale's top-2 in the experts' places, and the paper's way
# (capacity factor s). First --warm-up updates, in which thresholds settle. Batches are made up; reading data is left out.
# About 4 minutes on 2 cores that have nothing else to do; expected: docs/performance.md.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cpu_environment.sh"
exec python "$root/scripts/run.py" benchmarks.training --out "$root/runs/benchmark_training" "$@"
