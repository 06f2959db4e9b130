#!/usr/bin/env bash
# Set up, prepare real text, then train, evaluate and explain an XMoE translation model and an XMoE language
# model. Both train at the same time, one thread each: two threads in one process are slower than one as soon
# as anything else runs on the machine.
#
#   bash scripts/demo.sh              about 5 minutes after set-up on 2 cores
#   bash scripts/demo.sh --compare    the same for a dense model and for top-k routing; about 15 minutes
#   OUT=folder                        where runs and results go; default: runs/demo. A second call resumes.
#
# The models are those of the presets `tiny` (scripts/experiments/presets), without validation: 16 experts of a quarter
# of the dense FFN's width, threshold 0.5 (translation) and 0.6 (language model).
# Expected: the table in README.md, "The two commands".
set -euo pipefail
case ${1:-} in
  "") MODELS="xmoe-s4" ;;
  --compare) MODELS="xmoe-s4 topk-s4 dense" ;;
  *) echo "usage: bash scripts/demo.sh [--compare], got $1" >&2; exit 2 ;;
esac
# MT_UPDATES=n LM_UPDATES=n: fewer for a quick look; the models then learn less
mt_flags=(${MT_UPDATES:+--max-update "$MT_UPDATES" --total-num-update "$MT_UPDATES"})
lm_flags=(${LM_UPDATES:+--max-update "$LM_UPDATES" --total-num-update "$LM_UPDATES"})

here=$(dirname "${BASH_SOURCE[0]}")
bash "$here/setup.sh"
. "$here/cpu_environment.sh"
OUT=${OUT:-$root/runs/demo} MT_DATA=$root/data/mt-sample LM_DATA=$root/data/lm-sample
started=$SECONDS
bash "$root/data-prep/prepare_mt_sample.sh" "$MT_DATA"
bash "$root/data-prep/prepare_lm_sample.sh" "$LM_DATA"

experiment() { # MODULE ARGUMENTS...
  python "$root/scripts/run.py" "experiments.$1" "${@:2}"
}

failed() { # WHAT LOG
  echo "demo: $1 failed; the end of $2:" >&2
  tail -n 5 "$2" >&2
  exit 1
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
  experiment score wmt "$mt" --checkpoint last --splits test test1 \
    --generate="--beam 4 --max-len-a 0 --max-len-b 200 --max-tokens 4000" >"$mt.score.log" 2>&1 & mt_pid=$!
  experiment score lm "$lm" --checkpoint last --splits test >"$lm.score.log" 2>&1 & lm_pid=$!
  wait "$mt_pid" || failed "scoring the translation model" "$mt.score.log"
  wait "$lm_pid" || failed "scoring the language model" "$lm.score.log"
}

mkdir -p "$OUT"
# Each background job is a process group of its own, and ends with this script, whatever ends it.
set -m
trap 'for group in $(jobs -p); do kill -- "-$group" 2>/dev/null || true; done' EXIT
for model in $MODELS; do train "$model"; done
for model in $MODELS; do evaluate "$model"; done
experiment bigram --train "$LM_DATA/bpe/train" --test "$LM_DATA/bpe/test" --dict "$LM_DATA/bin/dict.txt" --out "$OUT/bigram.json"
experiment plot_experts --of translation "$OUT/xmoe-s4/translation/checkpoint_last.pt" "$MT_DATA" test1 \
  --of "language model" "$OUT/xmoe-s4/language_model/checkpoint_last.pt" "$LM_DATA" test --out "$OUT/experts.png" \
  >"$OUT/experts.log" 2>&1 || failed "counting experts" "$OUT/experts.log"
# shellcheck disable=SC2086
experiment report --runs "$OUT" --models $MODELS --mt-text "$MT_DATA/text"
echo "[demo] $((SECONDS - started)) s after set-up; picture: $OUT/experts.png; table: $OUT/report.md, $OUT/report.json"
