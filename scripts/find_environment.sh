# shellcheck shell=bash
# To be sourced: sets $root, and puts the virtual environment ($VENV; default: .venv there) on the PATH, or ends with
# one line.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
environment=${VENV:-$root/.venv}
[ ! -d "$environment/bin" ] || PATH=$(cd "$environment" && pwd)/bin:$PATH
for tool in python fairseq-train; do
  command -v "$tool" >/dev/null || { echo "$(basename "$0"): $tool not found; run: bash scripts/setup.sh" >&2; exit 1; }
done
export PYTHONWARNINGS=ignore
