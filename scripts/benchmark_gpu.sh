#!/usr/bin/env bash
# An MoE layer on a GPU: its rate as a share of the dense products' of the same FLOPs, beside plain autograd,
# torchtitan's way, MegaBlocks and Hugging Face's block (who is not installed, or fails, has the reason in its row); host
# waits in the forward; router and permutation with and without torch.compile. Whether the layer is right: check_gpu.sh.
#
#   bash scripts/benchmark_gpu.sh [--tokens 16384] [--dtype float16] [--out FOLDER]     (--help: all)
# To try it without a GPU:
#   bash scripts/benchmark_gpu.sh --device cpu --tokens 64 --model-dim 64 --expert-dim 32 --rounds 2 --calls 1
#
# bf16, T 16,384, D 768, 64 experts of width 384, 8 experts per token. Aim: 75 % of the dense products' rate.
# Measured on an H200: docs/performance.md.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cpu_environment.sh"
exec python "$root/scripts/run.py" benchmarks.gpu --out "$root/runs/benchmark_gpu" "$@"
