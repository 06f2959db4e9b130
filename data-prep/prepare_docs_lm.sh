#!/usr/bin/env bash
# Technical English for a language model, from docstrings and documentation packages.
#
#   bash data-prep/prepare_docs_lm.sh [small|open|all] [OUT]     default: small, data/docs-lm-TIER
#   small   docstrings of Python and the packages that this project installs; nothing to download
#   open    also documentation packages under permissive licences
#   all     also those under copyleft licences, and the descriptions of all packages
#           (open and all need the package sources of a Debian or Ubuntu system, no root; nothing is installed)
#   VOCAB_SIZE=8000                                  pieces
#   MODULES="numpy scipy ..."                        installed packages whose docstrings to take; python: its own
#   WITHOUT="name ..."                               packages to leave out (packages/lm.txt names them all)
#   PACKAGES=data/packages                           where they are unpacked, shared by all corpora
#   REFRESH=1                                        get the package indexes anew, so newer versions
#   WORKERS=2                                        processes (default: all cores)
#
# Expected, training text and its pieces (2 cores, packages downloaded before; Debian 12, Python 3.11):
#   small    1.52 M words    2.16 M    86 s
#   open     8.40 M words   12.42 M   308 s     85 MB of packages
#   all     18.18 M words   27.52 M   477 s    285 MB of packages
#   valid and test: 5 % of documents each; dictionary 8,008 symbols; unknown characters are spelt as bytes
# docs/data.md says how documents are made and held out.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lm_pipeline.sh"

TIER=${1:-small}
case $TIER in
  small) TIERS=() ;;
  open) TIERS=(open) ;;
  all) TIERS=(open more descriptions) ;;
  *) echo "usage: bash data-prep/prepare_docs_lm.sh [small|open|all] [OUT]; got '$TIER'" >&2; exit 2 ;;
esac
read -ra MODULES <<<"${MODULES:-numpy scipy sympy networkx torch matplotlib babel fairseq python}"
PACKAGES=${PACKAGES:-$ROOT/data/packages}
VOCAB_SIZE=${VOCAB_SIZE:-8000}
lm_begin "docs-lm-$TIER" "${2:-}" sentencepiece lxml

read -ra without <<<"${WITHOUT:-}"
from_packages=() inputs=()
if [ ${#TIERS[@]} -gt 0 ]; then
  # Not a step: it looks for itself what is there, and leaves what it would not change.
  "$PYTHON" "$PREP/fetch_packages.py" --list "$PREP/packages/lm.txt" --tiers "${TIERS[@]}" --task lm \
    --folder "$PACKAGES" --sources-out "$R/packages.json" --without ${without[@]+"${without[@]}"} \
    ${REFRESH:+--refresh} --counts "$C/fetch.json"
  from_packages=(--list "$PREP/packages/lm.txt" --tiers "${TIERS[@]}" --sources "$R/packages.json" --folder "$PACKAGES")
  inputs=("$PREP/packages/lm.txt" "$R/packages.json")
fi
installed=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')   # anew if a package was updated
step extract ${inputs[@]+"${inputs[@]}"} "$installed" -- \
  "$R/documents.txt" "$OUT/sources.json" "$C/extract.json" -- \
  "$PYTHON" "$PREP/extract_english.py" --modules "${MODULES[@]}" ${from_packages[@]+"${from_packages[@]}"} \
  --output "$R/documents.txt" --sources-out "$OUT/sources.json" --counts "$C/extract.json" --workers "$WORKERS"

# Whole documents are held out; then what nearly occurs in them is dropped from the training text.
step hold-out "$R/documents.txt" -- "$R/split".{train,valid,test} "$C/hold-out.json" -- \
  "$PYTHON" "$PREP/lm_documents.py" --input "$R/documents.txt" --out-prefix "$R/split" --counts "$C/hold-out.json" \
  --workers "$WORKERS"
step drop-near "$R/split".{train,valid,test} -- \
  "$R/train.txt" "$C/drop-near.json" -- \
  "$PYTHON" "$PREP/drop_near_paragraphs.py" --input "$R/split.train" --held-out "$R/split".{valid,test} \
  --output "$R/train.txt" --counts "$C/drop-near.json" --workers "$WORKERS"
lm_split --input "$R/train.txt" --valid-input "$R/split.valid" --test-input "$R/split.test"
lm_finish
SETTINGS="tier=$TIER modules=$(IFS=,; echo "${MODULES[*]}") without=$(IFS=,; echo "${without[*]-}")"
lm_manifest "$OUT/sources.json" lm "Technical English from docstrings and documentation, a paragraph a line" \
  lxml sentencepiece fairseq
