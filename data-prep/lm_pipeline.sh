# shellcheck shell=bash
# Language model data after "get", to be sourced:
#
#   lm_begin NAME OUT PACKAGE...        `begin` of steps.sh
#   lm_split OPTIONS-OF-lm_documents.py [-- FILE...]     documents in three splits; FILE: more that it reads
#   lm_finish                           pieces, binarised data
#   lm_manifest SOURCES TASK ABOUT PACKAGE...     with the settings, and those in $SETTINGS (NAME=VALUE ...)
#
# Settings: OUT, GPT2_BPE (folder with GPT-2's encoder.json and vocab.bpe; without it a sentencepiece model of
# VOCAB_SIZE is trained), WORKERS, SHARDS (training documents are dealt out to so many folders, bin, bin1, ...).
#
# A line is a paragraph; fairseq ends it with </s>. An empty line ends a document, so in the binarised data a
# document ends with one more, lone </s>: `--sample-break-mode none` and `complete` read on across documents
# and see the mark, `complete_doc` keeps each sample inside a document, `eos` takes a paragraph at a time.
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

lm_begin() {
  VOCAB_SIZE=${VOCAB_SIZE:-32000}
  begin "$@"
}

lm_split() {
  local options=() inputs=() word files=no
  for word in "$@"; do
    if [ "$word" = -- ]; then files=yes; continue; fi
    [ "$files" = yes ] || options+=("$word")
    [ ! -f "$word" ] || inputs+=("$word")
  done
  step split "${inputs[@]}" -- "$T/docs".{train,valid,test} "$C/documents.json" -- \
    "$PYTHON" "$PREP/lm_documents.py" "${options[@]}" --out-prefix "$T/docs" --counts "$C/documents.json" \
    --workers "$WORKERS"
}

lm_finish() {
  local shard sides held binary
  if [ -n "${GPT2_BPE:-}" ]; then
    DICT=$OUT/gpt2.dict.txt PIECES=("$GPT2_BPE/encoder.json" "$GPT2_BPE/vocab.bpe")
    ENCODER=("$PYTHON" "$PREP/encode_gpt2.py" --encoder-json "${PIECES[0]}" --vocab-bpe "${PIECES[1]}")
    step dictionary "${PIECES[@]}" -- "$DICT" -- "${ENCODER[@]}" --dict "$DICT"
  else
    DICT=$OUT/spm.dict.txt PIECES=("$OUT/spm.model")
    ENCODER=("$PYTHON" "$PREP/encode_spm.py" --model "${PIECES[0]}")
    step spm "$T/docs.train" -- "$OUT/spm".{model,dict.txt} "$C/spm.json" -- \
      "$PYTHON" "$PREP/train_spm.py" --input "$T/docs.train" --model-prefix "$OUT/spm" \
      --vocab-size "$VOCAB_SIZE" --byte-fallback --counts "$C/spm.json"
  fi
  lm_encode train "${SHARD_NAMES[@]/#/$B/train}"
  lm_encode valid "$B/valid"
  lm_encode test "$B/test"

  # Held-out splits are in the first folder only: fairseq looks for them nowhere else.
  for shard in "${SHARD_NAMES[@]}"; do
    binary=("$OUT/bin$shard"/train.{bin,idx} "$OUT/bin$shard/dict.txt") sides=() held=()
    if [ -z "$shard" ]; then
      binary+=("$OUT/bin"/{valid,test}.{bin,idx})
      held=("$B"/{valid,test})
      sides=(--validpref "$B/valid" --testpref "$B/test")
    fi
    step "binarize$shard" "$B/train$shard" ${held[@]+"${held[@]}"} "$DICT" -- "${binary[@]}" -- \
      binarize "$OUT/bin$shard" --only-source --srcdict "$DICT" --trainpref "$B/train$shard" ${sides[@]+"${sides[@]}"}
    BINARY+=("${binary[@]}")
  done
}

lm_encode() { # SPLIT OUTPUT...
  local split=$1; shift
  step "encode-$split" "$T/docs.$split" "${PIECES[@]}" -- "$@" "$C/bpe-$split.json" -- \
    "${ENCODER[@]}" --workers "$WORKERS" --input "$T/docs.$split" --output "$@" --counts "$C/bpe-$split.json"
}

lm_manifest() { # SOURCES TASK ABOUT PACKAGE...
  local sources=$1 task=$2 about=$3 settings=bpe=gpt2 models=()
  shift 3
  [ -n "${GPT2_BPE:-}" ] || { settings="vocab_size=$VOCAB_SIZE"; models=("$OUT/spm.model"); }
  finish_shards "$sources" "$task" "$about" "$settings" "$T"/docs.{train,valid,test} "${models[@]}" -- "$@"
}
