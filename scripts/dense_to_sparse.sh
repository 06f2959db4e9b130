#!/usr/bin/env bash
# Makes a dense model sparse in every way that docs/dense_to_sparse.md compares, and one table of what each costs and
# gains: further training, scores on the test sets, FLOPs, and with TIMES how many times as fast it decodes and scores.
#
#   bash scripts/dense_to_sparse.sh lm data/docs-lm-open OUT [FLAGS]         # bash data-prep/prepare_docs_lm.sh open
#   bash scripts/dense_to_sparse.sh mt data/packages-en-de OUT [FLAGS]       # bash data-prep/prepare_packages_mt.sh de
#
# WAYS="mass probability hoyer+probability+distill ...": the parts of a way are joined by +.
#   mass, probability, relative        the rule of t (default: mass)
#   hoyer, l1                          of the model whose last tenth was trained with this penalty on its activations
#   coactivation, clustering, random   the grouping of neurons (default: coactivation)
#   wide, shared, hidden, layers       half as many experts; 2 shared ones; routers of HIDDEN units; a t for each layer
#   task, distill                      FINETUNE updates of the MoE layers, with this loss
#   trained                            the last tenth of the training with experts: of the dense model after 9 tenths
#   half                               of the FFN's FLOPs, in the place of a quarter
#   split                              the paper's way, trained in 8 parts with t = 1, that is lowered afterwards; with
#                                      trained t is steered in its last tenth; goes with a rule and half only
#
# The dense model is that of PRESET=claims (scripts/experiments/presets) after UPDATES (default: the preset's) updates;
# flags of fairseq-train after OUT overrule it. SPLIT=16 experts, HIDDEN=16, FINETUNE=300, CALIBRATION=100000 tokens,
# HOYER=0.1 and L1=0.1 the penalties' coefficients, FREQ: every how many layers (default: the preset's, as models with
# experts have it), SEED=1; TIMES="a way ..." are timed on a machine that must be quiet.
# TENTHS=9: 8 makes it the last two tenths, here and of the penalties.
# What is in OUT already is kept, if it was made with these settings, such as runs of the preset as OUT/dense and
# OUT/split, with their checkpoints of 9 tenths as start.pt; the table, OUT/ways.md, has the ways of the last call.
# Hours: the training's, and some minutes a way; expected: docs/dense_to_sparse.md.
set -euo pipefail
refuse() { echo "dense_to_sparse: $1" >&2; exit 2; }
case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; exit ;; esac
(($# >= 3)) || refuse "usage: bash scripts/dense_to_sparse.sh lm|mt DATA OUT [FLAGS]; --help says more"
task=$1 data=$2 out=$3
. "$(dirname "${BASH_SOURCE[0]}")/find_environment.sh"
split=${SPLIT:-16} tuning=${FINETUNE:-300} preset=${PRESET:-claims} tenths=${TENTHS:-9}
export SEED=${SEED:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
experiment() { python "$root/scripts/run.py" "experiments.$1" "${@:2}"; }

case $task in
  lm) search=() ;;
  mt) task=wmt search=(--generate="--max-tokens 2000") ;;
  *) refuse "the first argument must be lm or mt, got $task" ;;
esac
presets=$root/scripts/experiments/presets/$task
setting() { sed -n "s/^$1 = //p" "$presets/$preset.toml"; }
known=$(cd "$presets" && echo *.toml)
[[ -f $presets/$preset.toml ]] || refuse "PRESET must be one of ${known//.toml/}, got $preset"
compgen -G "$data/bin/dict*.txt" >/dev/null || refuse "DATA must be a folder of data-prep with bin/ in it, got $data"
[[ ! -e $out || -d $out ]] || refuse "OUT must be a folder, got the file $out"
ways=${WAYS-mass probability relative layers shared wide hidden task distill hoyer+probability l1+probability \
  hoyer+probability+distill probability+trained probability+trained+half \
  split split+half split+probability+trained split+probability+trained+half}
known=" mass probability relative hoyer l1 coactivation clustering random wide shared hidden layers task distill \
  trained half split "
