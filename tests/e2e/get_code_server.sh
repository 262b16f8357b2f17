#!/bin/sh
# A real VS Code for the end-to-end tests: code-server and the Node that it wants, both from the
# npm registry, nothing installed outside DIR (about 650 MB). Needs npm and a C++ compiler.
# Usage: get_code_server.sh [DIR]     -> prints DIR/code-server (start it with this)
# Without DIR it goes into the cache, where the tests look for it. Once it is there, running this
# again does nothing.
set -eu
CODE_SERVER=4.139.1 # = VS Code 1.139.1
NODE=24.21.0

[ $# -le 1 ] || { echo "usage: $0 [DIR]" >&2; exit 2; }
dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/albor-e2e/code-server}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
stamp="$dir/version"
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$CODE_SERVER $NODE" ]; then
    echo "$dir/code-server"
    exit 0
fi

for tool in npm tar "${CXX:-g++}"; do
    command -v "$tool" >/dev/null || { echo "code-server needs $tool: install it first" >&2; exit 1; }
done

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
# Install scripts would compile a dozen modules; of those the tests need only the log's.
for part in . lib/vscode lib/vscode/extensions; do
    (cd "package/$part" && npm install --omit=dev --ignore-scripts --no-audit --no-fund --loglevel=error >&2)
done

# It speaks Node-API alone, so the headers of that are enough.
npm install --no-audit --no-fund --loglevel=error node-api-headers@1.9.0 >&2
(
    cd package/lib/vscode/node_modules/@vscode/spdlog
    mkdir -p build/Release
    ${CXX:-g++} -O1 -std=c++17 -fPIC -shared -fexceptions -w \
        -DNODE_GYP_MODULE_NAME=spdlog -DBUILDING_NODE_EXTENSION -DNAPI_CPP_EXCEPTIONS \
        -DNODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS -DFMT_CONSTEVAL= \
        -Ideps/spdlog/include -Inode_modules/node-addon-api -I../../node-addon-api \
        -I"$work/node_modules/node-api-headers/include" \
        src/main.cc src/logger.cc -o build/Release/spdlog.node
)
mv package "$dir/package"

cat >"$dir/code-server" <<WRAPPER
#!/bin/sh
exec "$dir/node/bin/node" "$dir/package/out/node/entry.js" "\$@"
WRAPPER
chmod +x "$dir/code-server"
echo "$CODE_SERVER $NODE" >"$stamp"
echo "$dir/code-server"
