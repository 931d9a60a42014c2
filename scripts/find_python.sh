#!/bin/sh
# Prints the path of a Python that can make an environment here, or one line that says what is missing.
#
#   scripts/find_python.sh [VERSION ...]      for example 3.11 3.12; without versions, any from 3.11 on
#
# $PYTHON, where set, is the only candidate. Otherwise the candidates are the names on PATH, then the versions of pyenv.
# Each candidate is run, because a name on PATH may be a shim with nothing behind it.
set -u
versions=${*:-"3.11 3.12 3.13 3.14"}

usable() { # usable PROGRAM VERSION-OR-ANY: it runs, has that version (3.11 at least) and can make an environment with pip
    "$1" - "$2" >/dev/null 2>&1 <<'PY'
import ensurepip, sys, venv
version = "%d.%d" % sys.version_info[:2]
sys.exit(not (sys.version_info >= (3, 11) and sys.argv[1] in ("any", version)))
PY
}

report() { command -v "$1" && exit 0; }

if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" any && report "$PYTHON"
    echo "PYTHON=$PYTHON is not a Python >= 3.11 with the modules venv and ensurepip." >&2
    exit 1
fi
for version in $versions; do
    for program in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
        usable "$program" "$version" && report "$program"
    done
done
if [ $# -eq 0 ]; then
    for program in python3 python; do
        usable "$program" any && report "$program"
    done
    versions="3.11 or later"
fi
echo "No Python $versions with the modules venv and ensurepip found on PATH or under pyenv;" \
    "install one (on Debian: python3 and python3-venv) or name it with PYTHON=/path/to/python." >&2
exit 1
