# shellcheck shell=bash
# Resumable steps, to be sourced by the prepare scripts.
#
#   step NAME INPUT... -- OUTPUT... -- COMMAND...
#
# runs COMMAND unless it ran before with the same words, the same inputs, and its outputs are still as it
# left them. What a step saw is kept as plain text in $STEPS_DIR/NAME: command line, a sum of the shell function
# that it runs, and path, size and time of each input, of the Python files it runs with all that they import from
# their folder, and of each output. It is written after the command succeeds, so a step that was killed is done
# again; a step whose inputs were made anew is done again too.
# The scripts in this folder write under a temporary name and rename, so an output is whole or not there.
# `begin` sets STEPS_DIR and STEP_PREFIX; STEPS_SKIPPED counts the steps that were up to date.

PREP=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
WORKERS=${WORKERS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)} # the results are the same with any number

fingerprint() { # path, size and modification time of each file; fails if one is missing
  [ $# -gt 0 ] || return 0
  if stat --version >/dev/null 2>&1; then # GNU, or BSD
    stat -L -c '%n %s %y' -- "$@"
  else
    stat -L -f '%N %z %Fm' -- "$@"
  fi
}

whole() { # FILE COMMAND...: what the command prints, in a file that gets its name when it is whole
  local file=$1; shift
  "$@" >"$file.tmp" && mv "$file.tmp" "$file" || { rm -f "$file.tmp"; return 1; }
}

step() {
  local name=$1; shift
  local inputs=() outputs=() scripts=() word stamp seen started status
  while [ "$1" != -- ]; do inputs+=("$1"); shift; done; shift
  while [ "$1" != -- ]; do outputs+=("$1"); shift; done; shift
  for word in "$@"; do
    case $word in *.py) scripts+=("$word") ;; esac
  done
  if [ ${#scripts[@]} -gt 0 ]; then
    seen=$("${PYTHON:-python3}" "${BASH_SOURCE[0]%/*}/imported.py" "${scripts[@]}") || return 1
    while read -r word; do inputs+=("$word"); done <<<"$seen"
  fi
  stamp=$STEPS_DIR/$name
  mkdir -p "$STEPS_DIR"
  if ! seen=$(printf '%q ' "$@"; declare -f "$1" | cksum; fingerprint "${inputs[@]}" 2>&1); then
    echo "$STEP_PREFIX $name: an input is missing: ${seen##*$'\n'}" >&2
    return 1
  fi
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$seen"$'\n'"$(fingerprint "${outputs[@]}" 2>/dev/null)" ]; then
    STEPS_SKIPPED=$((${STEPS_SKIPPED:-0} + 1))
    return 0
  fi
  rm -f "$stamp"
  started=$SECONDS
  echo "$STEP_PREFIX $name"
  "$@" || {
    status=$?
    [ $status -ne 130 ] || { echo "$STEP_PREFIX $name was interrupted; run this again to go on" >&2; return $status; }
    echo "$STEP_PREFIX $name failed; fix the cause and run this again, finished steps are kept" >&2
    return 1
  }
  seen+=$'\n'$(fingerprint "${outputs[@]}") || { echo "$STEP_PREFIX $name left no ${outputs[*]}" >&2; return 1; }
  whole "$stamp" printf '%s\n' "$seen"
  [ $((SECONDS - started)) -lt 2 ] || echo "$STEP_PREFIX $name took $((SECONDS - started)) s"
}

# The repository's virtual environment if it is there (or $VENV), otherwise PATH.
find_tools() { # PACKAGE...: Python packages that must be importable
  local package
  VENV=${VENV:-$ROOT/.venv}
  if [ -x "$VENV/bin/python" ]; then
    PATH=$VENV/bin:$PATH
    PYTHON=$VENV/bin/python   # also if $PYTHON is set: for scripts/setup.sh it names what the venv is made from
  fi
  PYTHON=${PYTHON:-$(command -v python3)} || true
  [ -n "$PYTHON" ] || { echo "python3 not found; run: bash scripts/setup.sh" >&2; return 1; }
  for package in xmoe_fairseq_compat "$@"; do
    "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$package') is None)" ||
      { echo "Python package $package not found by $PYTHON; run: bash scripts/setup.sh" >&2; return 1; }
  done
  command -v fairseq-preprocess >/dev/null ||
    { echo "fairseq-preprocess not found; run: bash scripts/setup.sh" >&2; return 1; }
}

fetch() { # URL FILE: what an earlier call left is taken up; the file gets its name when it is whole
  local url=$1 file=$2 partial reason attempt
  partial=$file.$(cksum <<<"$url" | cut -d ' ' -f 1).partial
  mkdir -p "$(dirname "$file")"
  for attempt in resumed afresh; do # a server that is slower than 1 kB/s for a minute is given up: a choice
    [ "$attempt" = resumed ] || rm -f "$partial"
    if reason=$(curl --fail --location --silent --show-error --connect-timeout 30 --speed-limit 1000 \
      --speed-time 60 --retry "${FETCH_RETRIES:-5}" --continue-at - --output "$partial" "$url" 2>&1); then
      if [ ! -s "$partial" ]; then
        rm -f "$partial"
        echo "cannot fetch $url: the file there is empty" >&2
        return 1
      fi
      mv "$partial" "$file"
      return
    fi
    # A server that cannot go on from where we stopped says so in one of these ways: then once from the start.
    case $reason in *"(22)"*416* | *"(33)"* | *"(36)"*) ;; *) break ;; esac
  done
  command -v curl >/dev/null || reason="curl not found; install it (Debian: apt-get install curl)"
  echo "cannot fetch $url: ${reason##*$'\n'}" >&2
  return 1
}

