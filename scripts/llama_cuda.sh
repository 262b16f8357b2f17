#!/bin/sh
# llama-bench with CUDA, built from the sources inside llama-cpp-python's source package.
#
#   scripts/llama_cuda.sh pack  llama_cpp_python-X.tar.gz OUT.tar.xz
#       keeps what llama-bench needs (CPU and CUDA), a few MB, for a machine without a network
#   scripts/llama_cuda.sh build OUT.tar.xz FOLDER
#       builds FOLDER/build/bin/llama-bench; prints its path last
#
# ARCH=90 the GPU's compute capability, times ten; JOBS=16; TARGET=llama-bench;
# CUDA=OFF builds for the CPU alone; FA=OFF leaves flash attention's kernels out (a faster build).
set -eu

usage() {
    sed -n '2,11p' "$0" | cut -c3- >&2
    exit 2
}

pack() {
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    tar xzf "$1" -C "$work"
    source=$(find "$work" -maxdepth 3 -path '*/vendor/llama.cpp' | head -n 1)
    [ -n "$source" ] || { echo "llama_cuda.sh: $1 holds no vendor/llama.cpp" >&2; exit 1; }
    cut=$work/llama.cpp
    mkdir -p "$cut/tools"
    for part in CMakeLists.txt LICENSE AUTHORS cmake include src common vendor ggml; do
        cp -r "$source/$part" "$cut/"
    done
    cp -r "$source/tools/llama-bench" "$cut/tools/"
    # The other tools are not there, so the list of tools is only this one.
    printf 'find_package(Threads REQUIRED)\nllama_add_compile_flags()\nadd_subdirectory(llama-bench)\n' \
        >"$cut/tools/CMakeLists.txt"
    for backend in "$cut"/ggml/src/ggml-*/; do
        case $(basename "$backend") in
        ggml-cpu | ggml-cuda) ;;
        *) find "$backend" -type f ! -name CMakeLists.txt -delete ;;
        esac
    done
    mkdir -p "$(dirname "$2")"
    tar cJf "$2.tmp" -C "$work" llama.cpp
    mv "$2.tmp" "$2"
    ls -l "$2"
}

build() {
    mkdir -p "$2"
    [ -d "$2/llama.cpp" ] || tar xJf "$1" -C "$2"
    generator=
    command -v ninja >/dev/null && generator=-GNinja
    cuda=${CUDA:-ON}
    # shellcheck disable=SC2086 # no generator is no argument
    cmake -S "$2/llama.cpp" -B "$2/build" $generator -DCMAKE_BUILD_TYPE=Release \
        -DGGML_CUDA="$cuda" -DCMAKE_CUDA_ARCHITECTURES="${ARCH:-90}" -DGGML_CUDA_FA="${FA:-ON}" \
        -DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DGGML_CCACHE=OFF -DBUILD_SHARED_LIBS=OFF \
        -DLLAMA_BUILD_COMMON=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
        -DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF >"$2/configure.log" 2>&1 ||
        { tail -n 20 "$2/configure.log" >&2; exit 1; }
    cmake --build "$2/build" --target "${TARGET:-llama-bench}" -j "${JOBS:-16}" \
        >"$2/build.log" 2>&1 || { tail -n 20 "$2/build.log" >&2; exit 1; }
    echo "$2/build/bin/llama-bench"
}

[ $# -eq 3 ] || usage
case $1 in
pack) pack "$2" "$3" ;;
build) build "$2" "$3" ;;
*) usage ;;
esac
