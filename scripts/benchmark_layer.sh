#!/usr/bin/env bash
# How long an MoE layer takes by each kernel of a CPU, as a ratio to the dense matrix products of the same FLOPs (its
# floor), beside a dense FFN of equal active width, Hugging Face's and fairscale's layers and the paper's way.
#
#   bash scripts/benchmark_layer.sh [--threads 1 2] [--rounds 5] [--only SECTION ...] [--out FOLDER]
#
# SECTION layer: at two sizes, with many and few experts per token. Floor: (T k, D) x (D, F) and back, as many rows as the
# layer computes, and their backward. granularity: the same FLOPs in 8 to 256 experts. decoding: 1 to 1,024 tokens by a
# quarter of the experts, over the dense FFN of all. memory: at the peak. All of a row in turn in one process; figures are
# medians of ratios (quartiles). Hugging Face's block joins in where `pip install transformers` was run.
# About 4 minutes on 2 cores that have nothing else to do; expected: docs/performance.md.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cpu_environment.sh"
exec python "$root/scripts/run.py" benchmarks.layer --out "$root/runs/benchmark_layer" "$@"