unpack() { # ARCHIVE PREFIX MEMBER.LANG...: members of a .tgz as PREFIX.LANG
  local archive=$1 prefix=$2 member reason; shift 2
  for member in "$@"; do
    if ! reason=$(whole "$prefix.${member##*.}" tar -xzOf "$archive" "$member" 2>&1); then
      echo "$archive: cannot unpack $member: ${reason%%$'\n'*}; delete it, it is fetched again" >&2
      return 1
    fi
  done
}

binarize() { # DESTDIR ARGUMENTS...: fairseq-preprocess into a new folder that appears when it is whole
  local folder=$1 parts=1; shift
  # fairseq makes the first part by itself, after its other processes have made theirs: hence one part more.
  [ "$WORKERS" = 1 ] || parts=$((WORKERS + 1))
  rm -rf "$folder.partial"
  if ! fairseq-preprocess "$@" --destdir "$folder.partial" --workers "$parts" >"$folder.log" 2>&1; then
    echo "fairseq-preprocess failed: $(tail -n 1 "$folder.log") (all of it: $folder.log)" >&2
    return 1
  fi
  rm -rf "$folder"
  mv "$folder.partial" "$folder"
}

# A corpus: OUT and its folders R T B C (raw, text, bpe, counts), tools, SHARDS; SHARD_NAMES is ("" 1 2 ...).
begin() { # NAME OUT PACKAGE...: an empty OUT is data/NAME; Python packages that must be importable
  OUT=${2:-$ROOT/data/$1} STEP_PREFIX="[$1]"
  STEPS_DIR=$OUT/.steps R=$OUT/raw T=$OUT/text B=$OUT/bpe C=$OUT/counts
  export OMP_NUM_THREADS=1
  find_tools "${@:3}"
  SHARDS=${SHARDS:-1} SHARD_NAMES=("") BINARY=()
  case $SHARDS in *[!0-9]* | 0* | "") echo "SHARDS must be a number from 1, got '$SHARDS'" >&2; return 1 ;; esac
  while [ "${#SHARD_NAMES[@]}" -lt "$SHARDS" ]; do SHARD_NAMES+=("${#SHARD_NAMES[@]}"); done
  mkdir -p "$R" "$T" "$B" "$C"
}

# MORE_SOURCES and MORE_FILES: arrays of further JSON files with sources, and of files to hash.
finish_shards() { # SOURCES TASK ABOUT "SETTING=VALUE ..." FILE... -- PACKAGE...: manifest, and what to give fairseq
  local sources=("$1" ${MORE_SOURCES[@]+"${MORE_SOURCES[@]}"}) task=$2 about=$3 settings=$4 data name
  local files=(${MORE_FILES[@]+"${MORE_FILES[@]}"})
  shift 4
  while [ "$1" != -- ]; do files+=("$1"); shift; done; shift
  read -ra settings <<<"$settings shards=$SHARDS ${SETTINGS:-}"
  step manifest "${sources[@]}" "${BINARY[@]}" -- "$OUT/manifest.json" -- \
    "$PYTHON" "$PREP/manifest.py" --output "$OUT/manifest.json" --task "$task" --sources "${sources[@]}" \
    --about "$about" --settings "${settings[@]}" --packages "$@" \
    --counts "$C"/*.json --files "${files[@]}" "${BINARY[@]}"
  data='' && for name in "${SHARD_NAMES[@]}"; do data+=":$OUT/bin$name"; done
  echo "$STEP_PREFIX ${data#:} is ready after $SECONDS s (steps already done: ${STEPS_SKIPPED:-0})"
}
