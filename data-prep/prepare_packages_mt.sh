#!/usr/bin/env bash
# English and another language from Debian or Ubuntu packages: message catalogues, manual pages, help pages,
# manuals and package descriptions. Needs the system's package sources, no root; nothing is installed.
#
#   bash data-prep/prepare_packages_mt.sh de|ru|uk|he|zh [--full] [OUT]     default OUT: data/packages-en-LANG[-full]
#   VOCAB_SIZE=8000 VALID=1000 TEST=2000             pieces in both languages, about so many held-out pairs
#   WITHOUT="name ..."                               packages to leave out (packages/mt.txt names them all)
#   PACKAGES=data/packages                           where they are unpacked, shared by all corpora
#   REFRESH=1                                        get the package indexes anew, so newer versions
#   WORKERS=2                                        processes (default: all cores)
#
# Expected (Debian 12):
#              train     valid    test   English words   packages
#   de        126,197    1,026   2,213          1.47 M      28 MB    94 s on 2 cores, packages downloaded before
#   de --full 303,204    1,063   2,074          3.07 M     504 MB   224 s
#   ru         80,752    1,010   2,025          0.93 M      23 MB
#   zh         49,551    1,038   2,022          0.48 M      20 MB
#   uk         33,405    1,097   2,052          0.31 M      16 MB
#   he          7,180      803     909          0.03 M       1 MB   labels only
#   dictionary: 8,008 symbols, shared by both languages
# docs/data.md says where the pairs are from, and what keeps the test out of training.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/mt_pipeline.sh"

usage="usage: bash data-prep/prepare_packages_mt.sh de|ru|uk|he|zh [--full] [OUT]"
case ${1:-} in de | ru | uk | he | zh) LANG_CODE=$1 ;; *)
  echo "$usage; got '${1:-}'" >&2
  exit 2 ;;
esac
shift
TIERS=(core) SUFFIX=
if [ "${1:-}" = --full ]; then
  TIERS=(core full) SUFFIX=-full
  shift
fi
case ${1:-} in -*) echo "$usage; got '$1'" >&2; exit 2 ;; esac
PACKAGES=${PACKAGES:-$ROOT/data/packages}
VOCAB_SIZE=${VOCAB_SIZE:-8000}
VALID=${VALID:-1000} TEST=${TEST:-2000}
CLEAN=()
if [ "$LANG_CODE" = zh ]; then
  CLEAN=(--target-chars 0.33)
  CHARACTER_COVERAGE=${CHARACTER_COVERAGE:-0.9995}
fi
mt_begin en "$LANG_CODE" "packages-en-$LANG_CODE$SUFFIX" "${1:-}" sentencepiece babel lxml

# Get. Not a step: it looks for itself what is there, and leaves what it would not change.
read -ra without <<<"${WITHOUT:-}"
"$PYTHON" "$PREP/fetch_packages.py" --list "$PREP/packages/mt.txt" --tiers "${TIERS[@]}" --lang "$LANG_CODE" --task mt \
  --folder "$PACKAGES" --sources-out "$OUT/sources.json" --without ${without[@]+"${without[@]}"} \
  ${REFRESH:+--refresh} --counts "$C/fetch.json"
step extract "$OUT/sources.json" -- "$R/pairs.tsv" "$C/extract.json" -- \
  "$PYTHON" "$PREP/extract_pairs.py" --sources "$OUT/sources.json" --folder "$PACKAGES" --lang "$LANG_CODE" \
  --output "$R/pairs.tsv" --counts "$C/extract.json" --workers "$WORKERS"
step split "$R/pairs.tsv" -- \
  "$R/split".{train,valid,test}.{en,"$LANG_CODE"} "$C/split.json" -- \
  "$PYTHON" "$PREP/split_pairs.py" --input "$R/pairs.tsv" --lang "$LANG_CODE" --out-prefix "$R/split" \
  --valid "$VALID" --test "$TEST" --counts "$C/split.json" --workers "$WORKERS"

mt_heldout valid "$R/split.valid"
mt_heldout test "$R/split.test"
mt_train "$R/split.train"
mt_finish
SETTINGS="tiers=$(IFS=,; echo "${TIERS[*]}") valid=$VALID test=$TEST without=$(IFS=,; echo "${without[*]-}")"
mt_manifest "$OUT/sources.json" mt "English-$LANG_CODE: messages, manuals and descriptions from Debian packages" \
  babel lxml sentencepiece fairseq
