#!/bin/sh
# Installs what a fresh Debian or Ubuntu machine lacks, then emberfs into a virtual environment.
# usage: deploy/install.sh VENV [test]      Harmless when repeated; needs root or sudo only if something is missing.
set -eu
venv=$1
want="fuse3 libfuse3-dev pkg-config gcc libc6-dev"
[ "${2:-}" = test ] && want="$want fio dpkg-dev git sqlite3 make e2fsprogs spin nftables iproute2 util-linux etcd-server etcd-client postgresql"
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "emberfs needs Python 3.11 or newer; $python is not. Install it or set PYTHON=/path/to/python3.11" >&2
    exit 1
}
# Only the system's own Python needs Debian's venv and header packages; others bring their own.
"$python" -c 'import ensurepip' 2>/dev/null || want="$want python3-venv"
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    want="$want python3-dev"

missing=""
for package in $want; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
if [ -n "$missing" ]; then
    command -v apt-get >/dev/null || {
        echo "missing:$missing. This script knows apt only; install their equivalents and run it again" >&2
        exit 1
    }
    as_root=""
    [ "$(id -u)" = 0 ] || as_root=sudo
    echo "installing Debian packages:$missing"
    $as_root apt-get update -qq
    # The tests start their own servers: those of the packages must not come up by themselves.
    policy=/usr/sbin/policy-rc.d
    if [ "${2:-}" = test ] && [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" >/dev/null
        $as_root chmod 755 "$policy"
        trap '$as_root rm -f "$policy"' EXIT
    fi
    # shellcheck disable=SC2086
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
    if [ "${2:-}" = test ] && command -v systemctl >/dev/null; then  # nor after the next boot
        for name in etcd postgresql; do
            case "$missing" in *" $name"*) $as_root systemctl disable -q "$name" 2>/dev/null || true ;; esac
        done
    fi
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "installing emberfs into $venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1'
if [ "${2:-}" = test ]; then
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -e . --group dev
else
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -e .
fi
