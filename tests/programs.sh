#!/usr/bin/env bash
# Makes sure that the programs which the tests and benchmarks use as peers are there: programs.sh PROGRAM:PACKAGE...
# A program that is written as a path is any file that must be there.
# Installs Debian's packages of the missing ones when run as root; otherwise says what to install, and fails.
set -eu -o pipefail

missing_programs=()
missing_packages=()
for pair in "$@"; do
    program=${pair%%:*}
    package=${pair#*:}
    if [[ $program == /* && -e $program ]]; then
        continue
    fi
    if ! command -v "$program" >/dev/null && ! compgen -G "/usr/lib/postgresql/*/bin/$program" >/dev/null; then
        missing_programs+=("$program")
        missing_packages+=("$package")
    fi
done
# The tests run a server of their own from Debian's folders, also where another PostgreSQL is installed.
if [[ " $* " == *" postgres:"* ]] && ! compgen -G "/usr/lib/postgresql/*/bin/initdb" >/dev/null; then
    missing_programs+=(postgres)
    missing_packages+=(postgresql)
fi
[ ${#missing_packages[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "error: these programs are missing: ${missing_programs[*]}" >&2
    echo "       install them first; on Debian: apt-get install ${missing_packages[*]}" >&2
    exit 1
fi
echo "installing ${missing_packages[*]}"
export DEBIAN_FRONTEND=noninteractive
# No daemon of these packages is to run: the tests start what they need, where they need it.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
log=$(mktemp)
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing_packages[@]}"; } >"$log" 2>&1; then
    tail -20 "$log" >&2
    rm -f "$log"
    echo "error: the packages could not be installed" >&2
    exit 1
fi
rm -f "$log"
