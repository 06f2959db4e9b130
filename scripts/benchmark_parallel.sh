#!/usr/bin/env bash
# Tokens per second, bytes and time in communication of 1, 2 and 4 ranks with their experts shared out.
#
#   bash scripts/benchmark_parallel.sh [FOLDER]     about 1 minute on 2 cores; needs scripts/setup.sh
#
# Each rank has one thread and RANK_TOKENS = 8 x 128 = 1,024 tokens per update, so an update has
# ranks x 1,024 tokens: on as many free cores as ranks, tokens per second should grow with the ranks.
# With more ranks than cores (4 on 2) they share, and the time in communication is mostly waiting.
# Expected on 2 cores: docs/scaling.md.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/find_environment.sh"
folder=${1:-$root/runs/benchmark_parallel}
export OMP_NUM_THREADS=1
UPDATES=${UPDATES:-30}
backend=gloo device=--cpu
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
counts="1 2 4"
if [ "$gpus" -ge 2 ]; then
    backend=nccl device=
    [ "$gpus" -ge 4 ] || counts="1 2"
fi
mkdir -p "$folder"

if [ ! -e "$folder/data/dict.txt" ]; then   # Zipf-like words: what they say does not matter here
    python - "$folder/text" <<'PY'
import random, sys
rng = random.Random(1)
words, weights = [f"w{i}" for i in range(2000)], [1 / (i + 1) for i in range(2000)]
with open(sys.argv[1], "w") as text:
    for _ in range(20000):
        print(*rng.choices(words, weights, k=20), file=text)
PY
    fairseq-preprocess --only-source --trainpref "$folder/text" --validpref "$folder/text" \
        --destdir "$folder/data" --workers 2 >"$folder/preprocess.log" 2>&1
fi

for ranks in $counts; do
    echo "benchmark: $ranks ranks"
    torchrun --standalone --nproc_per_node $ranks "$root/scripts/run.py" experiments.count_traffic "$folder/$ranks.json" \
        "$folder/data" --user-dir "$root/xmoe_fairseq" --task language_modeling $device \
        --arch xmoe_transformer_lm_tiny --decoder-embed-dim 128 --decoder-ffn-embed-dim 512 \
        --decoder-layers 4 --moe-freq 2 --moe-num-experts 16 --moe-ffn-split 4 --moe-router topk \
        --moe-expert-parallel-size -1 --criterion moe_cross_entropy --tokens-per-sample 128 --batch-size 8 \
        --optimizer adam --lr 1e-3 --clip-norm 1.0 --max-update "$UPDATES" --disable-validation --no-save \
        --distributed-backend $backend --ddp-backend legacy_ddp --num-workers 0 --no-progress-bar \
        >"$folder/$ranks.log" 2>&1 || { tail -5 "$folder/$ranks.log"; exit 1; }
done

PYTHONPATH="$root/scripts" python - "$folder" "$counts" <<'PY'
import json, sys
from experiments.count_traffic import expected_bytes
print("ranks  tokens/s  ms/update  MB of rows  choices, counts  model  MB reduced  % in exchanges  % in reductions")
for ranks in map(int, sys.argv[2].split()):
    run = json.load(open(f"{sys.argv[1]}/{ranks}.json"))
    update = run["seconds_per_update"]
    sent, seconds = ({"rows": 0, "choices": 0, "counts": 0, "reductions": 0} | run[of] for of in ("bytes_sent", "seconds"))
    # 2 layers of 16 experts, 4 experts per token, 128 floats
    model = 2 * sum(expected_bytes(4, 16, ranks, 128, 4, run["tokens_per_update"]).values())
    exchanges = seconds["rows"] + seconds["choices"] + seconds["counts"]
    print(
        f"{ranks:5}  {ranks * run['tokens_per_update'] / update:8.0f}  {1000 * update:9.1f}"
        f"  {sent['rows'] / 1e6:10.2f}  {(sent['choices'] + sent['counts']) / 1e6:15.2f}  {model / 1e6:5.2f}"
        f"  {sent['reductions'] / 1e6:10.2f}  {100 * exchanges / update:14.1f}"
        f"  {100 * seconds['reductions'] / update:15.1f}"
    )
PY
