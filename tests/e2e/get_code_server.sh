#!/bin/sh
# A real VS Code for the end-to-end tests: code-server and the Node that it wants, both from the
# npm registry, nothing compiled, nothing installed outside DIR (about 650 MB).
# Usage: get_code_server.sh DIR     -> DIR/code-server (start it with this)
set -eu
CODE_SERVER=4.139.1 # = VS Code 1.139.1
NODE=24.21.0

[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
mkdir -p "$1"
dir=$(cd "$1" && pwd)
stamp="$dir/version"
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$CODE_SERVER $NODE" ]; then
    echo "$dir/code-server"
    exit 0
fi

case "$(uname -s)-$(uname -m)" in
Linux-x86_64) platform=linux-x64 ;;
Linux-aarch64) platform=linux-arm64 ;;
Darwin-arm64) platform=darwin-arm64 ;;
*) echo "no Node package for $(uname -s) on $(uname -m)" >&2; exit 1 ;;
esac

work="$dir/new"
rm -rf "$work" "$dir/node" "$dir/package" "$stamp"
mkdir -p "$work"
trap 'rm -rf "$work"' EXIT
cd "$work"

echo '{"private": true}' >package.json
npm install --no-audit --no-fund --loglevel=error "node-$platform@$NODE" >&2
mv "node_modules/node-$platform" "$dir/node"
PATH="$dir/node/bin:$PATH"
export PATH

npm pack --silent "code-server@$CODE_SERVER" >/dev/null
tar xzf "code-server-$CODE_SERVER.tgz"
# The workbench needs no compiled module for these tests, so no install script runs.
for part in . lib/vscode lib/vscode/extensions; do
    (cd "package/$part" && npm install --omit=dev --ignore-scripts --no-audit --no-fund --loglevel=error >&2)
done
mv package "$dir/package"

cat >"$dir/code-server" <<WRAPPER
#!/bin/sh
exec "$dir/node/bin/node" "$dir/package/out/node/entry.js" "\$@"
WRAPPER
chmod +x "$dir/code-server"
echo "$CODE_SERVER $NODE" >"$stamp"
echo "$dir/code-server"
