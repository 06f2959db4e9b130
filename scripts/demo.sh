#!/usr/bin/env bash
# Set up, prepare real text, then train, evaluate and explain an XMoE translation model and an XMoE language
# model. Both train at the same time, one thread each: two threads in one process are slower than one as soon
# as anything else runs on the machine.
#
#   bash scripts/demo.sh              about 5 minutes after set-up on 2 cores
#   bash scripts/demo.sh --compare    the same for a dense model and for top-k routing; about 15 minutes
#   OUT=folder                        where runs and results go; default: runs/demo. A second call resumes.
#
# Translation: 2+2 layers, width 128, FFN 256 cut into s = 4 parts, E = 16 experts (64 wide), threshold 0.5;
#   1,800 updates of at most 600 tokens. Language model: 2 layers, width 128, FFN 512 cut into s = 4,
#   E = 16 experts (128 wide), threshold 0.6; 1,900 updates of 8 x 128 = 1,024 tokens.
# Expected: the table in README.md, "The two commands".
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUT=${OUT:-$ROOT/runs/demo}
case ${1:-} in
  "") MODELS="xmoe" ;;
  --compare) MODELS="xmoe topk dense" ;;
  *) echo "usage: bash scripts/demo.sh [--compare], got $1" >&2; exit 2 ;;
esac
MT_UPDATES=${MT_UPDATES:-1800} LM_UPDATES=${LM_UPDATES:-1900}   # fewer for a quick look; the models then learn less

bash "$ROOT/scripts/setup.sh"
. "$ROOT/scripts/find_environment.sh"
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
# Keep freed memory, instead of asking the kernel for new pages in every update (docs/performance.md).
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000
TOOLS=$ROOT/scripts/tools
MT_DATA=$ROOT/data/mt-sample LM_DATA=$ROOT/data/lm-sample
started=$SECONDS
bash "$ROOT/data-prep/prepare_mt_sample.sh" "$MT_DATA"
bash "$ROOT/data-prep/prepare_lm_sample.sh" "$LM_DATA"

COMMON=(--user-dir "$ROOT/xmoe_fairseq" --cpu --num-workers 0)
TRAINING=(--optimizer adam --lr-scheduler polynomial_decay --clip-norm 1.0 --seed 1 --disable-validation
  --no-epoch-checkpoints --save-interval-updates 500 --keep-interval-updates 1 --log-format json --log-interval 25)

routing() { # flags that make the three models differ; the FFN that is split has the same width in all
  case $1 in
    xmoe) echo "--moe-router threshold --moe-threshold $2" ;;
    topk) echo "--moe-router topk --moe-topk 4" ;;          # k = s: the active width of the dense FFN
    dense) echo "--moe-freq 0" ;;
  esac
}

train_translation() { # MODEL FOLDER
  # shellcheck disable=SC2046
  fairseq-train "$MT_DATA/bin" "${COMMON[@]}" "${TRAINING[@]}" --task translation -s en -t de \
    --arch xmoe_transformer_tiny --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-attention-heads 4 \
    --decoder-attention-heads 4 --encoder-normalize-before --decoder-normalize-before --share-all-embeddings \
    --moe-num-experts 16 --moe-ffn-split 4 $(routing "$1" 0.5) --dropout 0 \
    --criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1 --adam-betas '(0.9, 0.98)' --lr 2e-3 \
    --warmup-updates 200 --total-num-update "$MT_UPDATES" --max-update "$MT_UPDATES" --max-tokens 600 --save-dir "$2"
}

train_language_model() { # MODEL FOLDER
  # shellcheck disable=SC2046
  fairseq-train "$LM_DATA/bin" "${COMMON[@]}" "${TRAINING[@]}" --task language_modeling \
    --arch xmoe_transformer_lm_tiny --decoder-embed-dim 128 --decoder-ffn-embed-dim 512 --decoder-attention-heads 4 \
    --share-decoder-input-output-embed --moe-num-experts 16 --moe-ffn-split 4 $(routing "$1" 0.6) --dropout 0 \
    --criterion moe_cross_entropy --adam-betas '(0.9, 0.95)' --weight-decay 0.1 --lr 6e-3 --warmup-updates 150 \
    --total-num-update "$LM_UPDATES" --max-update "$LM_UPDATES" --tokens-per-sample 128 --batch-size 8 --save-dir "$2"
}

