#!/usr/bin/env bash
# English text for a language model: one of the paper's corpora from the Hugging Face hub, or files of your own.
#
#   bash data-prep/prepare_lm.sh wikitext103|openwebtext|bookcorpus|wikipedia|cc-news|FOLDER [OUT]
#                             default OUT: data/lm-NAME; FOLDER has *.txt, *.jsonl (.gz, .xz) or *.parquet
#   GPT2_BPE=FOLDER           with GPT-2's encoder.json and vocab.bpe: its pieces; otherwise sentencepiece:
#   VOCAB_SIZE=32000
#   SHARDS=1 WORKERS=cores    training folders (default for openwebtext 16, bookcorpus and wikipedia 8, cc-news 2)
#   FIRST=0                   take so many files of the hub's only (0 = all)
#   VALID_PERCENT TEST_PERCENT   of documents, where the corpus has no splits of its own (default: see below)
#   DETOKENIZE=1              wikitext103: undo its tokenisation (default: text as it was released)
#   HF_ENDPOINT               another server than https://huggingface.co
#
# Sizes, licences and what a document is in each: docs/data.md. Stops and kills cost the step at hand: run it again.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PREP=$ROOT/data-prep
. "$PREP/steps.sh"
. "$PREP/lm_pipeline.sh"

NAME=${1:-}
form=documents percent=0.05 repo="" options=()
case $NAME in
  wikitext103)
    repo=Salesforce/wikitext revision=b08601e04326c79dfdd32d625aee71d232d685c3
    patterns=(wikitext-103-raw-v1/{train,validation,test}-*.parquet) form=wikitext
    licence="CC-BY-SA-3.0 and GFDL" ;;
  openwebtext)
    repo=Skylion007/openwebtext revision=79d93d786212f7344586290adb811d4ae6a1762c
    patterns=('plain_text/*.parquet') SHARDS=${SHARDS:-16}
    licence="CC0 for the collection; the texts are their authors'" ;;
  bookcorpus)
    repo=bookcorpus/bookcorpus revision=refs/convert/parquet
    patterns=('plain_text/train/*.parquet') form=sentences percent=0.5 SHARDS=${SHARDS:-8}
    licence="unclear; the books are their authors'" ;;
  wikipedia)
    repo=wikimedia/wikipedia revision=b04c8d1ceb2f5cd4588862100d08de323dccfbaa
    patterns=('20231101.en/*.parquet') SHARDS=${SHARDS:-8}
    licence="CC-BY-SA-3.0 and GFDL" ;;
  cc-news)
    repo=vblagoje/cc_news revision=81eb2ce0d2a9dad6ad16b68ef750ec290880fa36
    patterns=('plain_text/*.parquet') percent=0.5 SHARDS=${SHARDS:-2}
    licence="unclear; the articles are their publishers'" ;;
  *)
    [ -d "$NAME" ] || {
      echo "prepare_lm.sh: name wikitext103, openwebtext, bookcorpus, wikipedia, cc-news or a folder, got '$NAME'" >&2
      exit 2
    }
    percent=5 ;;
esac
OUT=${2:-$ROOT/data/lm-$(basename "$NAME")}
STEPS_DIR=$OUT/.steps
STEP_PREFIX="[lm-$(basename "$NAME")]"
export OMP_NUM_THREADS=1 HF_HUB_DISABLE_TELEMETRY=1
find_tools sentencepiece ${repo:+huggingface_hub pyarrow}
lm_begin

# Get: the files, in an order that does not depend on the machine.
if [ -n "$repo" ]; then
  step get -- "$R"/{files.txt,sources.json} "$C/files.json" -- \
    "$PYTHON" "$PREP/hub_files.py" --repo "$repo" --revision "$revision" --patterns "${patterns[@]}" \
    --first "${FIRST:-0}" --folder "$R" --task "$NAME" --licence "$licence" --workers "$WORKERS" \
    --counts "$C/files.json"
else
  find -L "$NAME" -type f | grep -E '\.((txt|jsonl?)(\.[gx]z)?|parquet)$' | LC_ALL=C sort >"$R/files.txt" || true
fi
train=() valid=() test=()
while IFS= read -r file; do
  case $form:$file in
    wikitext:*/validation-*) valid+=("$file") ;;
    wikitext:*/test-*) test+=("$file") ;;
    *) train+=("$file") ;;
  esac
done <"$R/files.txt"
[ -n "$repo" ] || step sources ${train[@]+"${train[@]}"} -- "$R/sources.json" -- \
  "$PYTHON" "$PREP/folder_files.py" --folder "$NAME" --files ${train[@]+"${train[@]}"} --output "$R/sources.json"

# Split: the corpus' own splits, or by a hash of each document.
if [ "$form" = wikitext ]; then
  options=(--valid-input "${valid[@]}" --test-input "${test[@]}")
  [ "${DETOKENIZE:-0}" != 1 ] || options+=(--detokenize)
else
  options=(--valid-percent "${VALID_PERCENT:-$percent}" --test-percent "${TEST_PERCENT:-$percent}")
fi
lm_split --form "$form" --input "${train[@]}" "${options[@]}"
lm_finish
SETTINGS="form=$form detokenize=${DETOKENIZE:-0}"
[ "$form" = wikitext ] || SETTINGS+=" valid_percent=${options[1]} test_percent=${options[3]}"
lm_manifest "$R/sources.json" "$(if [ -n "$repo" ]; then echo "$NAME"; else echo folder; fi)" \
  "English text: $(basename "$NAME")" sentencepiece ${repo:+huggingface_hub pyarrow} fairseq
