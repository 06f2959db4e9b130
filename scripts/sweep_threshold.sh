#!/usr/bin/env bash
# Trained models at other thresholds: perplexity on the validation set, experts per token, MoE FLOPs and seconds.
#
#   bash scripts/sweep_threshold.sh RUN... [--thresholds T ...] [--dense RUN...] [--out FOLDER]
#
# RUNs of scripts/{wmt,lm}/train.sh of one model, which differ in the seed; --dense: those of the dense model, to
# compare with. Prints a table, mean and standard deviation over RUNs, and writes FOLDER/sweep.md, .json, .png.
# Thresholds are t or tau of the model's --moe-threshold-rule, eight from few experts to all unless they are given.
# Each t is one pass over the validation set. Seconds want a machine with nothing else to do.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cpu_environment.sh"
exec python "$root/scripts/run.py" benchmarks.sweep --out "$root/runs/sweep" "$@"
