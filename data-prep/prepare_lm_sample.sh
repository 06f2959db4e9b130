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
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PREP=$ROOT/data-prep
. "$PREP/steps.sh"
. "$PREP/lm_pipeline.sh"

OUT=${1:-$ROOT/data/lm-sample}
VOCAB_SIZE=${VOCAB_SIZE:-4000}
STEPS_DIR=$OUT/.steps
STEP_PREFIX="[lm-sample]"
export OMP_NUM_THREADS=1
find_tools sentencepiece
lm_begin
lm_split --input "$PREP/sample/lm/sqlite3-doc.txt.xz"
lm_finish
lm_manifest "$PREP/sample/sources.json" lm "English technical prose: the SQLite documentation, a paragraph a line" \
  sentencepiece fairseq
