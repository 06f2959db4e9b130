#!/usr/bin/env bash
# Makes the virtual environment that the other scripts use, with the tested versions of constraints.txt:
#
#     bash scripts/setup.sh                      .venv at the root of the repository
#     PYTHON=python3.12 bash scripts/setup.sh    with another Python (3.10 to 3.13)
#     VENV=/some/folder bash scripts/setup.sh    elsewhere
#
# The first call takes a few minutes (torch is large; fairseq and the experts' C++ are compiled),
# a further one a second or less.
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
case ${1:-} in
    "") ;;
    -h | --help) usage; exit ;;
    *) usage >&2; exit 2 ;;
esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
fairseq=fairseq==0.12.2
log=$venv/setup.log                 # of the last step
stamp=$venv/setup.stamp             # what the environment was made from; written last
unfinished=$venv/setup.unfinished   # there from the environment's first file to its last
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
unset PYTHONPATH PYTHONHOME

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

choose_python() {
    if [ -n "${PYTHON:-}" ]; then
        python=$PYTHON
    elif [ ! -e "$unfinished" ] && [ -x "$venv/bin/python" ]; then
        python=$venv/bin/python
    else
        python=python3
    fi
    version=$("$python" -c 'import platform; print(platform.python_version())' 2>/dev/null) ||
        fail "there is no interpreter '$python', or it does not start; name one: PYTHON=python3.11"
    case $version in
        3.10.* | 3.11.* | 3.12.* | 3.13.*) ;;
        *) fail "fairseq needs Python 3.10 to 3.13, '$python' is $version; name another: PYTHON=python3.11" ;;
    esac
}

check_build_tools() {
    local compiler=${CXX:-g++}  # which may have arguments
    command -v "${compiler%% *}" >/dev/null ||
        fail "no C++ compiler '$compiler', to build fairseq; install one (Debian: apt-get install g++)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "'$python' has no venv module; install it (Debian: apt-get install python3-venv)"
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -e "$include/Python.h" ] ||
        fail "'$python' has no Python.h, to build fairseq; install it (Debian: apt-get install python3-dev)"
}

fingerprint() {
    local made_from=(setup.py pyproject.toml constraints.txt scripts/setup.sh)
    { (cd "$root" && cat "${made_from[@]}") && echo "$root $version"; } | cksum
}

up_to_date() {
    [ -e "$stamp" ] && [ ! -e "$unfinished" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ] &&
        "$venv/bin/python" -c 'import sys, importlib.util as u
sys.exit(not all(map(u.find_spec, ("fairseq", "torch", "xmoe_fairseq"))))' 2>/dev/null
}

# Runs a command with its output in the log; where it fails, shows the one line of it that matters.
logged() {
    local what=$1 reason missing
    shift
    echo "$what: $*" >"$log"
    if ! "$@" >>"$log" 2>&1; then
        reason=$(grep -E '^ *[A-Za-z.]*([Ee]rror|ERROR): ' "$log" | tail -n 1 || true)
        # Of a package that the registry does not offer pip says, far below, that it conflicts with others.
        missing=$(sed -nE '/no matching distributions available/{n;s/^ *//p;}
            s/.*No matching distribution found for ([^ ;]+).*/\1/p' "$log" | tail -n 1)
        if [ -n "$missing" ]; then
            reason="the package registry offers no $missing; is there a network, and is pip's index the right one?"
        fi
        if grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError' "$log"; then
            reason="no connection to the package registry; is there a network?"
        fi
        fail "$what failed: ${reason:-$(tail -n 1 "$log")} (log: $log)"
    fi
}

make_environment() {
    # An environment in place for this Python is kept and brought up to date, unless it was never finished.
    if [ "${1:-}" = afresh ] || [ -e "$unfinished" ] ||
        [ "$("$venv/bin/python" -m pip --version 2>/dev/null)" = "" ] ||
        [ "$("$venv/bin/python" -c 'import platform; print(platform.python_version())')" != "$version" ]; then
        [ -e "$unfinished" ] || [ -e "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv" 2>/dev/null)" ] ||
            fail "VENV=$venv is a folder with other things in it; name a new one"
        # "$python" may be the one in the environment that goes
        base=$("$python" -c 'import sys; print(getattr(sys, "_base_executable", None) or sys.executable)')
        rm -rf "$venv"
        mkdir -p "$venv" || fail "cannot make VENV=$venv"
        : >"$unfinished"
        logged "making the environment" "$base" -m venv "$venv"
    fi
    rm -f "$stamp"
}

install_packages() {
    local pip=("$venv/bin/python" -m pip install --progress-bar off)
    say "1/3 torch and the other dependencies"
    logged "updating pip" "${pip[@]}" -c "$root/constraints.txt" --upgrade pip
    logged "installing the dependencies" "${pip[@]}" -c "$root/constraints.txt" \
        --build-constraint "$root/constraints.txt" -e "${root}[dev]"
    say "2/3 fairseq (compiles for up to a minute)"
    # --no-deps: pip refuses fairseq's own list (omegaconf<2.1); what fairseq needs is in setup.py.
    logged "building fairseq" "${pip[@]}" --build-constraint "$root/constraints.txt" --no-deps "$fairseq"
}

# C++, for the torch that is there: in an environment that is up to date the sources may have changed.
build_kernel() {
    local line
    line=$("$venv/bin/python" "$root/xmoe_fairseq/moe/native/build.py" 2>&1) || true  # all works without it
    case $line in *"up to date") ;; *) say "$line" ;; esac
}

verify() {
    "$venv/bin/python" - >"$log" 2>&1 <<'PYTHON'
import fairseq.data.data_utils_fast, fairseq.data.token_block_utils_fast, fairseq.libbleu  # compiled
import xmoe_fairseq, xmoe_fairseq_compat
assert xmoe_fairseq_compat.is_active(), "the start-up line of xmoe_fairseq_compat is not in place"
PYTHON
}

main() {
    SECONDS=0
    # One set-up at a time: the other scripts call this one.
    if command -v flock >/dev/null; then exec 9<"${BASH_SOURCE[0]}" && flock 9; fi
    choose_python
    if up_to_date; then
        build_kernel
        say "$venv is up to date (Python $version)"
        return
    fi
    check_build_tools
    say "Python $version in $venv"
    make_environment
    install_packages
    say "3/3 checking"
    if ! verify; then
        # An interrupted update can leave a package that pip believes to be whole.
        say "the environment is damaged; making it again"
        make_environment afresh
        install_packages
        verify || fail "checking failed: $(tail -n 1 "$log") (log: $log)"
    fi
    build_kernel
    fingerprint >"$stamp"
    rm -f "$unfinished"
    say "done in ${SECONDS} s"
}

main
