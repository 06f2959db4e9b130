#!/usr/bin/env bash
# Runs the commands of the documents, in a clone of what is committed: which ran, which did not, and why.
#
#   bash scripts/check_docs.sh [DOCUMENT...]           as docs/data.md; default: README.md and all of docs/
#   bash scripts/check_docs.sh --list [DOCUMENT...]    what would be run
#   SCRATCH=folder                                     the clone, kept: a second call has its environment and its data
#
# All commands of a document (fenced as ```bash or ```python) run in one shell, at the root, in the environment of
# scripts/setup.sh. The first block that fails ends its document, and the exit status is 1. A comment in front of a block
# says what is different, a line each:
#
#   <!-- not run: needs a GPU -->                       why it is not run here
#   <!-- run by: tests/convert/test_upcycle.py -->      or which test runs it
#   <!-- first: bash data-prep/prepare_lm_sample.sh     what is run before it
#   sed: s/--max-update 1500/--max-update 20/ -->       what is changed in it: fewer updates, a folder's name
set -euo pipefail
list=()
case ${1:-} in
  --list) list=(--list); shift ;;
  -*) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
. "$(dirname "${BASH_SOURCE[0]}")/find_environment.sh"
[ $# -gt 0 ] || set -- $(cd "$root" && echo README.md docs/*.md)
if [ ${#list[@]} = 0 ]; then
  [ -n "${SCRATCH:-}" ] || { SCRATCH=$(mktemp -d) && trap 'rm -rf "$SCRATCH"' EXIT; }
  SCRATCH=$(mkdir -p "$SCRATCH" && cd "$SCRATCH" && pwd)
  [ -e "$SCRATCH/.git" ] || git clone --quiet "$root" "$SCRATCH"
  git -C "$SCRATCH" fetch --quiet "$root" HEAD && git -C "$SCRATCH" reset --quiet --hard FETCH_HEAD
  unset VENV
  bash "$SCRATCH/scripts/setup.sh"
  . "$SCRATCH/.venv/bin/activate"
  root=$SCRATCH
fi
cd "$root"
status=0
for document in "$@"; do
  commands=$(python scripts/run.py experiments.documents "${list[@]}" "$document") || { status=1; continue; }
  if [ ${#list[@]} -gt 0 ]; then echo "$commands"; continue; fi
  log=$root/check_docs-$(basename "$document").log
  bash -c "$commands" 3>&1 >"$log" 2>&1 </dev/null || { status=1; echo "$document: the end of $log:"; tail -n 5 "$log"; }
done
exit "$status"
