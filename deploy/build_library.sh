#!/bin/sh
# Builds libemberfs, the C client of rings, into PREFIX/lib and its header into PREFIX/include.
set -eu
prefix=${1:?usage: build_library.sh PREFIX}
source=$(dirname "$0")/../client/native
mkdir -p "$prefix/lib" "$prefix/include"
${CC:-cc} -std=gnu11 -O2 -Wall -Wextra -Werror -fPIC -shared -fvisibility=hidden ${CFLAGS:-} \
    -Wl,-soname,libemberfs.so.0 "$source/emberfs.c" -o "$prefix/lib/libemberfs.so.0" -pthread
ln -sf libemberfs.so.0 "$prefix/lib/libemberfs.so"
cp "$source/emberfs.h" "$prefix/include/"
echo "$prefix/lib/libemberfs.so.0, $prefix/include/emberfs.h"
