#!/usr/bin/env bash
# English text for a language model, from the embedded SQLite documentation (public domain); no network.
#
#   bash data-prep/prepare_lm_sample.sh [OUT]        default OUT: data/lm-sample
#   VOCAB_SIZE=4000                                  pieces
#
# Expected (7 s on one core):     documents   paragraphs     words    tokens with </s>
#   train                               407       11,001   424,212    620,899
#   valid                                23          752    33,745     48,433
#   test                                 26          575    24,327     36,032
#   dictionary: 4,008 symbols; unknown characters are spelt as bytes, so <unk> never occurs
#
# A line is a paragraph; fairseq ends it with </s>. An empty line ends a document, so in the binarised data a
# document ends with one more, lone </s>: `--sample-break-mode none` and `complete` read on across documents
# and see the mark, `complete_doc` keeps each sample inside a document, `eos` takes a paragraph at a time.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PREP=$ROOT/data-prep
. "$PREP/steps.sh"

OUT=${1:-$ROOT/data/lm-sample}
VOCAB_SIZE=${VOCAB_SIZE:-4000}
STEPS_DIR=$OUT/.steps
STEP_PREFIX="[lm-sample]"
export OMP_NUM_THREADS=1
find_tools sentencepiece
mkdir -p "$OUT"/{text,bpe,counts}
T=$OUT/text B=$OUT/bpe C=$OUT/counts

documents=$PREP/sample/lm/sqlite3-doc.txt.xz
step split "$documents" -- "$T/docs".{train,valid,test} "$C/documents.json" -- \
  "$PYTHON" "$PREP/lm_documents.py" --input "$documents" --out-prefix "$T/docs" --counts "$C/documents.json"
step spm "$T/docs.train" -- "$OUT/spm".{model,dict.txt} "$C/spm.json" -- \
  "$PYTHON" "$PREP/train_spm.py" --input "$T/docs.train" --model-prefix "$OUT/spm" --vocab-size "$VOCAB_SIZE" \
  --byte-fallback --counts "$C/spm.json"
for split in train valid test; do
  step "encode-$split" "$T/docs.$split" "$OUT/spm.model" -- "$B/$split" "$C/bpe-$split.json" -- \
    "$PYTHON" "$PREP/encode_spm.py" --model "$OUT/spm.model" --input "$T/docs.$split" --output "$B/$split" \
    --counts "$C/bpe-$split.json"
done
binary=("$OUT/bin"/{train,valid,test}.{bin,idx} "$OUT/bin/dict.txt")
step binarize "$B"/{train,valid,test} "$OUT/spm.dict.txt" -- "${binary[@]}" -- \
  binarize "$OUT/bin" --only-source --srcdict "$OUT/spm.dict.txt" \
  --trainpref "$B/train" --validpref "$B/valid" --testpref "$B/test"
step manifest "$PREP/sample/sources.json" "${binary[@]}" -- "$OUT/manifest.json" -- \
  "$PYTHON" "$PREP/manifest.py" --output "$OUT/manifest.json" --task lm --sources "$PREP/sample/sources.json" \
  --about "English technical prose: the SQLite documentation, a paragraph a line" \
  --settings "vocab_size=$VOCAB_SIZE" --packages sentencepiece fairseq \
  --counts "$C"/*.json --files "$T"/* "$OUT/spm.model" "${binary[@]}"
echo "$STEP_PREFIX $OUT/bin is ready after $SECONDS s (steps already done: ${STEPS_SKIPPED:-0})"
