#!/usr/bin/env bash
# English text for a language model: one of the paper's corpora from the Hugging Face hub, or files of your own.
#
#   bash data-prep/prepare_lm.sh NAME|FOLDER [OUT]     default OUT: data/lm-NAME
#                             NAME: wikitext103, openwebtext, bookcorpus, wikipedia, cc-news (of hub.txt);
#                             FOLDER has *.txt, *.jsonl (.gz, .xz) or *.parquet
#   GPT2_BPE=FOLDER           with GPT-2's encoder.json and vocab.bpe: its pieces; otherwise sentencepiece:
#   VOCAB_SIZE=32000
#   SHARDS=1 WORKERS=cores    training folders (default: as hub.txt says)
#   FIRST=0                   take so many files of the hub's only (0 = all)
#   VALID_PERCENT TEST_PERCENT   of documents, where the corpus has no splits of its own (default: see below)
#   DETOKENIZE=1              wikitext103: undo its tokenisation (default: text as it was released)
#   HF_ENDPOINT               another server than https://huggingface.co
#
# Sizes, licences and what a document is in each: docs/data.md. Stops and kills cost the step at hand: run it again.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lm_pipeline.sh"

NAME=${1:-} known=""
while read -r name repo revision patterns form percent shards licence; do
  [ "$name" != "$NAME" ] || break
  known+="$name, "
done < <(grep '^[^#]' "$PREP/hub.txt")
if [ -z "$name" ]; then # the end of the list: all are empty
  [ -d "$NAME" ] || { echo "prepare_lm.sh: name ${known%, } or a folder, got '$NAME'" >&2; exit 2; }
  form=documents percent=5
fi
SHARDS=${SHARDS:-${shards:-1}}
export HF_HUB_DISABLE_TELEMETRY=1
lm_begin "lm-$(basename "$NAME")" "${2:-}" sentencepiece ${repo:+huggingface_hub pyarrow}

# Get: the files, in an order that does not depend on the machine.
if [ -n "$repo" ]; then
  IFS=, read -ra patterns <<<"$patterns"
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
