#!/usr/bin/env bash
# Makes a dense model sparse in every way that docs/dense_to_sparse.md compares: trains it by plain fairseq-train
# (unless it is there), converts it by each grouping of neurons, without and with fine-tuning, and makes a table of
# validation perplexities and of scores on the test sets (as scripts/{wmt,lm}/score.sh; OUT/dense/scores.*.json).
#
#   bash scripts/dense_to_sparse.sh lm data/docs-lm-small OUT [FLAGS]    # bash data-prep/prepare_docs_lm.sh small
#   bash scripts/dense_to_sparse.sh mt data/packages-en-de OUT [FLAGS]   # bash data-prep/prepare_packages_mt.sh de
#
# The dense model is that of the presets dense_to_sparse (scripts/experiments/presets: width 128, FFN 1024, 1,000
# updates of 512 tokens); flags of fairseq-train after OUT overrule them. The conversions: SPLIT=16,
# GROUPINGS="random clustering coactivation", FINETUNE=150 updates, CALIBRATION=200000 tokens. SEED=1. About half an
# hour on two cores; expected: docs/dense_to_sparse.md. What is in OUT already is kept.
set -euo pipefail
task=${1:?lm or mt} data=${2:?folder of data-prep} out=${3:?folder}
. "$(dirname "${BASH_SOURCE[0]}")/find_environment.sh"
tuning=${FINETUNE:-150} split=${SPLIT:-16} calibration=${CALIBRATION:-200000} seed=${SEED:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
experiment() { python "$root/scripts/run.py" "experiments.$1" "${@:2}"; }

case $task in
  lm) search=() ;;
  mt) task=wmt search=(--generate="--max-tokens 2000") ;;
  *) echo "dense_to_sparse: the first argument must be lm or mt, got $task" >&2; exit 2 ;;
esac
dense=$out/dense/checkpoint_last.pt
if [[ ! -e $dense || -e $out/dense/unfinished ]]; then
  mkdir -p "$out/dense" && touch "$out/dense/unfinished"
  SEED=$seed experiment train "$task" dense_to_sparse dense "$data" "$out/dense" "${@:4}"
  rm "$out/dense/unfinished"
fi
for grouping in ${GROUPINGS:-random clustering coactivation}; do
  for n in 0 "$tuning"; do
    sparse=$out/$grouping-$n.pt
    [[ -e $sparse ]] || xmoe-convert "$dense" "$sparse" --split "$split" --calibration "$data" \
      --calibration-tokens "$calibration" --grouping "$grouping" --finetune-updates "$n" --seed "$seed"
  done
done
splits=$(cd "$data/bin" && for file in test*.idx; do echo "${file%%.*}"; done | sort -u)
for checkpoint in "$dense" "$out"/*.pt; do
  tag=$(basename "$checkpoint" .pt)
  # shellcheck disable=SC2086
  [[ $out/dense/scores.${tag#checkpoint_}.json -nt $checkpoint ]] ||
    experiment score "$task" "$out/dense" --checkpoint "$checkpoint" --splits $splits --no-page "${search[@]}"
done
experiment compare_conversions "$out"/*.json
