#!/usr/bin/env bash
# The native kernel's tests under AddressSanitizer (with UndefinedBehaviorSanitizer), then under ThreadSanitizer:
#
#     bash scripts/sanitize_native.sh            both; a few minutes
#     bash scripts/sanitize_native.sh thread -x  one, with these arguments for pytest
#
# Expected: all tests pass twice. What a sanitizer finds ends the run with its report.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=find_environment.sh
. "$ROOT/scripts/find_environment.sh"
cd "$ROOT"
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT

# The libraries that must be there before Python is: a sanitizer's, and what it looks for when it starts.
# shellcheck disable=SC2086
preload() { ${CXX:-g++} -print-file-name="$1"; }

run() {
    local sanitizer=$1 library=$2 flags=$3
    shift 3
    echo "== $sanitizer"
    mkdir "$built/$sanitizer"
    python - "$built/$sanitizer" "$flags" <<'PYTHON'
import sys
from pathlib import Path
from xmoe_fairseq.moe.native.build import compile_library
compile_library(Path(sys.argv[1]), tuple(sys.argv[2].split()))
PYTHON
    echo "race:dnnl::" >"$built/not_ours"  # its cache of bf16 products, whose lock ThreadSanitizer does not see
    # Python and torch keep what they allocate until the end. ThreadSanitizer takes OpenMP's barriers for races:
    # torch has one thread, and the kernel has std::thread.
    OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
        TSAN_OPTIONS=suppressions=$built/not_ours:halt_on_error=1:report_signal_unsafe=0 \
        LD_PRELOAD="$(preload "$library") $(preload libstdc++.so.6)" \
        setarch -R python - "$built/$sanitizer/experts.so" "$@" <<'PYTHON'
import sys
import pytest
import torch
torch.ops.load_library(sys.argv[1])
from xmoe_fairseq.moe import native
from xmoe_fairseq.moe.experts import native as kernel
from xmoe_fairseq.moe.native import routing
native.missing = kernel.missing = routing.missing = lambda: ""
excluded = "not schemas and not fork"
if "thread" in sys.argv[1]:
    torch.set_num_threads(1)
    torch.set_num_threads = lambda threads: None
    excluded += " and not shares_by_hand"
tests = ["tests/moe/test_native.py", "tests/moe/test_native_routing.py"]
sys.exit(pytest.main([*tests, "-qs", "-p", "no:cacheprovider", "-k", excluded, *sys.argv[2:]]))
PYTHON
}

which=both
if [ "${1:-}" = address ] || [ "${1:-}" = thread ]; then
    which=$1
    shift
fi
# One kind of loop: the kinds are chosen before a sanitizer has started.
common="-O1 -g -fno-omit-frame-pointer -DXMOE_ONE_KIND"
if [ "$which" != thread ]; then
    run address libasan.so "-fsanitize=address,undefined -fno-sanitize=vptr $common" "$@"
fi
if [ "$which" != address ]; then
    run thread libtsan.so "-fsanitize=thread $common -DXMOE_STD_THREADS" "$@"
fi
