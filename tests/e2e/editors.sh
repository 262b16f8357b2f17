#!/bin/sh
# The tests in real Neovims (0.12 and 0.11) and a real Helix, from a bare checkout: gets the
# editors and runs the tests. Arguments go to pytest. An editor that cannot be had here is said in
# one line and its tests are left out (exit status 0), so that CI without a network or apt goes on;
# E2E_REQUIRED=1 makes it fail. ALBOR_NVIM, ALBOR_NVIM_OLD and ALBOR_HELIX name editors that are
# there already.
#
# Kept between runs in ~/.cache/albor-e2e: the editors (140 MB). Helix runs inside tmux, which
# comes from the system; as root on Debian or Ubuntu it is installed.
set -eu
cd "$(dirname "$0")/../.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Says what is left out.
without() {
    tail -n 5 "$log" >&2
    echo "tests skipped: $1" >&2
    [ -z "${E2E_REQUIRED:-}" ] || exit 1
}

python=${ALBOR_PYTHON:-${ALBOR_VENV:-.venv}/bin/python}
"$python" -c 'import numpy, pytest' 2>"$log" || {
    without "$python lacks what the tests import: install albor[dev]"
    exit 0
}

if [ -z "${ALBOR_NVIM:-}" ] || [ -z "${ALBOR_NVIM_OLD:-}" ] || [ -z "${ALBOR_HELIX:-}" ]; then
    got=$(ALBOR_PYTHON="$python" sh tests/e2e/get_editors.sh 2>"$log") || true
    for name in ALBOR_NVIM ALBOR_NVIM_OLD ALBOR_HELIX; do
        path=$(printf '%s\n' "$got" | sed -n "s/^$name=//p")
        eval "[ -n \"\${$name:-}\" ] || [ -z \"\$path\" ] || export $name=\"\$path\""
    done
fi

if ! command -v tmux >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update -q && apt-get install -y -q --no-install-recommends tmux; } >"$log" 2>&1 || true
fi

chosen=
add() { chosen="$chosen tests/e2e/$1"; }
both=
if [ -n "${ALBOR_NVIM:-}" ]; then add test_neovim.py && both=1; else without "no Neovim 0.12"; fi
if [ -n "${ALBOR_NVIM_OLD:-}" ]; then both=1; else without "no Neovim 0.11"; fi
[ -z "$both" ] || add test_nvim_plugin.py
if [ -z "${ALBOR_HELIX:-}" ]; then
    without "no Helix"
elif ! command -v tmux >/dev/null; then
    without "no tmux, in which Helix runs"
else
    add test_helix.py
fi
[ -n "$chosen" ] || exit 0

# shellcheck disable=SC2086  # a list of files
run() { "$python" -m pytest --no-cov -m e2e $chosen "$@"; }
status=0
run "$@" || status=$?
if [ "$status" = 1 ]; then
    echo "once more what failed: a busy machine may be to blame, albor fails twice" >&2
    status=0
    run --last-failed --last-failed-no-failures none "$@" || status=$?
fi
exit "$status"
