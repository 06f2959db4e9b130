#!/usr/bin/env bash
# The paper's claims, tested on real text at a size for a CPU: every table of docs/results.md.
#
#   bash scripts/claims.sh mt|lm           the data, all models with 3 seeds, the seconds of their FFNs; a table and a
#                                          plot of them, and what two of them lose at other thresholds
#   SEEDS="1 2 3" MODELS="dense,xmoe-s4 --moe-threshold 0.8"        (default: all of the table; sweeps only then)
#   OUT=runs/claims-mt                     the runs, and compare.md, .json, .png, sweep-xmoe-s4/, sweep-split-s8/
#
# One run per core at a time, one thread each; `taskset -c 0` leaves the other cores alone. The same command goes
# on where it was stopped. About 2 hours each on 2 cores, an estimate from single runs; mt needs the package sources
# of Debian or Ubuntu.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cpu_environment.sh"
case ${1:-} in
  mt) task=wmt DATA=${DATA:-$root/data/claims-mt} prepare=(prepare_packages_mt.sh de) ;;
  lm) task=lm DATA=${DATA:-$root/data/claims-lm} prepare=(prepare_docs_lm.sh small) ;;
  *) echo "usage: bash scripts/claims.sh mt|lm; got '${1:-}'" >&2; exit 2 ;;
esac
OUT=${OUT:-$root/runs/claims-$1}
# Few pieces, so that the models' time is in their layers and not in the softmax.
VOCAB_SIZE=2000 bash "$root/data-prep/${prepare[0]}" "${prepare[@]:1}" "$DATA"
if [ -n "${MODELS:-}" ]; then IFS=, read -ra models <<<"$MODELS"; else
  models=(dense xmoe-s4 topk-s4 xmoe-s4-budget switch xmoe-s8-budget xmoe-s8 topk-s2 xmoe-s2 split-s8 dense-wide)
fi
read -ra seeds <<<"${SEEDS:-1 2 3}"
python "$root/scripts/run.py" experiments.grid "$task" claims "$DATA" "$OUT" --models "${models[@]}" --seeds "${seeds[@]}"
runs=("$OUT"/*/scores.best.json)   # also those of other calls
runs=("${runs[@]%/scores.best.json}")
first=$OUT/dense-${seeds[0]}; [ -d "$first" ] || first=${runs[0]}
bash "$root/scripts/benchmark_checkpoints.sh" "$first" "${runs[@]}"
QUALITY="test ppl" OUT=$OUT bash "$root/scripts/compare.sh" "${runs[@]}"   # BLEU is next to nothing after 1,000 updates
[ -z "${MODELS:-}" ] || exit 0
for model in xmoe-s4 split-s8; do
  bash "$root/scripts/sweep_threshold.sh" "${seeds[@]/#/$OUT/$model-}" --dense "${seeds[@]/#/$OUT/dense-}" \
    --out "$OUT/sweep-$model"
done
