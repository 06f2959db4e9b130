#!/usr/bin/env bash
# Set up, prepare real text, then train, score and explain an XMoE model that computes half of the dense model's FFN
# FLOPs beside that dense model: two translation models, then two language models, at the same time, one thread each.
#
#   bash scripts/demo.sh              about 7 minutes after set-up on 2 cores
#   bash scripts/demo.sh --compare    the same for top-k routing, too; about 4 minutes more
#   OUT=folder                        where runs and results go; default: runs/demo. A second call resumes.
#   MT_UPDATES=n LM_UPDATES=n         fewer updates, for a quick look; the models then learn less
#
# The models are those of the presets `demo` (scripts/experiments/presets), without validation. It ends in one table, one
# sentence, a picture, and a page to look inside. Expected: README.md, "Five minutes".
set -euo pipefail
XMOE=xmoe-s4-normalized
case ${1:-} in
  "") MODELS="dense $XMOE" ;;
  --compare) MODELS="dense $XMOE topk-s4-normalized" ;;
  -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;;
  *) echo "usage: bash scripts/demo.sh [--compare], got $1" >&2; exit 2 ;;
esac

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

train() { # MODEL/TASK
  local model=${1%/*} run=$OUT/$1 about updates
  case $1 in
    */translation) about=(wmt demo "$model" "$MT_DATA") updates=${MT_UPDATES:-} ;;
    *) about=(lm demo "$model" "$LM_DATA") updates=${LM_UPDATES:-} ;;
  esac
  experiment train "${about[@]}" "$run" --disable-validation --keep-interval-updates 1 \
    ${updates:+--max-update "$updates" --total-num-update "$updates"}
}

score() { # MODEL/TASK: translations, perplexity, experts per token; once for a checkpoint, as its seconds are part of it
  [ ! "$OUT/$1/scores.last.json" -nt "$OUT/$1/checkpoint_last.pt" ] || return 0
  local about=(lm "$OUT/$1" --splits test)
  [ "${1#*/}" = language_model ] || about=(wmt "$OUT/$1" --splits test1 test --generate "--beam 4 --max-tokens 4000")
  experiment score "${about[@]}" --checkpoint last
}

both() { # train|score MODEL/TASK MODEL/TASK: at the same time, so that the seconds can be compared
  local verb=$1 name pids=() shown=()
  shift
  echo "[demo] $verb: $*"
  for name; do
    mkdir -p "$OUT/$name"
    "$verb" "$name" >"$OUT/$name.$verb.log" 2>&1 & pids+=($!) shown+=("$name:$OUT/$name:$!")
  done
  [ "$verb" != train ] || experiment watch "${shown[@]}"
  for name; do
    wait "${pids[0]}" || failed "$verb $name" "$OUT/$name.$verb.log"
    pids=("${pids[@]:1}")
  done
}

mkdir -p "$OUT"
# Each background job is a process group of its own, and ends with this script, whatever ends it.
set -m
trap 'for group in $(jobs -p); do kill -- "-$group" 2>/dev/null || true; done' EXIT
for verb in train score; do
  for task in translation language_model; do both "$verb" "dense/$task" "$XMOE/$task"; done
  [[ $MODELS != *topk* ]] || both "$verb" topk-s4-normalized/translation topk-s4-normalized/language_model
done
experiment bigram --train "$LM_DATA/bpe/train" --test "$LM_DATA/bpe/test" --dict "$LM_DATA/bin/dict.txt" --out "$OUT/bigram.json"
experiment plot_experts --of translation "$OUT/$XMOE/translation/checkpoint_last.pt" "$MT_DATA" test1 \
  --of "language model" "$OUT/$XMOE/language_model/checkpoint_last.pt" "$LM_DATA" test --out "$OUT/experts.png" \
  >"$OUT/experts.log" 2>&1 || failed "counting experts" "$OUT/experts.log"
# shellcheck disable=SC2086
experiment report --runs "$OUT" --models $MODELS --mt-text "$MT_DATA/text"
cat <<END
[demo] $((SECONDS - started)) s after set-up; table: $OUT/report.md, $OUT/report.json; picture: $OUT/experts.png
Which experts each word took: open $OUT/$XMOE/translation/explain.last.html, or of words of your own:
. .venv/bin/activate; xmoe-explain $OUT/$XMOE/translation/checkpoint_last.pt --text "Motion sensor enabled"
END
