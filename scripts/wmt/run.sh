#!/usr/bin/env bash
# From two files of parallel text to a scored translation model, in one command. The same command goes on after a stop.
#
#   bash scripts/wmt/run.sh --source a.en --target a.de OUT                      tiny: on the CPU, in minutes
#   bash scripts/wmt/run.sh --tsv pairs.tsv --columns 1 2 --preset small OUT     a column each; on a GPU
#   bash scripts/wmt/run.sh --help               all flags, presets and models
#   GPUS=n SEED=1        as for train.sh         WORKERS=cores     processes that prepare text
#
# OUT/data is a folder of data-prep, OUT/MODEL one of train.sh; OUT/report.md the table. Validation and test are held
# out, or given (docs/your_data.md). A token computes half of the dense FFN, unless --model says otherwise.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../own_text.sh"
. "$root/data-prep/mt_pipeline.sh"

columns() { # SPLIT TSV SOURCE... TARGET...: sets sources and targets, of a table its two columns
  local split=$1 tsv=$2; shift 2
  originals+=(${tsv:+"$tsv"} "$@")
  sources=("${@:1:$#/2}") targets=("${@:$#/2+1}")
  [ -n "$tsv" ] || return 0
  sources=("$R/$split.columns.$SRC") targets=("$R/$split.columns.$TGT")
  step "columns-$split" "$tsv" -- "${sources[@]}" "${targets[@]}" -- \
    "$PYTHON" "$PREP/split_tsv.py" --tsv "$tsv" --columns "${TSV_COLUMNS[@]}" \
    --source-out "${sources[@]}" --target-out "${targets[@]}"
}

clean() { # SPLIT OPTION-OF-clean_pairs.py...: sources and targets become R/SPLIT.SRC and .TGT
  local split=$1 inputs=("${sources[@]}" "${targets[@]}") word; shift
  for word in "$@"; do [ ! -f "$word" ] || inputs+=("$word"); done
  step "clean-$split" "${inputs[@]}" -- "$R/$split".{"$SRC","$TGT"} "$C/clean-$split.json" -- \
    "$PYTHON" "$PREP/clean_pairs.py" --source "${sources[@]}" --target "${targets[@]}" "$@" \
    --source-out "$R/$split.$SRC" --target-out "$R/$split.$TGT" --counts "$C/clean-$split.json"
}

given() { # SPLIT TSV SOURCE... TARGET...: a set of one's own, if there is one, of which nothing is dropped
  [ -n "$2${3:-}" ] || { hold_out+=("$1"); return; }
  columns "$@"
  clean "$1" --normalize-only
  mt_heldout "$1" "$R/$1"
}

prepare() {
  local originals=() sources targets hold_out=() outputs=() held train split
  mt_begin "${LANGUAGES[@]}" "$NAME" "$DATA" sentencepiece
  given valid "$VALID_TSV" ${VALID_SOURCE[@]+"${VALID_SOURCE[@]}" "${VALID_TARGET[@]}"}
  given test "$TEST_TSV" ${TEST_SOURCE[@]+"${TEST_SOURCE[@]}" "${TEST_TARGET[@]}"}
  columns all "$TSV" ${SOURCE[@]+"${SOURCE[@]}" "${TARGET[@]}"}
  held=(${HELDOUT[@]+"${HELDOUT[@]/#/$T/}"}) train=$R/all
  clean all --target-chars auto --workers "$WORKERS" --heldout-source ${held[@]+"${held[@]/%/.$SRC}"} \
    --heldout-target ${held[@]+"${held[@]/%/.$TGT}"}
  if [ ${#hold_out[@]} -gt 0 ]; then
    for split in train "${hold_out[@]}"; do outputs+=("$R/held-out.$split".{"$SRC","$TGT"}); done
    step hold-out "$R/all".{"$SRC","$TGT"} -- "${outputs[@]}" "$C/hold-out.json" -- \
      "$PYTHON" "$PREP/hold_out_pairs.py" --source "$R/all.$SRC" --target "$R/all.$TGT" --languages "$SRC" "$TGT" \
      --out-prefix "$R/held-out" --splits "${hold_out[@]}" --counts "$C/hold-out.json" --workers "$WORKERS"
    for split in "${hold_out[@]}"; do mt_heldout "$split" "$R/held-out.$split"; done
    train=$R/held-out.train
  fi
  CLEAN=(--target-chars auto)
  mt_train "$train"
  mt_finish
  step sources "${originals[@]}" -- "$OUT/sources.json" -- \
    "$PYTHON" "$PREP/folder_files.py" --files "${originals[@]}" --output "$OUT/sources.json"
  mt_manifest "$OUT/sources.json" folder "$SRC-$TGT: files of one's own" sentencepiece fairseq
}

own_text wmt "$@"
