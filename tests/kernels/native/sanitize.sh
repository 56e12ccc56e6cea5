#!/bin/sh
# Compile the kernels with check.cpp and run them: with the sanitizers of addresses and of undefined behaviour, then with
# that of threads.
#
#   CXX=aarch64-linux-gnu-g++ RUNNER=qemu-aarch64 SANITIZE=none LINK=-static sh sanitize.sh
#
# does it for another machine in an emulator. SANITIZE: address, thread, or none; both sanitizers where not given.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
native=$here/../../../src/btlm/kernels/native
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
CXX=${CXX:-g++}
RUNNER=${RUNNER:-}
LINK=${LINK:-}

check() {  # name, flags, argument of the program
    flags="-std=c++17 -g -ffp-contract=off -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized -pthread -I$native $2"
    objects=
    compile() {  # source, flags of its own
        # shellcheck disable=SC2086
        $CXX $flags ${2:-} -c "$1" -o "$build/$1.o" && objects="$objects $build/$1.o"
    }
    cd "$native"
    case $($CXX -dumpmachine) in
    x86_64*)
        flags="$flags -DBTLM_X86"
        compile path_avx2.cpp "-mavx2 -mfma"
        avx512="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma"
        compile path_avx512.cpp "$avx512"
        compile tiled_emulated_avx512.cpp "$avx512"
        if echo 'int main() { asm volatile("tdpbsud %tmm2, %tmm1, %tmm0"); }' |
            $CXX -mamx-tile -mamx-int8 -x c++ -c -o "$build/amx.o" - 2>"$build/amx.txt"; then
            flags="$flags -DBTLM_AMX"
            compile tiled_amx.cpp "$avx512 -mamx-tile -mamx-int8"
        fi
        ;;
    aarch64* | arm64*)
        flags="$flags -DBTLM_NEON"
        compile path_neon.cpp "-march=armv8.2-a+dotprod"
        ;;
    esac
    for source in operations.cpp dispatch.cpp threads.cpp path_plain.cpp tiled_emulated_plain.cpp; do compile $source; done
    cd "$here"
    compile check.cpp
    # shellcheck disable=SC2086
    $CXX $flags $LINK $objects -o "$build/check"
    echo "$1"
    # shellcheck disable=SC2086
    $RUNNER "$build/check" $3
}

case ${SANITIZE:-both} in
none) check plain "-O2" "" ;;
address | both) check "addresses and undefined behaviour" \
    "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" "" ;;
esac
case ${SANITIZE:-both} in
thread | both) check threads "-O1 -fsanitize=thread" threads ;;
esac
