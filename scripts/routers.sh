#!/usr/bin/env bash
# All ways of choosing experts on equal terms: the table of docs/routers.md.
#
#   bash scripts/routers.sh              language model and translation, two seeds each, half of the dense FFN's FLOPs
#   SEEDS="1 2" TASKS="lm wmt" MODELS="dense,topk-s4 --moe-topk 2"          (default: all)
#   OUT=runs/routers                     the runs, and TASK/compare.md, .json, .png, .html
#
# The demo's data and sizes (preset `routers`). One run per core at a time, one thread each; the first seeds of all
# come first. The same command goes on where it was stopped. About 2 hours on 2 cores, an estimate from single runs; the last part
# takes times, and wants a machine with nothing else to do.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cpu_environment.sh"
[ $# = 0 ] || { echo "usage: bash scripts/routers.sh; got $*" >&2; exit 2; }
OUT=${OUT:-$root/runs/routers}
half="--moe-ffn-split 2 --moe-num-experts 8"   # one expert, half as wide as the dense FFN
if [ -n "${MODELS:-}" ]; then IFS=, read -ra models <<<"$MODELS"; else
  models=(
    dense dense-narrow
    "topk-s4 --moe-topk 2" xmoe-s4-budget xmoe-s4-budget-probability xmoe-s4-budget-relative
    relu-s4 topany-s4 expert-threshold-s4 topp-entropy-s4-budget
    "switch $half" "hash $half" "base $half" "gshard --moe-ffn-split 4 --moe-num-experts 16"
    "topk-s4 --moe-topk 2 --moe-balance all" "topk-s4 --moe-topk 2 --moe-balance bias" "topk-s4 --moe-topk 2 --moe-balance none"
    "xmoe-s4-budget-probability --moe-balance all" "topk-s4-normalized --moe-topk 2"
    "topk-s4 --moe-topk 2 --moe-output-scale 6" "xmoe-s4-budget-probability --moe-output-scale 6"
    "xmoe-s4-budget-probability --moe-combine normalized"
    "topk-s8-shared --moe-topk 3" xmoe-s8-shared-budget-probability
    "topk-s4-cheap --moe-topk 3" xmoe-s4-cheap-budget-probability
  )
fi
encoder_only=("expert-choice --moe-topk 2 --moe-ffn-split 4 --moe-num-experts 16" "seq-topk-s4 --moe-topk 2")
[ -z "${MODELS:-}" ] || encoder_only=()
read -ra seeds <<<"${SEEDS:-1 2}"
read -ra tasks <<<"${TASKS:-lm wmt}"

train() { # TASK SEED: and score
  local models=("${models[@]}") data=$root/data/lm-sample splits=test
  if [ "$1" = wmt ]; then
    data=$root/data/mt-sample splits=test1   # real text; `test` is CLDR's
    models+=("${encoder_only[@]}")
  fi
  python "$root/scripts/run.py" experiments.grid "$1" routers "$data" "$OUT/$1" \
    --models "${models[@]}" --seeds "$2" --splits "$splits"
}

bash "$root/data-prep/prepare_mt_sample.sh" "$root/data/mt-sample"
bash "$root/data-prep/prepare_lm_sample.sh" "$root/data/lm-sample"
for seed in "${seeds[@]}"; do
  for task in "${tasks[@]}"; do train "$task" "$seed"; done
done
for task in "${tasks[@]}"; do
  split=test; [ "$task" = lm ] || split=test1
  first=("$OUT/$task"/*-"${seeds[0]}"/scores.best.json) runs=("$OUT/$task"/*/scores.best.json)   # also those of other calls
  first=("${first[@]%/scores.best.json}") runs=("${runs[@]%/scores.best.json}")
  python "$root/scripts/run.py" benchmarks.trained_models "$OUT/$task/dense-${seeds[0]}" "${first[@]}"
  scores=("$split ppl")
  [ "$task" = lm ] || scores+=("$split BLEU" "$split chrF++")
  python "$root/scripts/run.py" experiments.compare "${runs[@]}" --split "$split" --quality "$split ppl" --out "$OUT/$task" \
    --against "topk-s4 --moe-topk 2" --columns "${scores[@]}" "experts/token" "MoE FLOPs / dense FFN" "max violation" \
    "dead experts, %" "update / the first's" "decoded token / the first's"
done
