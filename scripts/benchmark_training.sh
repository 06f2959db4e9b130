#!/usr/bin/env bash
# Tokens per second of whole updates (forward, criterion, backward, clipping, Adam) of a translation model with
# experts, of the same model with every capacity slot computed, and of a dense one; and where an MoE layer's time goes.
#
#   bash scripts/benchmark_training.sh [--threads 1 2] [--per-token 2] [--moe-in both] [--out FOLDER]
#   (--help: all flags)
#
# xmoe_transformer_wmt_en_de, cut to 2+2 layers and a vocabulary of 8,000: width 512, FFN 2,048, 8 heads, MoE in
# encoder layer 2 and decoder layer 2 (--moe-in encoder: as the paper), 64 experts of width 256 (s = 8), about
# 1,600 target tokens per update. Paper's way: capacity factor s. All models take turns in one process; figures are medians.
# About 4 minutes on 2 cores that have nothing else to do; expected: docs/performance.md.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cpu_environment.sh"
export KINETO_LOG_LEVEL=9   # the profiler prints when it starts and stops
exec python "$root/scripts/run.py" benchmarks.training --out "$root/runs/benchmark_training" "$@"
