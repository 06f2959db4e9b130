# shellcheck shell=bash
# To be sourced: puts the virtual environment ($VENV; default: .venv at the root) on the PATH, or ends with one line.
environment=${VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}
[ ! -d "$environment/bin" ] || PATH=$(cd "$environment" && pwd)/bin:$PATH
for tool in python fairseq-train; do
  command -v "$tool" >/dev/null || { echo "$(basename "$0"): $tool not found; run: bash scripts/setup.sh" >&2; exit 1; }
done
