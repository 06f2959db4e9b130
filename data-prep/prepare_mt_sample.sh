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
. "$(dirname "${BASH_SOURCE[0]}")/mt_pipeline.sh"

CLDR_PAIRS=${CLDR_PAIRS:-20000}
VOCAB_SIZE=${VOCAB_SIZE:-4000}
VALID_EACH=200 CLDR_TEST=500   # choices
mt_begin en de mt-sample "${1:-}" sentencepiece babel

# Get: three splits of real text (columns 4 and 5 are English and German), three of CLDR.
for split in train valid test; do
  tsv=$PREP/sample/en-de/$split.tsv.xz
  step "get-$split" "$tsv" -- "$R/real.$split".{en,de} "$C/real-$split.json" -- \
    "$PYTHON" "$PREP/split_tsv.py" --tsv "$tsv" --columns 4 5 --group-column 1 --counts "$C/real-$split.json" \
    --source-out "$R/real.$split.en" --target-out "$R/real.$split.de"
done
step cldr -- "$R/cldr".{train,valid,test}.{en,de} "$C/cldr.json" -- \
  "$PYTHON" "$PREP/cldr_pairs.py" --source-lang en --target-lang de --out-prefix "$R/cldr" \
  --train "$CLDR_PAIRS" --valid "$VALID_EACH" --test "$CLDR_TEST" --counts "$C/cldr.json"

# Clean: valid is a small mixture; the two test sets stay apart; training text keeps clear of all of them.
step sample-valid "$R/real.valid".{en,de} -- "$R/real-part.valid".{en,de} -- \
  "$PYTHON" "$PREP/sample_pairs.py" --size "$VALID_EACH" --source "$R/real.valid.en" --target "$R/real.valid.de" \
  --source-out "$R/real-part.valid.en" --target-out "$R/real-part.valid.de"
mt_heldout valid "$R/cldr.valid" "$R/real-part.valid"
mt_heldout test "$R/cldr.test" # fairseq-generate --gen-subset test; real text is test1
mt_heldout test1 "$R/real.test"
HELD=("$R/real.valid")
mt_train {"$R/real","$R/cldr"}.train
mt_finish
SETTINGS="cldr_pairs=$CLDR_PAIRS"
mt_manifest "$PREP/sample/sources.json" mt "English-German: real software messages, and SYNTHETIC pairs generated from CLDR" \
  babel sentencepiece fairseq