failed() { # WHAT LOG
  echo "demo: $1 failed; the end of $2:" >&2
  tail -n 5 "$2" >&2
  exit 1
}

logged() { # WHAT LOG COMMAND...
  "${@:3}" >"$2" 2>&1 || failed "$1" "$2"
}

train() { # MODEL
  local mt=$OUT/$1/translation lm=$OUT/$1/language_model mt_pid lm_pid
  mkdir -p "$mt" "$lm"
  echo "[demo] training $1: translation and language model, one thread each"
  train_translation "$1" "$mt" >>"$mt/train.log" 2>&1 & mt_pid=$!
  train_language_model "$1" "$lm" >>"$lm/train.log" 2>&1 & lm_pid=$!
  python "$TOOLS/watch.py" "translation ($1):$mt/train.log:$MT_UPDATES:$mt_pid" \
    "language model ($1):$lm/train.log:$LM_UPDATES:$lm_pid"
  wait "$mt_pid" || failed "training the translation model" "$mt/train.log"
  wait "$lm_pid" || failed "training the language model" "$lm/train.log"
}

evaluate() { # MODEL: translations, perplexity and routing statistics, the two tasks side by side
  local mt=$OUT/$1/translation lm=$OUT/$1/language_model mt_pid lm_pid
  echo "[demo] evaluating $1"
  translate "$mt" & mt_pid=$!
  score "$mt" "$lm" & lm_pid=$!
  wait "$mt_pid" && wait "$lm_pid"
}

translate() { # FOLDER
  local split
  for split in test test1; do
    logged translating "$1/$split.out" fairseq-generate "$MT_DATA/bin" "${COMMON[@]}" --path "$1/checkpoint_last.pt" \
      -s en -t de --gen-subset "$split" --beam 4 --max-tokens 4000 --remove-bpe sentencepiece
  done
}

score() { # TRANSLATION-FOLDER LANGUAGE-MODEL-FOLDER
  logged "scoring the language model" "$2/evaluate.log" fairseq-eval-lm "$LM_DATA/bin" "${COMMON[@]}" \
    --path "$2/checkpoint_last.pt" --gen-subset test --tokens-per-sample 128 --context-window 96 --batch-size 32
  logged "validating the language model" "$2/validate.log" fairseq-validate "$LM_DATA/bin" "${COMMON[@]}" \
    --task language_modeling --path "$2/checkpoint_last.pt" --valid-subset test --batch-size 8 --log-format json
  logged "validating the translation model" "$1/validate.log" fairseq-validate "$MT_DATA/bin" "${COMMON[@]}" \
    --task translation --path "$1/checkpoint_last.pt" --valid-subset test,test1 --max-tokens 2000 --log-format json
}

count_experts() { # FOLDER DATA SPLIT
  logged "counting experts" "$1/experts.log" python "$TOOLS/count_experts.py" "$2" --path "$1/checkpoint_last.pt" \
    --subset "$3" --out "$1/experts.json"
}

mkdir -p "$OUT"
# Each background job is a process group of its own, and ends with this script, whatever ends it.
set -m
trap 'for group in $(jobs -p); do kill -- "-$group" 2>/dev/null || true; done' EXIT
for model in $MODELS; do train "$model"; done
for model in $MODELS; do evaluate "$model"; done
python "$TOOLS/bigram.py" --train "$LM_DATA/bpe/train" --test "$LM_DATA/bpe/test" --dict "$LM_DATA/bin/dict.txt" \
  --out "$OUT/bigram.json"
count_experts "$OUT/xmoe/translation" "$MT_DATA/bin" test1
count_experts "$OUT/xmoe/language_model" "$LM_DATA/bin" test
python "$TOOLS/plot_experts.py" "translation=$OUT/xmoe/translation/experts.json" \
  "language model=$OUT/xmoe/language_model/experts.json" --out "$OUT/experts.png"
# shellcheck disable=SC2086
python "$TOOLS/report.py" --runs "$OUT" --models $MODELS --mt-text "$MT_DATA/text"
echo "[demo] $((SECONDS - started)) s after set-up; picture: $OUT/experts.png; table: $OUT/report.md, $OUT/report.json"
