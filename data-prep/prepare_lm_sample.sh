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
. "$(dirname "${BASH_SOURCE[0]}")/lm_pipeline.sh"

VOCAB_SIZE=${VOCAB_SIZE:-4000}
lm_begin lm-sample "${1:-}" sentencepiece
lm_split --input "$PREP/sample/lm/sqlite3-doc.txt.xz"
lm_finish
lm_manifest "$PREP/sample/sources.json" lm "English technical prose: the SQLite documentation, a paragraph a line" \
  sentencepiece fairseq
