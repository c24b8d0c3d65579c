#!/bin/sh
# Creates the Python environment of the peers if it does not exist, builds temper, runs everything in turn and prints the
# tables. Passes its arguments on to compare.py. A peer that cannot be installed is reported as absent.
set -eu
here=$(dirname "$0")
venv="$here/.venv"
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
    # One after the other: one that fails must not take the others with it.
    while read -r peer; do
        "$venv/bin/python" -m pip install --quiet "$peer" || echo "cannot install $peer" >&2
    done < "$here/requirements.txt"
fi
if [ -z "${TEMPER:-}" ]; then
    cargo build --release --manifest-path "$here/../../Cargo.toml"
fi
exec "$venv/bin/python" "$here/compare.py" "$@"
