#!/usr/bin/env bash
# The paper's claims, tested where small models have learnt something: every table and plot of docs/results.md.
#
#   bash scripts/claims.sh lm|mt           the data, the main models with each seed, the others with the first; then in OUT
#     compare.md, .png, .html                quality, also against top-k with 2 experts, seed by seed; experts, FLOPs, seconds
#     training.png                           learning curves, experts per token and the router's entropy over updates
#     rules.md                               models tested with each other's ways to choose, at the same number of experts
#     tokens-MODEL.md, .png                  what kind of token takes many experts
#     sweep-split-s8/                        trained with t = 1, tested with less
#     significance.md                        mt: BLEU and chrF++ against top-k by paired bootstrap
#   SEEDS="1 2 3" MODELS="dense,xmoe-s4 --moe-threshold 0.8"        (default: all of the table; with MODELS compare.* only)
#   OUT=runs/claims-lm DATA=data/docs-lm-open-4k
#
# One run per core at a time, one thread each; `taskset -c 0` leaves the other cores alone. The same command goes
# on where it was stopped. Expected on 2 cores: lm 8 hours, mt 8. The data want the package sources of Debian or
# Ubuntu; the timings a machine with nothing else to do.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cpu_environment.sh"
topk2="topk-s4 --moe-topk 2"
tau="--moe-threshold-rule probability --moe-threshold 0.08"   # what steers to 2 experts in the end
seconds=()   # further columns
[[ ${GPUS:-0} == 0 ]] || { echo "claims: its seconds are of a CPU: leave GPUS out (docs/results.md trains on a GPU)" >&2; exit 2; }
case ${1:-} in
  lm)
    task=lm DATA=${DATA:-$root/data/docs-lm-open-4k} vocabulary=4000 prepare=(prepare_docs_lm.sh open) seeds="1 2 3"
    models=(dense "$topk2" xmoe-s4-budget-probability xmoe-s4-budget topk-s4)
    once=(xmoe-s4 dense-wide switch)
    for experts in 1.3 4; do
      for model in xmoe-s4-budget-probability xmoe-s4-budget; do
        once+=("$model --moe-target-experts-per-token $experts")
      done
    done
    once+=("xmoe-s4 $tau" split-s8 xmoe-s4-normalized relu-s4 xmoe-s8-shared-budget-probability)
    scores=("test ppl") ;;
  mt)
    task=wmt DATA=${DATA:-$root/data/packages-en-de-full} vocabulary=8000 prepare=(prepare_packages_mt.sh de --full)
    seeds="1 2 3" scores=("test BLEU" "test chrF++" "test ppl") seconds=("translated sentence / the first's")
    models=(dense "$topk2" xmoe-s4-budget-probability topk-s4 xmoe-s4-budget
      "xmoe-s4 --moe-capacity-factor 4 --moe-eval-capacity-factor 4 --moe-max-experts-per-token 0") # as the paper
    once=(split-s8 "dense --dropout 0.1") ;;
  *) echo "usage: bash scripts/claims.sh lm|mt; got '${1:-}'" >&2; exit 2 ;;
esac
OUT=${OUT:-$root/runs/claims-$1}
[ -z "${MODELS:-}" ] || { IFS=, read -ra models <<<"$MODELS" && once=(); }
read -ra seeds <<<"${SEEDS:-$seeds}"
run() { python "$root/scripts/run.py" "$@"; }
grid() { run experiments.grid "$task" claims "$DATA" "$OUT" "$@"; }

runs_of() { # MODEL ...: fills `found` with the folders of their runs, which grid.py has named
  local model run
  found=()
  for model in "$@"; do
    model=$(sed -E 's/[^[:alnum:]_.]+/-/g' <<<"$model")
    for run in "$OUT/$model"-*/scores.best.json; do
      if [[ $run =~ /$model-[0-9]+/scores.best.json$ ]]; then found+=("${run%/*}"); fi
    done
  done
}

VOCAB_SIZE=$vocabulary bash "$root/data-prep/${prepare[0]}" "${prepare[@]:1}" "$DATA"
grid --models "${models[@]}" --seeds "${seeds[@]}"
[ ${#once[@]} = 0 ] || grid --models "${once[@]}" --seeds "${seeds[0]}"
runs=("$OUT"/*/scores.best.json) first=("$OUT"/*-"${seeds[0]}"/scores.best.json)   # also those of other calls
runs=("${runs[@]%/*}") first=("${first[@]%/*}")
runs_of dense
run benchmarks.trained_models "${found[0]:-${first[0]}}" "${first[@]}"
runs_of "$topk2"
against=()
[ ${#found[@]} = 0 ] || against=(--against "$topk2")
run experiments.compare "${runs[@]}" --out "$OUT" ${against[@]+"${against[@]}"} --columns "${scores[@]}" "experts/token" \
  "MoE FLOPs / dense FFN" "update / the first's" "decoded token / the first's" \
  ${seconds[@]+"${seconds[@]}"} "parameters (M)"
[ -z "${MODELS:-}" ] || exit 0

routed=("$topk2" xmoe-s4-budget-probability xmoe-s4-budget topk-s4)
[ $task = wmt ] || routed+=(xmoe-s4)
run experiments.plot_training "${runs[@]}" "${against[@]}" --models dense "${routed[@]}" --out "$OUT/training.png"
runs_of "${routed[@]}"
run experiments.compare_rules "${found[@]}" --out "$OUT/rules"
for model in xmoe-s4-budget-probability xmoe-s4-budget; do
  runs_of "$model"
  run experiments.token_kinds "${found[@]}" --out "$OUT/tokens-$model"
done
runs_of dense
dense=("${found[@]}")
runs_of split-s8
bash "$root/scripts/sweep_threshold.sh" "${found[@]}" --dense "${dense[@]}" --out "$OUT/sweep-split-s8"
[ $task = lm ] || run experiments.significance "${runs[@]}" "${against[@]}" --out "$OUT/significance"
