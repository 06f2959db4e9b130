# shellcheck shell=bash
# Translation data after "get", to be sourced:
#
#   mt_begin SRC TGT NAME OUT PACKAGE...     languages, then as `begin` of steps.sh
#   mt_heldout SPLIT PREFIX...      PREFIX.SRC and .TGT, in order, become fairseq's split `valid`, `test`, `test1`, ...
#   mt_testset SPLIT SET...         the same with WMT test sets, by their names in sacrebleu
#   mt_train PREFIX...              cleaned; pairs with a side in a held-out split, or under a prefix in $HELD, are dropped
#   mt_finish                       vocabulary, pieces, binarised data
#   mt_manifest SOURCES TASK ABOUT PACKAGE...     with the settings, and those in $SETTINGS (NAME=VALUE ...)
#
# Settings: OUT, VOCAB_SIZE, MAX_PIECES (longest training side), CHARACTER_COVERAGE, CLEAN (options of
# clean_pairs.py for the training text), WORKERS, SHARDS. Training pairs are dealt out to SHARDS folders, bin,
# bin1, ..., because fairseq-preprocess keeps the size of every line in memory.
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

mt_begin() {
  SRC=$1 TGT=$2 HELDOUT=()
  VOCAB_SIZE=${VOCAB_SIZE:-32000} MAX_PIECES=${MAX_PIECES:-250} CHARACTER_COVERAGE=${CHARACTER_COVERAGE:-1.0}
  begin "${@:3}"
}

mt_heldout() { # SPLIT PREFIX...
  local split=$1; shift
  HELDOUT+=("$split")
  step "normalize-$split" "${@/%/.$SRC}" "${@/%/.$TGT}" -- "$T/$split".{"$SRC","$TGT"} "$C/$split.json" -- \
    "$PYTHON" "$PREP/clean_pairs.py" --normalize-only --source "${@/%/.$SRC}" --target "${@/%/.$TGT}" \
    --source-out "$T/$split.$SRC" --target-out "$T/$split.$TGT" --counts "$C/$split.json"
}

mt_testset() { # SPLIT SET...
  local split=$1; shift
  step "testset-$split" -- "$R/$split".{"$SRC","$TGT"} "$C/testset-$split.json" -- \
    "$PYTHON" "$PREP/wmt_testsets.py" --sets "$@" --langpair "$SRC-$TGT" --source-out "$R/$split.$SRC" \
    --target-out "$R/$split.$TGT" --counts "$C/testset-$split.json"
  mt_heldout "$split" "$R/$split"
}

mt_train() { # PREFIX...
  local held=("${HELDOUT[@]/#/$T/}" ${HELD[@]+"${HELD[@]}"})
  step clean-train "${@/%/.$SRC}" "${@/%/.$TGT}" "${held[@]/%/.$SRC}" "${held[@]/%/.$TGT}" -- \
    "$T/train".{"$SRC","$TGT"} "$C/train.json" -- \
    "$PYTHON" "$PREP/clean_pairs.py" --source "${@/%/.$SRC}" --target "${@/%/.$TGT}" ${CLEAN[@]+"${CLEAN[@]}"} \
    --heldout-source "${held[@]/%/.$SRC}" --heldout-target "${held[@]/%/.$TGT}" \
    --source-out "$T/train.$SRC" --target-out "$T/train.$TGT" --counts "$C/train.json" --workers "$WORKERS"
}

mt_finish() {
  local split shard sides held train=()
  # One vocabulary for both languages, learnt from the training text only.
  step spm "$T/train".{"$SRC","$TGT"} -- "$OUT/spm".{model,dict.txt} "$C/spm.json" -- \
    "$PYTHON" "$PREP/train_spm.py" --input "$T/train".{"$SRC","$TGT"} --model-prefix "$OUT/spm" \
    --vocab-size "$VOCAB_SIZE" --character-coverage "$CHARACTER_COVERAGE" --counts "$C/spm.json"
  for shard in "${SHARD_NAMES[@]}"; do train+=("$B/train$shard".{"$SRC","$TGT"}); done
  mt_encode train "$MAX_PIECES" "${train[@]}"
  for split in "${HELDOUT[@]}"; do mt_encode "$split" 0 "$B/$split".{"$SRC","$TGT"}; done

  # Held-out splits are in the first folder only: fairseq looks for them nowhere else.
  local tests=() binary
  for split in "${HELDOUT[@]}"; do [ "$split" = valid ] || tests+=("$B/$split"); done
  for shard in "${SHARD_NAMES[@]}"; do
    binary=("$OUT/bin$shard/train.$SRC-$TGT".{"$SRC","$TGT"}.{bin,idx} "$OUT/bin$shard/dict".{"$SRC","$TGT"}.txt)
    sides=() held=()
    if [ -z "$shard" ]; then
      for split in "${HELDOUT[@]}"; do
        held+=("$B/$split".{"$SRC","$TGT"})
        binary+=("$OUT/bin/$split.$SRC-$TGT".{"$SRC","$TGT"}.{bin,idx})
      done
      sides=(--validpref "$B/valid" --testpref "$(IFS=,; echo "${tests[*]}")")
    fi
    step "binarize$shard" "$B/train$shard".{"$SRC","$TGT"} ${held[@]+"${held[@]}"} "$OUT/spm.dict.txt" -- \
      "${binary[@]}" -- \
      binarize "$OUT/bin$shard" --source-lang "$SRC" --target-lang "$TGT" --joined-dictionary \
      --srcdict "$OUT/spm.dict.txt" --trainpref "$B/train$shard" ${sides[@]+"${sides[@]}"}
    BINARY+=("${binary[@]}")
  done
}

mt_encode() { # SPLIT MAX-PIECES OUTPUT...
  local split=$1 limit=$2; shift 2
  step "encode-$split" "$T/$split".{"$SRC","$TGT"} "$OUT/spm.model" -- "$@" "$C/bpe-$split.json" -- \
    "$PYTHON" "$PREP/encode_spm.py" --model "$OUT/spm.model" --max-pieces "$limit" --workers "$WORKERS" \
    --input "$T/$split".{"$SRC","$TGT"} --output "$@" --counts "$C/bpe-$split.json"
}

mt_manifest() { # SOURCES TASK ABOUT PACKAGE...
  local sources=$1 task=$2 about=$3; shift 3
  finish_shards "$sources" "$task" "$about" \
    "vocab_size=$VOCAB_SIZE max_pieces=$MAX_PIECES character_coverage=$CHARACTER_COVERAGE" \
    "$T"/*."$SRC" "$T"/*."$TGT" "$OUT/spm.model" -- "$@"
}
