#!/usr/bin/env bash
# Seconds that the MoE layers of trained models take, on the inputs that they meet in validation text; in a dense
# model the FFNs in the same places. The first RUN is what the others are compared with.
#
#   bash scripts/benchmark_checkpoints.sh RUN... [--rounds 15] [--tokens 4000]
#
# RUNs of scripts/{wmt,lm}/train.sh on the same data; each gets a seconds.json, which scripts/compare.sh shows.
# Forward pass in evaluation, one thread, all runs in turn. Wants a machine with nothing else to do.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cpu_environment.sh"
exec python "$root/scripts/run.py" benchmarks.trained_layers "$@"
