#!/bin/sh
# Creates the Python environment if it does not exist, builds our side, runs both sides in turn and prints the table.
# Passes its arguments on to compare.py. Set PYTHON to use the Python of another environment.
set -eu
here=$(dirname "$0")
if [ -z "${PYTHON:-}" ]; then
    PYTHON="$here/.venv/bin/python"
    if [ ! -x "$PYTHON" ]; then
        python3 -m venv "$here/.venv"
        "$PYTHON" -m pip install --requirement "$here/requirements.txt"
    fi
fi
exec "$PYTHON" "$here/compare.py" "$@"
