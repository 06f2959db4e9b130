#!/usr/bin/env bash
# WMT23 to English, constrained track: the training corpora of the organisers' mtdata recipe; past WMT test sets
# for validation (FLORES-200 dev where there is none: uk, he); WMT22 (not he) and WMT23 for test.
#
#   bash data-prep/prepare_wmt23.sh uk-en|de-en|ru-en|he-en|zh-en [OUT]     default OUT: data/wmt23-PAIR
#   VOCAB_SIZE=32000 MAX_PIECES=250 WORKERS=cores
#   SHARDS=1        training folders; 10 or so for the pairs of a hundred million lines
#   SKIP="ID ..."   datasets of the recipe to leave out, e.g. because their server is gone; noted in the manifest
#   MTDATA_TOOL     mtdata's program; default: .venv.mtdata/bin/mtdata, then mtdata on the PATH
#   WMT23_RECIPES   URL of the recipes (file:///... for a local copy)
#
# Tens of GB to download for the larger pairs (docs/data.md). Stops and kills cost the step at hand: run it again.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/mt_pipeline.sh"

PAIR=${1:-}
VALID="wmt20 wmt21" TESTS="wmt22 wmt23" DEV=""
case $PAIR in
  uk-en) iso=ukr VALID="" DEV=Flores-flores200_dev-1-eng-ukr ;;
  he-en) iso=heb VALID="" DEV=Flores-flores200_dev-1-eng-heb TESTS=wmt23 ;;
  de-en) iso=deu ;;
  ru-en) iso=rus ;;
  zh-en) iso=zho CHARACTER_COVERAGE=${CHARACTER_COVERAGE:-0.9995} CLEAN=(--target-chars 3.3) ;;
  *) echo "prepare_wmt23.sh: the pair must be uk-en, de-en, ru-en, he-en or zh-en, got '$PAIR'" >&2; exit 2 ;;
esac
WMT23_RECIPES=${WMT23_RECIPES:-https://www.statmt.org/wmt23/mtdata/mtdata.recipes.wmt23-constrained.yml}
mt_begin "${PAIR%-en}" en "wmt23-$PAIR" "${2:-}" sentencepiece sacrebleu yaml
if [ -z "${MTDATA_TOOL:-}" ]; then
  MTDATA_TOOL=$ROOT/.venv.mtdata/bin/mtdata
  [ -x "$MTDATA_TOOL" ] || MTDATA_TOOL=$(command -v mtdata) || {
    echo "mtdata not found; it needs an environment of its own:" \
      "python3 -m venv .venv.mtdata && .venv.mtdata/bin/pip install mtdata==0.4.0" >&2
    exit 1
  }
fi

step fetch-recipes -- "$R/recipes.yml" -- fetch "$WMT23_RECIPES" "$R/recipes.yml"
read -ra skip <<<"${SKIP:-}"
step get-parts "$R/recipes.yml" -- "$R"/{parts.txt,sources.json} "$C/parts.json" -- \
  "$PYTHON" "$PREP/mtdata_parts.py" --mtdata "$MTDATA_TOOL" --recipes "$R/recipes.yml" --recipe "wmt23-${SRC}en" \
  ${DEV:+--dev "$DEV"} --skip ${skip[@]+"${skip[@]}"} --langs "$SRC" en --iso "$iso" eng --folder "$R" \
  --jobs "$WORKERS" --counts "$C/parts.json"
parts=()
while IFS= read -r part; do parts+=("$part"); done <"$R/parts.txt"

# shellcheck disable=SC2086  # lists of names
if [ -n "$VALID" ]; then mt_testset valid $VALID; else mt_heldout valid "$R/dev"; fi
number=""
for name in $TESTS; do
  mt_testset "test$number" "$name"
  number=$((number + 1))
done
mt_train "${parts[@]}"
mt_finish
SETTINGS="skip=$(IFS=,; echo "${skip[*]:-}") valid=${DEV:-${VALID// /,}} test=${TESTS// /,}"
SETTINGS+=" mtdata=$("$MTDATA_TOOL" --version 2>/dev/null | awk 'NR == 1 { print $2 }')"
MORE_SOURCES=("$R/sources.json") MORE_FILES=("$R/recipes.yml")
mt_manifest "$PREP/sources.json" wmt23 "WMT23 $PAIR, constrained track" sentencepiece sacrebleu fairseq
