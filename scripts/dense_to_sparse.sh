#!/usr/bin/env bash
# Makes a dense model sparse in every way that docs/dense_to_sparse.md compares: trains it by plain fairseq-train
# (unless it is there), converts it by each grouping of neurons, without and with fine-tuning, and makes a table of
# validation perplexities; then scores all on the test sets by fairseq-generate or fairseq-eval-lm (OUT/scores).
#
#   bash scripts/dense_to_sparse.sh lm data/docs-lm-small OUT       # bash data-prep/prepare_docs_lm.sh small
#   bash scripts/dense_to_sparse.sh mt data/packages-en-de OUT      # bash data-prep/prepare_packages_mt.sh de
#
# The dense model: LAYERS (lm 4; mt 2 and 2), WIDTH=128, FFN=1024, LR=4e-3, UPDATES=1000 of 512 tokens each. The
# conversions: SPLIT=16, GROUPINGS="random clustering coactivation", FINETUNE=150 updates, CALIBRATION=200000 tokens.
# SEED=1. About half an hour on two cores; expected: docs/dense_to_sparse.md. What is in OUT already is kept.
set -euo pipefail
task=${1:?lm or mt} data=${2:?folder of data-prep} out=${3:?folder}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/find_environment.sh"
layers=${LAYERS:-} width=${WIDTH:-128} ffn=${FFN:-1024} lr=${LR:-4e-3}
updates=${UPDATES:-1000} tuning=${FINETUNE:-150} split=${SPLIT:-16} calibration=${CALIBRATION:-200000} seed=${SEED:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

case $task in
  lm) model=(--task language_modeling --arch transformer_lm --decoder-layers "${layers:-4}" --criterion cross_entropy
        --share-decoder-input-output-embed --adam-betas '(0.9, 0.95)' --weight-decay 0.1 --warmup-updates 100
        --tokens-per-sample 128 --batch-size 4) ;;
  mt) model=(--task translation -s en -t de --arch transformer --encoder-layers "${layers:-2}"
        --decoder-layers "${layers:-2}" --encoder-embed-dim "$width" --encoder-ffn-embed-dim "$ffn"
        --encoder-attention-heads 4 --encoder-normalize-before --share-all-embeddings
        --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --adam-betas '(0.9, 0.98)'
        --warmup-updates 150 --max-tokens 512) ;;
  *) echo "dense_to_sparse: the first argument must be lm or mt, got $task" >&2; exit 2 ;;
esac
dense=$out/dense/checkpoint_last.pt
if [[ ! -e $dense || -e $out/dense/unfinished ]]; then
  mkdir -p "$out/dense" && touch "$out/dense/unfinished"
  fairseq-train "$data/bin" --cpu --num-workers 0 "${model[@]}" --decoder-embed-dim "$width" --activation-fn relu \
    --decoder-ffn-embed-dim "$ffn" --decoder-attention-heads 4 --decoder-normalize-before --dropout 0 \
    --optimizer adam --clip-norm 1.0 --lr "$lr" --lr-scheduler polynomial_decay --total-num-update "$updates" \
    --max-update "$updates" --seed "$seed" --disable-validation --no-epoch-checkpoints --log-format simple \
    --log-interval 50 --save-interval-updates 250 --keep-interval-updates 1 --save-dir "$out/dense"
  rm "$out/dense/unfinished"
fi
for grouping in ${GROUPINGS:-random clustering coactivation}; do
  for n in 0 "$tuning"; do
    sparse=$out/$grouping-$n.pt
    [[ -e $sparse ]] || xmoe-convert "$dense" "$sparse" --split "$split" --calibration "$data" \
      --calibration-tokens "$calibration" --grouping "$grouping" --finetune-updates "$n" --seed "$seed"
  done
done
python "$root/scripts/tools/compare_conversions.py" "$out"/*.json
python "$root/scripts/tools/score_conversions.py" "$task" "$data" "$dense" "$out"/*.pt --out "$out/scores"