has() { [[ +$1+ == *+$2+* ]]; } # WAY PART
split_of() { # WAY: its experts in the place of a dense FFN
  if has "$1" split; then echo 8; elif has "$1" wide; then echo $((split / 2)); else echo "$split"; fi
}
budget_of() { # WAY: how many of them a token takes
  if has "$1" half; then echo $(($(split_of "$1") / 2)); else echo $(($(split_of "$1") / 4)); fi
}
rule_of() { grep -oE 'mass|probability|relative' <<<"$1" || echo mass; } # WAY
[[ $ways == *[^[:space:]]* ]] || refuse "WAYS names no way (see $0)"
for name in SPLIT FINETUNE HIDDEN CALIBRATION FREQ; do
  [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || refuse "$name must be a whole number above 0, got ${!name}"
done
for name in HOYER L1; do
  [[ ${!name:-1} =~ ^[0-9]*\.?[0-9]+(e-?[0-9]+)?$ ]] || refuse "$name must be a number, got ${!name}"
done
for way in $ways; do
  [[ $way == *[^+]* ]] || refuse "WAYS: $way has no parts (see $0)"
  for part in ${way//+/ }; do
    [[ $known == *" $part "* ]] || refuse "WAYS: $part is no part of a way, in $way (see $0)"
    ! has "$way" split || [[ " split trained half mass probability relative " == *" $part "* ]] ||
      refuse "WAYS: split cannot be combined with $part, in $way: it is no conversion"
  done
  for group in "mass probability relative" "coactivation clustering random" "task distill" "hoyer l1"; do
    found=$(grep -cxE "${group// /|}" <<<"${way//+/$'\n'}" || true)
    ((found < 2)) || refuse "WAYS: one of $group at most in a way, got $way"
  done
  ! has "$way" trained || { ! has "$way" hoyer && ! has "$way" l1; } ||
    refuse "WAYS: a penalty cannot be combined with trained, in $way: both are the end of the training"
  ! has "$way" trained || (($(budget_of "$way"))) ||
    refuse "SPLIT=$split is too few for $way: a token would take less than one expert"
done
[[ $tenths =~ ^[1-9]$ ]] || refuse "TENTHS must be a whole number from 1 to 9, got $tenths"
updates=${UPDATES:-$(setting max-update)}
[[ $updates =~ ^[1-9][0-9]*$ ]] && ((updates * tenths >= 10)) ||
  refuse "UPDATES must be a whole number, and TENTHS=$tenths tenths of it 1 at least, got $updates"
last=$((updates - updates * tenths / 10))
flags=("${@:4}" --total-num-update "$updates")
dense=$out/dense freq=${FREQ:-$(setting moe-freq)} # of models with experts: 2 is the flag's default
freq=${freq:-2}
copy() { cp "$1" "$2.part" && mv "$2.part" "$2"; } # whole or not at all
about() { # CHECKPOINT: what it was trained for, and how long
  python -c 'import sys, torch
state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
kind = "with experts" if any(".experts." in name for name in state["model"]) else "dense"
print(state["optimizer_history"][-1]["num_updates"], "updates,", kind)' "$1" 2>/dev/null ||
    refuse "$1 is no checkpoint of a training, or is not whole; copy it again"
}
check_is() { # CHECKPOINT UPDATES MODEL AS
  local got kind=dense
  [[ $3 != split-* ]] || kind="with experts"
  got=$(about "$1")
  [[ $got == "$2 updates, $kind" ]] || refuse "${1%/*} wants $4 of $2 updates, $kind, got ${1##*/} of $got"
}
train() { # MODEL RUN UPDATES [FLAGS], unless it is done
  [[ ! -e $2/done.$3 ]] || return 0
  experiment train "$task" "$preset" "$1" "$data" "$2" "${flags[@]}" --max-update "$3" "${@:4}"
  touch "$2/done.$3"
}
train_to_the_end() { # MODEL RUN, and keep its checkpoint of 9 tenths as RUN/start.pt
  local start=$2/start.pt words=()
  [[ $1 != split-* ]] || words=(--moe-freq "$freq")
  if [[ ! -e $start ]]; then
    train "$1" "$2" $((updates - last)) ${words[@]+"${words[@]}"}
    start=$2/checkpoint_last.pt
  fi
  check_is "$start" $((updates - last)) "$1" "as start.pt its checkpoint"
  [[ -e $2/start.pt ]] || copy "$start" "$2/start.pt"
  train "$1" "$2" "$updates" ${words[@]+"${words[@]}"}
  check_is "$2/checkpoint_last.pt" "$updates" "$1" "its checkpoint"
}
source_of() { # the checkpoint that a way converts
  local run=$dense
  ! has "$1" hoyer || run=$out/hoyer
  ! has "$1" l1 || run=$out/l1
  if has "$1" trained; then echo "$dense/start.pt"; else echo "$run/checkpoint_last.pt"; fi
}
convert() { # WAY SPARSE
  local part budget=0.25 words=()
  for part in ${1//+/ }; do
    case $part in
      mass | probability | relative) words+=(--moe-threshold-rule "$part") ;;
      coactivation | clustering | random) words+=(--grouping "$part") ;;
      task | distill) words+=(--finetune-loss "$part" --finetune-updates "$tuning") ;;
      hidden) words+=(--router-hidden-dim "${HIDDEN:-16}") ;;
      layers) words+=(--per-layer) ;;
      shared) words+=(--shared 2) ;;
      half) budget=0.5 ;;
    esac
  done
  xmoe-convert "$(source_of "$1")" "$2" --split "$(split_of "$1")" --moe-freq "$freq" --seed "$SEED" \
    --calibration "$data" --calibration-tokens "${CALIBRATION:-100000}" --budget "$budget" "${words[@]}"
}
lower() { # WAY: the model that was trained in parts, at its budget afterwards or in the end of its training
  local run=$out/$1 budget
  budget=$(budget_of "$1")
  if ! has "$1" trained; then
    xmoe-threshold "$out/split/checkpoint_last.pt" --data "$data" --valid-tokens 50000 --budget "$budget" \
      --moe-threshold-rule "$(rule_of "$1")" --output "$out/$1.pt"
    return
  fi
  mkdir -p "$run"
  [[ -e $run/checkpoint_last.pt ]] || copy "$out/split/start.pt" "$run/checkpoint_last.pt"
  train split-s8 "$run" "$updates" --moe-freq "$freq" --moe-threshold-rule "$(rule_of "$1")" \
    --moe-target-experts-per-token "$budget"
  copy "$run/checkpoint_last.pt" "$out/$1.pt"
}
train_sparse() { # WAY: as fairseq-train goes on with what xmoe-convert has made; t is steered to its budget
  local run=$out/$1 typed lr
  mkdir -p "$run"
  [[ -e $run/begin.pt ]] || convert "$1" "$run/begin.pt"
  typed=$(sed -n 's/.*"flags of fairseq-train": "\(.*\)".*/\1/p' "$run/begin.json")
  typed=$(sed -E 's/--moe-(threshold|layer-thresholds) [^ ]+//' <<<"$typed")
  lr=$(grep -oP -- '--lr[ =]\K\S+' <<<"${flags[*]}" || setting lr)
  # Where the dense schedule, which falls to 0, was; the routers are not to be balanced.
  # shellcheck disable=SC2086
  train dense "$run" "$last" $typed --moe-freq "$freq" --moe-loss-coeff 0 \
    --moe-target-experts-per-token "$(budget_of "$1")" \
    --finetune-from-model "$run/begin.pt" --lr "$(awk "BEGIN { print $lr * (10 - $tenths) / 10 }")" \
    --warmup-updates 0 --total-num-update "$last"
  copy "$run/checkpoint_last.pt" "$out/$1.pt"
}
score() { # RUN CHECKPOINT TAG
  # shellcheck disable=SC2086
  [[ $1/scores.$3.json -nt $2 ]] ||
    experiment score "$task" "$1" --checkpoint "$2" --splits $splits --no-page ${search[@]+"${search[@]}"}
}

