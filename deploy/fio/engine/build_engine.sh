#!/bin/sh
# Builds the fio ioengine of rings into PREFIX/lib, with libemberfs, which it needs (docs/fio-ring.md).
# usage: build_engine.sh PREFIX
#   FIO=fio          the fio that will load it
#   FIO_SOURCE=dir   its source; without it, the source package of the installed Debian package is
#                    fetched into a temporary directory, with an apt configuration of its own
# fio has no stable ABI, and no package has its headers: they must be those of this very version.
# Exit code 3: the source cannot be had, and why.
set -eu
prefix=${1:?usage: build_engine.sh PREFIX}
here=$(cd "$(dirname "$0")" && pwd)
fio=${FIO:-fio}

no_source() {
    echo "$1; or set FIO_SOURCE to the source directory of this fio" >&2
    exit 3
}

version=$("$fio" --version) || no_source "no program $fio: install fio, or set FIO to its path"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# What apt is configured to fetch packages from, as places of source packages.
source_lists() {
    mkdir "$work/lists" "$work/cache" "$work/parts"
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -f "$file" ] && sed -n 's/^[[:space:]]*deb[[:space:]]/deb-src /p' "$file" >"$work/parts/$(basename "$file" .list).list"
    done
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -f "$file" ] && sed 's/^[Tt]ypes:.*/Types: deb-src/' "$file" >"$work/parts/$(basename "$file")"
    done
    true
}

private_apt() {
    apt-get -q -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$work/parts" \
        -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User= \
        -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 "$@" >>"$work/log" 2>&1
}

fetch_source() {
    package=$(dpkg-query -W -f '${source:Package}=${source:Version}' fio 2>/dev/null) ||
        no_source "fio is not installed from a Debian package"
    upstream=${package#*=}
    upstream=${upstream#*:}
    [ "fio-${upstream%-*}" = "$version" ] || no_source "$fio is $version, not the package's $upstream"
    command -v dpkg-source >/dev/null || no_source "dpkg-source is missing: apt-get install dpkg-dev"
    source_lists
    private_apt update || true  # one place that fails need not be the one with fio
    (cd "$work" && private_apt source "$package") ||
        no_source "the source package $package cannot be fetched: $(grep -m 1 'Failed to fetch' "$work/log" || grep '^E:' "$work/log")"
    mv "$work/${package%%=*}-${upstream%-*}" "$work/source"
}

if [ -n "${FIO_SOURCE:-}" ]; then
    [ -f "$FIO_SOURCE/ioengines.h" ] || no_source "FIO_SOURCE=$FIO_SOURCE is not fio's source"
    cp -r "$FIO_SOURCE" "$work/source"
else
    fetch_source
fi
cd "$work/source"
theirs=$(sh ./FIO-VERSION-GEN >/dev/null 2>&1 && sed 's/^FIO_VERSION *= *//' FIO-VERSION-FILE)
[ "$theirs" = "$version" ] || no_source "the source is $theirs, but $fio is $version"
if [ ! -f config-host.h ]; then
    ./configure --disable-native >"$work/configure" 2>&1 || {
        tail -n 5 "$work/configure" >&2
        echo "fio's configure failed: it needs a compiler and the headers of zlib (zlib1g-dev)" >&2
        exit 1
    }
fi
cd - >/dev/null

"$here/../../build_library.sh" "$prefix"
${CC:-cc} -std=gnu11 -O2 -Wall -Wextra -Wno-unused-parameter -Werror -fPIC -shared ${CFLAGS:-} \
    -fmacro-prefix-map="$here/"= -D_GNU_SOURCE -DBUILT_FOR="\"$version\"" \
    -include "$work/source/config-host.h" -isystem "$work/source" \
    -I"$prefix/include" "$here/emberfs_ring.c" -o "$prefix/lib/emberfs_ring.so" \
    -L"$prefix/lib" -lemberfs -Wl,-rpath,'$ORIGIN'
echo "$prefix/lib/emberfs_ring.so for $version"
