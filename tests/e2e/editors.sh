#!/bin/sh
# The tests in real Neovims and a real Helix, from a bare checkout: gets what they need and runs
# them. Arguments go to pytest. What cannot be had here is said in one line and ends it well (exit
# status 0), so that CI without a network goes on; E2E_REQUIRED=1 makes it fail.
#
# Kept between runs in ~/.cache/albor-e2e: the editors (130 MB). tmux, in which Helix runs, comes
# from the system; as root on Debian or Ubuntu it is installed.
set -eu
cd "$(dirname "$0")/../.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT

skip() {
    tail -n 5 "$log" >&2
    echo "Neovim and Helix tests skipped: $1" >&2
    [ -z "${E2E_REQUIRED:-}" ] || exit 1
    exit 0
}

python=${ALBOR_PYTHON:-${ALBOR_VENV:-.venv}/bin/python}
"$python" -c 'import psutil, pytest' 2>"$log" ||
    skip "$python lacks what the tests import: install albor[dev]"
if ! command -v tmux >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update -q && apt-get install -y -q --no-install-recommends tmux; } >"$log" 2>&1 ||
        echo "tmux can't be installed: the tests of Helix are skipped" >&2
fi
sh tests/e2e/get_editors.sh >"$log" 2>&1 || skip "the editors can't be had"
bin=$(tail -n 1 "$log")
ALBOR_NVIM=$bin/nvim ALBOR_NVIM_OLD=$bin/nvim-old PATH=$bin:$PATH
export ALBOR_NVIM ALBOR_NVIM_OLD PATH

run() {
    "$python" -m pytest --no-cov -m e2e tests/e2e/test_nvim_plugin.py tests/e2e/test_neovim.py \
        tests/e2e/test_helix.py tests/e2e/test_playground.py "$@"
}
status=0
run "$@" || status=$?
for again in 1 2; do
    [ "$status" = 1 ] || break
    echo "what failed again ($again): a busy machine may be to blame, albor fails three times" >&2
    status=0
    run --last-failed --last-failed-no-failures none "$@" || status=$?
done
exit "$status"
