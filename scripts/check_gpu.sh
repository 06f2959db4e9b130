#!/usr/bin/env bash
# On a machine with a GPU: is everything right that only a GPU can show? PASS, FAIL or SKIP a line; about 2 minutes.
#
#   bash scripts/check_gpu.sh                              exit status 0 if nothing failed, else 1
#   bash scripts/check_gpu.sh --only layer "train bf16"    checks whose names begin so
#   bash scripts/check_gpu.sh --device cpu                 what can run without one, two processes for two GPUs; 5 minutes
#
# Card and versions; which kernel each precision takes, and why; a layer against fp64 on the CPU, output and every
# gradient; host waits, kernels and memory against their budgets; two runs bit for bit; fairseq-train in fp32, bf16, fp16
# and amp, recomputed, resumed, generated from; with two GPUs expert parallelism against one process, and a rank that is
# killed; the rate as a share of the dense products'. For a bug report: runs/check_gpu/report.json, and the logs in work/
# beside it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cpu_environment.sh"
export CUBLAS_WORKSPACE_CONFIG=:4096:8   # or torch.use_deterministic_algorithms refuses products
exec python "$root/scripts/run.py" gpu_check.check --out "$root/runs/check_gpu" "$@"
