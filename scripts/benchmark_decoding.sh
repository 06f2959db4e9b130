#!/usr/bin/env bash
# What a dense model made sparse gains in time: decoding (one token after the other) and scoring (all at once) with
# the whole model, dense and sparse in turn in one process, batch 1, 8, 64; and the FFN alone at 25 % of its experts.
#
#   bash scripts/benchmark_decoding.sh --shape [LAYERS D FFN EXPERTS] [--threads 1 2] [--rounds 5] [--out FOLDER]
#   bash scripts/benchmark_decoding.sh --dense DENSE.pt --sparse SPARSE.pt --data DATA [--threshold T] [...]
#
# --shape: an FFN-heavy language model with random weights (6 512 8192 32, with a vocabulary of 8,000), t such that a
# token takes a quarter of the experts. With checkpoints of xmoe-convert: their own sizes, and t unless given, on
# validation text. Figures are medians of ratios, sparse over dense; "at most" is what routers and experts that took no
# time would give. About 4 minutes on 2 cores that have nothing else to do; expected: docs/dense_to_sparse.md.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cpu_environment.sh"
exec python "$root/scripts/run.py" benchmarks.decoding --out "$root/runs/benchmark_decoding" "$@"
