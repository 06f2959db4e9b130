#!/usr/bin/env bash
# WMT14 English-German, the pair that everybody compares on: Europarl v7, Common Crawl and News Commentary v9
# for training, newstest2013 for validation, newstest2014 (all 3,003 lines of wmt14/full) for test.
#
#   bash data-prep/prepare_wmt14_en_de.sh [OUT]      default OUT: data/wmt14-en-de
#   VOCAB_SIZE=32000 MAX_PIECES=250 SHARDS=1 WORKERS=cores
#   STATMT=https://www.statmt.org                    or a mirror with the same paths below
#
# About 1.6 GB to download (docs/data.md). Stops and kills cost the step at hand: run it again.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/mt_pipeline.sh"

STATMT=${STATMT:-https://www.statmt.org}
mt_begin en de wmt14-en-de "${1:-}" sentencepiece sacrebleu

parts=() MORE_FILES=()
get_corpus() { # NAME URL-PATH PREFIX-IN-THE-ARCHIVE
  local name=$1 archive=$R/${2##*/}
  step "fetch-$name" -- "$archive" -- fetch "$STATMT/$2" "$archive"
  step "unpack-$name" "$archive" -- "$R/$name".{en,de} -- unpack "$archive" "$R/$name" "$3".{en,de}
  parts+=("$R/$name") MORE_FILES+=("$archive")
}
get_corpus europarl-v7 wmt13/training-parallel-europarl-v7.tgz training/europarl-v7.de-en
get_corpus commoncrawl wmt13/training-parallel-commoncrawl.tgz commoncrawl.de-en
get_corpus news-commentary-v9 wmt14/training-parallel-nc-v9.tgz training/news-commentary-v9.de-en

mt_testset valid wmt13
mt_testset test wmt14/full
mt_train "${parts[@]}"
mt_finish
mt_manifest "$PREP/sources.json" wmt14-en-de "WMT14 English-German" sentencepiece sacrebleu fairseq
