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
#   E = 16 experts (128 wide), threshold 0.6; 1,900 updates of 8 x 128 = 1,024 tokens. These are the presets `tiny`
#   (scripts/experiments/presets), without validation.
# Expected: the table in README.md, "The two commands".
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUT=${OUT:-$ROOT/runs/demo}
case ${1:-} in
  "") MODELS="xmoe-s4" ;;
  --compare) MODELS="xmoe-s4 topk-s4 dense" ;;
  *) echo "usage: bash scripts/demo.sh [--compare], got $1" >&2; exit 2 ;;
esac
# MT_UPDATES=n LM_UPDATES=n: fewer for a quick look; the models then learn less
mt_flags=(${MT_UPDATES:+--max-update "$MT_UPDATES" --total-num-update "$MT_UPDATES"})
lm_flags=(${LM_UPDATES:+--max-update "$LM_UPDATES" --total-num-update "$LM_UPDATES"})

bash "$ROOT/scripts/setup.sh"
. "$ROOT/scripts/find_environment.sh"
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
# Keep freed memory, instead of asking the kernel for new pages in every update (docs/performance.md).
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000
MT_DATA=$ROOT/data/mt-sample LM_DATA=$ROOT/data/lm-sample
started=$SECONDS
bash "$ROOT/data-prep/prepare_mt_sample.sh" "$MT_DATA"
bash "$ROOT/data-prep/prepare_lm_sample.sh" "$LM_DATA"

COMMON=(--user-dir "$ROOT/xmoe_fairseq" --cpu --num-workers 0)

experiment() { # MODULE ARGUMENTS...
  python "$ROOT/scripts/run.py" "experiments.$1" "${@:2}"
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
  local mt=$OUT/$1/translation lm=$OUT/$1/language_model mt_pid lm_pid flags=(--disable-validation --keep-interval-updates 1)
  mkdir -p "$mt" "$lm"
  echo "[demo] training $1: translation and language model, one thread each"
  experiment train wmt tiny "$1" "$MT_DATA" "$mt" "${flags[@]}" "${mt_flags[@]}" >"$mt.log" 2>&1 & mt_pid=$!
  experiment train lm tiny "$1" "$LM_DATA" "$lm" "${flags[@]}" "${lm_flags[@]}" >"$lm.log" 2>&1 & lm_pid=$!
  experiment watch "translation ($1):$mt:$mt_pid" "language model ($1):$lm:$lm_pid"
  wait "$mt_pid" || failed "training the translation model" "$mt.log"
  wait "$lm_pid" || failed "training the language model" "$lm.log"
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
  logged "counting experts" "$1/experts.log" experiment count_experts "$2" --path "$1/checkpoint_last.pt" \
    --subset "$3" --out "$1/experts.json"
}

mkdir -p "$OUT"
# Each background job is a process group of its own, and ends with this script, whatever ends it.
set -m
trap 'for group in $(jobs -p); do kill -- "-$group" 2>/dev/null || true; done' EXIT
for model in $MODELS; do train "$model"; done
for model in $MODELS; do evaluate "$model"; done
experiment bigram --train "$LM_DATA/bpe/train" --test "$LM_DATA/bpe/test" --dict "$LM_DATA/bin/dict.txt" --out "$OUT/bigram.json"
count_experts "$OUT/xmoe-s4/translation" "$MT_DATA/bin" test1
count_experts "$OUT/xmoe-s4/language_model" "$LM_DATA/bin" test
experiment plot_experts "translation=$OUT/xmoe-s4/translation/experts.json" \
  "language model=$OUT/xmoe-s4/language_model/experts.json" --out "$OUT/experts.png"
# shellcheck disable=SC2086
experiment report --runs "$OUT" --models $MODELS --mt-text "$MT_DATA/text"
echo "[demo] $((SECONDS - started)) s after set-up; picture: $OUT/experts.png; table: $OUT/report.md, $OUT/report.json"
