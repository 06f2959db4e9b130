#!/usr/bin/env bash
# Peak memory and seconds of each data preparation step on 100,000 lines and on ten times as many.
#
#   bash scripts/measure_data_prep.sh [WORKERS]      default: all cores; about 2 minutes on 2
#
# Lines of 8 to 30 words drawn from the embedded English text, so every line is new. "MB" is the largest process.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PREP=$ROOT/data-prep
. "$PREP/steps.sh"
WORKERS=${1:-$WORKERS}
export OMP_NUM_THREADS=1
find_tools sentencepiece
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

prep() { # NAME SCRIPT ARGUMENTS...
  "$PYTHON" - "$lines" "$1" "$PYTHON" "$PREP/$2" "${@:3}" <<'PYTHON'
import resource, subprocess, sys, time
lines, name, *command = sys.argv[1:]
start = time.monotonic()
subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
print(f"{int(lines):>9,}  {name:<20} {peak:6.0f} MB  {time.monotonic() - start:6.1f} s", flush=True)
PYTHON
}

for lines in 100000 1000000; do
  "$PYTHON" - "$lines" "$PREP/sample/lm/sqlite3-doc.txt.xz" <<'PYTHON'
import lzma, random, sys
lines, rng = int(sys.argv[1]), random.Random(1)
words = lzma.open(sys.argv[2], "rt", encoding="utf-8").read().split()
with open("a.en", "w") as en, open("a.de", "w") as de, open("a.txt", "w") as text:
    for number in range(lines):
        line = rng.choices(words, k=rng.randint(8, 30))
        print(*line, file=en)
        print(*reversed(line), file=de)
        print(*line, end="\n\n" if number % 20 == 19 else "\n", file=text)
PYTHON
  prep "clean pairs" clean_pairs.py --source a.en --target a.de --source-out b.en --target-out b.de --workers "$WORKERS"
  prep "split documents" lm_documents.py --input a.txt --out-prefix docs --workers "$WORKERS"
  [ -f m.model ] || prep "train sentencepiece" train_spm.py --input b.en --model-prefix m --vocab-size 8000
  prep "encode pairs" encode_spm.py --model m.model --input b.en b.de --output c.en c.de --workers "$WORKERS"
done
