#!/usr/bin/env bash
# From text to a scored language model, in one command. The same command goes on after a stop.
#
#   bash scripts/lm/run.sh --text FILE ... OUT                      tiny: on the CPU, in minutes
#   bash scripts/lm/run.sh --text FILE ... --preset small OUT       on a GPU
#   bash scripts/lm/run.sh --help                all flags, presets and models
#   GPUS=n SEED=1        as for train.sh         WORKERS=cores     processes that prepare text
#
# OUT/data is a folder of data-prep, OUT/MODEL one of train.sh; OUT/report.md the table. Validation and test are held
# out, or given (docs/your_data.md). A token computes half of the dense FFN, unless --model says otherwise.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../own_text.sh"
. "$root/data-prep/lm_pipeline.sh"

prepare() {
  lm_begin "$NAME" "$DATA" sentencepiece
  local own=(${VALID[@]+"${VALID[@]}"} ${TEST[@]+"${TEST[@]}"})
  step hold-out "${TEXT[@]}" ${own[@]+"${own[@]}"} -- "$R/held-out".{train,valid,test} "$C/hold-out.json" -- \
    "$PYTHON" "$PREP/lm_documents.py" --input "${TEXT[@]}" ${VALID[@]+--valid-input "${VALID[@]}"} \
    ${TEST[@]+--test-input "${TEST[@]}"} --out-prefix "$R/held-out" --counts "$C/hold-out.json" --workers "$WORKERS"
  step drop-near "$R/held-out".{train,valid,test} -- "$R/train.txt" "$C/drop-near.json" -- \
    "$PYTHON" "$PREP/drop_near_paragraphs.py" --input "$R/held-out.train" --held-out "$R/held-out".{valid,test} \
    --output "$R/train.txt" --counts "$C/drop-near.json" --workers "$WORKERS"
  lm_split --input "$R/train.txt" --valid-input "$R/held-out.valid" --test-input "$R/held-out.test"
  lm_finish
  step sources "${TEXT[@]}" ${own[@]+"${own[@]}"} -- "$OUT/sources.json" -- \
    "$PYTHON" "$PREP/folder_files.py" --files "${TEXT[@]}" ${own[@]+"${own[@]}"} --output "$OUT/sources.json"
  lm_manifest "$OUT/sources.json" folder "Text of one's own" sentencepiece fairseq
}

own_text lm "$@"
