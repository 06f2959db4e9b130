# shellcheck shell=bash
# To be sourced by wmt/run.sh and lm/run.sh: what both do.
#
#   own_text TASK ARGUMENT...    settings from the command line; `prepare`, which the script defines; training, scores
#
# Everything is a step of data-prep/steps.sh, so the same command goes on after a stop.
. "$(dirname "${BASH_SOURCE[0]}")/cpu_environment.sh"

experiment() { # MODULE ARGUMENT...
  RUN_AS=run.sh python "$root/scripts/run.py" "experiments.$1" "${@:2}"
}

settings_from() { # MODULE ARGUMENT...: sets the variables that it writes to descriptor 3; what it prints is shown
  local written
  { written=$(experiment "$@" 3>&1 >&4) || exit; } 4>&1
  eval "$written"
}

logged() { # LOG COMMAND...: of what it prints the end is shown, if it fails
  local status=0
  "${@:2}" >"$1" 2>&1 || status=$?
  [ $status = 0 ] || tail -n 3 "$1" >&2
  return $status
}

train() { # PRESET FLAG...: with a bar, or a line every half a minute where there is no terminal
  local job
  logged "$RUN.log" bash "$root/scripts/$TASK/train.sh" "$1" "$MODEL" "$DATA" "$RUN" "${@:2}" & job=$!
  experiment watch "training:$RUN:$job"
  wait "$job"
}

all_steps() {
  prepare
  mkdir -p "$RUN"
  if [ ! -e "$RUN/checkpoint_last.pt" ]; then
    whole "$RUN/data.json" cat "$DATA/manifest.json"
  elif [ -e "$RUN/data.json" ] && ! cmp -s "$DATA/manifest.json" "$RUN/data.json"; then
    echo "run.sh: $RUN is a model of other text or another vocabulary; name another OUT, or remove that folder" >&2
    exit 1
  fi
  local plan=("$TASK" "$PRESET" "$MODEL" "$DATA" "$RUN.timing.json")
  step "time-$MODEL" "${BINARY[@]}" -- "$RUN.timing.json" -- experiment estimate time "${plan[@]}"
  settings_from estimate tell "${plan[@]}" "$RUN" ${UPDATES:+"$UPDATES"}
  step "train-$MODEL" "${BINARY[@]}" -- "$RUN"/checkpoint_{best,last}.pt -- \
    train "$PRESET" ${FLAGS[@]+"${FLAGS[@]}"}
  step "score-$MODEL" "$RUN/checkpoint_best.pt" -- "$RUN/scores.best.json" -- \
    logged "$RUN.score.log" bash "$root/scripts/$TASK/score.sh" "$RUN" --splits test
  experiment own_report "$RESULTS" "$RUN"
  echo "[run] all of it took $SECONDS s"
}

own_text() { # TASK ARGUMENT...
  TASK=$1 RESULTS=""
  settings_from own_text "$@"
  [ -n "$RESULTS" ] || exit 0   # --help
  DATA=$RESULTS/data RUN=$RESULTS/$MODEL NAME=$(basename "$RESULTS")
  mkdir -p "$RESULTS"
  exec 7>"$RESULTS/.lock"
  ! command -v flock >/dev/null || flock -n 7 || { echo "run.sh: $RESULTS is in use by another run.sh" >&2; exit 1; }
  echo "[run] $RESULTS: the text is prepared; then it is said how long the training will take"
  # The steps are a process group of their own, which ends with this script, whatever ends it.
  set -m
  all_steps & WORK=$!
  set +m
  trap 'kill -- "-$WORK" 2>/dev/null || true' EXIT
  trap 'kill -INT -- "-$WORK"; sleep 1; echo "run.sh: stopped; the same command goes on" >&2; exit 130' INT
  wait "$WORK"
}