# What is there already must be what the table calls it.
made=$(printf '%s\n' "TENTHS=$tenths" "UPDATES=$updates" "SPLIT=$split" "FINETUNE=$tuning" "HIDDEN=${HIDDEN:-16}" \
  "CALIBRATION=${CALIBRATION:-100000}" "HOYER=${HOYER:-0.1}" "L1=${L1:-0.1}" "FREQ=$freq" "SEED=$SEED" \
  "PRESET=$preset" "task=$task" "DATA=$(realpath "$data")" "FLAGS=${*:4}")
if [[ -e $out/settings && $(<"$out/settings") != "$made" ]]; then
  other=$(grep -vxFf <(echo "$made") "$out/settings" || true) ours=$(grep -vxFf "$out/settings" <<<"$made" || true)
  refuse "$out was made with ${other//$'\n'/ }, and this is ${ours//$'\n'/ }; name another OUT"
fi
mkdir -p "$out"
echo "$made" >"$out/settings"
splits=$(cd "$data/bin" && for file in test*.idx; do echo "${file%%.*}"; done | sort -u)
train_to_the_end dense "$dense"
score "$dense" "$dense/checkpoint_last.pt" last
for way in $ways; do
  for penalty in hoyer l1; do
    has "$way" "$penalty" || continue
    coefficient=${penalty^^}
    mkdir -p "$out/$penalty" && [[ -e $out/$penalty/checkpoint_last.pt ]] ||
      copy "$dense/start.pt" "$out/$penalty/checkpoint_last.pt"
    train dense "$out/$penalty" "$updates" --ffn-sparsity "$penalty" --ffn-sparsity-coeff "${!coefficient:-0.1}"
    score "$out/$penalty" "$out/$penalty/checkpoint_last.pt" last
  done
  if has "$way" split; then
    train_to_the_end split-s8 "$out/split"
    score "$out/split" "$out/split/checkpoint_last.pt" last
    [[ -e $out/$way.pt ]] || lower "$way"
  elif [[ ! -e $out/$way.pt ]]; then
    if has "$way" trained; then train_sparse "$way"; else convert "$way" "$out/$way.pt"; fi
  fi
  score "$dense" "$out/$way.pt" "$way"
  if [[ " ${TIMES:-} " == *" $way "* && ! -e $out/times/$way/benchmark.json ]]; then
    bash "$root/scripts/benchmark_decoding.sh" --dense "$(source_of "$way")" --sparse "$out/$way.pt" --data "$data" \
      --threads 1 --rounds 5 --out "$out/times/$way"
  fi
done
# shellcheck disable=SC2086
experiment compare_conversions "$out" $ways --last "$last"
