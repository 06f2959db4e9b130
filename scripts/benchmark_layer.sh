#!/usr/bin/env bash
# How long an MoE layer takes, as a ratio to the dense matrix products of the same FLOPs (its floor), to the
# paper's way to execute it, to peers, and to a dense FFN when decoding.
#
#   bash scripts/benchmark_layer.sh [--threads 1 2] [--rounds 5] [--only SECTION ...] [--out FOLDER]
#
# Reference point: T 2,048 tokens, D 512, E 64 experts of width 256, fp32. Floor: (T k, D) x (D, 256) and back, as
# many rows as the layer computes, and their backward. Everything in a row is timed in turn in one process;
# figures are medians of ratios. Hugging Face's block joins in where `pip install transformers` was run.
# About 5 minutes on 2 cores that have nothing else to do; expected: docs/performance.md.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cpu_environment.sh"
exec python "$root/scripts/run.py" benchmarks.layer --out "$root/runs/benchmark_layer" "$@"
