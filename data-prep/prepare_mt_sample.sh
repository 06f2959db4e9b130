#!/usr/bin/env bash
# English-German data for the demo and first experiments, from the embedded sample and CLDR; no network.
#
#   bash data-prep/prepare_mt_sample.sh [OUT]        default OUT: data/mt-sample
#   CLDR_PAIRS=20000 VOCAB_SIZE=4000                 synthetic training pairs, pieces
#
# Expected (13 s on one core):    pairs
#   train                        42,852   22,852 real, 20,000 from CLDR; 804,810 pieces in both languages
#   valid                           400   200 real, 200 CLDR: small, so that validation is quick
#   test                            500   CLDR
#   test1                           811   real; 3 pieces of 23,162 unknown
#   dictionary: 4,008 symbols, shared by both languages
#
# CLDR pairs are SYNTHETIC (see cldr_pairs.py), so their scores are always given apart from real text's.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PREP=$ROOT/data-prep
. "$PREP/steps.sh"

OUT=${1:-$ROOT/data/mt-sample}
CLDR_PAIRS=${CLDR_PAIRS:-20000}
VOCAB_SIZE=${VOCAB_SIZE:-4000}
VALID_EACH=200
CLDR_TEST=500
MAX_PIECES=250     # longest training side, as in the paper
STEPS_DIR=$OUT/.steps
STEP_PREFIX="[mt-sample]"
export OMP_NUM_THREADS=1
find_tools sentencepiece babel
mkdir -p "$OUT"/{raw,text,bpe,counts}
R=$OUT/raw T=$OUT/text B=$OUT/bpe C=$OUT/counts

# Get: three splits of real text (columns 4 and 5 are English and German), three of CLDR.
for split in train valid test; do
  tsv=$PREP/sample/en-de/$split.tsv.xz
  step "get-$split" "$tsv" -- "$R/real.$split".{en,de} "$C/real-$split.json" -- \
    "$PYTHON" "$PREP/split_tsv.py" --tsv "$tsv" --columns 4 5 --counts "$C/real-$split.json" \
    --source-out "$R/real.$split.en" --target-out "$R/real.$split.de"
done
step cldr -- "$R/cldr".{train,valid,test}.{en,de} "$C/cldr.json" -- \
  "$PYTHON" "$PREP/cldr_pairs.py" --source-lang en --target-lang de --out-prefix "$R/cldr" \
  --train "$CLDR_PAIRS" --valid "$VALID_EACH" --test "$CLDR_TEST" --counts "$C/cldr.json"

# Clean: valid is a small mixture; the two test sets stay apart; training text keeps clear of all of them.
step sample-valid "$R/real.valid".{en,de} -- "$R/real-part.valid".{en,de} -- \
  "$PYTHON" "$PREP/sample_pairs.py" --size "$VALID_EACH" --source "$R/real.valid.en" --target "$R/real.valid.de" \
  --source-out "$R/real-part.valid.en" --target-out "$R/real-part.valid.de"
normalize() { # NAME INPUT-PREFIX...
  local name=$1; shift
  step "normalize-$name" "${@/%/.en}" "${@/%/.de}" -- "$T/$name".{en,de} "$C/$name.json" -- \
    "$PYTHON" "$PREP/clean_pairs.py" --normalize-only --source "${@/%/.en}" --target "${@/%/.de}" \
    --source-out "$T/$name.en" --target-out "$T/$name.de" --counts "$C/$name.json"
}
normalize valid "$R/cldr.valid" "$R/real-part.valid"
normalize test "$R/cldr.test"
normalize test1 "$R/real.test"
held=("$T/valid" "$T/test" "$T/test1" "$R/real.valid")
step clean-train {"$R/real","$R/cldr"}.train.{en,de} "${held[@]/%/.en}" "${held[@]/%/.de}" -- \
  "$T/train".{en,de} "$C/train.json" -- \
  "$PYTHON" "$PREP/clean_pairs.py" \
  --source {"$R/real","$R/cldr"}.train.en --target {"$R/real","$R/cldr"}.train.de \
  --heldout-source "${held[@]/%/.en}" --heldout-target "${held[@]/%/.de}" \
  --source-out "$T/train.en" --target-out "$T/train.de" --counts "$C/train.json"

# Tokenise: one vocabulary for both languages, learnt from the training text only.
step spm "$T/train".{en,de} -- "$OUT/spm".{model,dict.txt} "$C/spm.json" -- \
  "$PYTHON" "$PREP/train_spm.py" --input "$T/train".{en,de} --model-prefix "$OUT/spm" --vocab-size "$VOCAB_SIZE" \
  --counts "$C/spm.json"
for split in train valid test test1; do
  limit=0; [ "$split" != train ] || limit=$MAX_PIECES
  step "encode-$split" "$T/$split".{en,de} "$OUT/spm.model" -- "$B/$split".{en,de} "$C/bpe-$split.json" -- \
    "$PYTHON" "$PREP/encode_spm.py" --model "$OUT/spm.model" --max-pieces "$limit" \
    --input "$T/$split".{en,de} --output "$B/$split".{en,de} --counts "$C/bpe-$split.json"
done

# Binarise: the test splits are `test` (CLDR) and `test1` (real text), e.g. fairseq-generate --gen-subset test1.
binary=("$OUT/bin"/{train,valid,test,test1}.en-de.{en,de}.{bin,idx} "$OUT/bin/dict".{en,de}.txt)
step binarize "$B"/{train,valid,test,test1}.{en,de} "$OUT/spm.dict.txt" -- "${binary[@]}" -- \
  binarize "$OUT/bin" --source-lang en --target-lang de --joined-dictionary --srcdict "$OUT/spm.dict.txt" \
  --trainpref "$B/train" --validpref "$B/valid" --testpref "$B/test,$B/test1"
step manifest "$PREP/sample/sources.json" "${binary[@]}" -- "$OUT/manifest.json" -- \
  "$PYTHON" "$PREP/manifest.py" --output "$OUT/manifest.json" --task mt --sources "$PREP/sample/sources.json" \
  --about "English-German: real software messages, and SYNTHETIC pairs generated from CLDR" \
  --settings "cldr_pairs=$CLDR_PAIRS" "vocab_size=$VOCAB_SIZE" "max_pieces=$MAX_PIECES" \
  --packages babel sentencepiece fairseq \
  --counts "$C"/*.json --files "$T"/*.{en,de} "$OUT/spm.model" "${binary[@]}"
echo "$STEP_PREFIX $OUT/bin is ready after $SECONDS s (steps already done: ${STEPS_SKIPPED:-0})"
