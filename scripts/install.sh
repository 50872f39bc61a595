#!/usr/bin/env bash
# Builds FORGE's C library and installs it with its header and its pkg-config file.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: scripts/install.sh [--prefix DIR]

Builds the C library (release) and installs

  DIR/include/forge.h
  DIR/lib/libforge.a
  DIR/lib/libforge.so -> libforge.so.MAJOR -> libforge.so.VERSION
  DIR/lib/pkgconfig/forge.pc

  --prefix DIR  where to (default: /usr/local)
  -h, --help    this text

DESTDIR is put before every path that is written, for packagers. Then, for example:
  cc train.c $(PKG_CONFIG_PATH=DIR/lib/pkgconfig pkg-config --cflags --libs forge)
USAGE
}

prefix=/usr/local
while (($#)); do
    case $1 in
        --prefix)
            if (($# < 2)); then
                echo "install.sh: --prefix needs a directory" >&2
                exit 2
            fi
            prefix=$2
            shift 2
            ;;
        --prefix=*)
            prefix=${1#--prefix=}
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *)
            echo "install.sh: unknown argument '$1'" >&2
            usage >&2
            exit 2
            ;;
    esac
done
# forge.pc names the prefix, so it must not depend on where this was started.
case $prefix in
    "")
        echo "install.sh: --prefix needs a directory" >&2
        exit 2
        ;;
    /*) ;;
    *) prefix=$PWD/$prefix ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
"${CARGO:-cargo}" build --release --lib --quiet
built=${CARGO_TARGET_DIR:-target}/release

manifest_value() { # the first `key = "value"` of Cargo.toml, which is the package's
    sed -n "s/^$1 = \"\(.*\)\"\$/\1/p" Cargo.toml | head -n 1
}
version=$(manifest_value version)
description=$(manifest_value description)
major=${version%%.*}

root=${DESTDIR:-}$prefix
install -d "$root/include" "$root/lib/pkgconfig"
install -m 644 include/forge.h "$root/include/forge.h"
install -m 644 "$built/libforge.a" "$root/lib/libforge.a"
install -m 755 "$built/libforge.so" "$root/lib/libforge.so.$version"
# The middle link bears the SONAME, which is what programs look for when they start.
ln -sf "libforge.so.$version" "$root/lib/libforge.so.$major"
ln -sf "libforge.so.$major" "$root/lib/libforge.so"

pc=$(<forge.pc.in)
pc=${pc//@PREFIX@/"$prefix"}
pc=${pc//@VERSION@/"$version"}
pc=${pc//@DESCRIPTION@/"$description"}
printf '%s\n' "$pc" >"$root/lib/pkgconfig/forge.pc"

echo "forge $version installed in $root"
