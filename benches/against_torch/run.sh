#!/bin/sh
# Makes the Python side's environment if there is none, builds our side, runs both in turn and prints the table.
# Arguments go to drive.py; PYTHON names an environment of one's own to use instead.
set -eu
here=$(dirname "$0")
if [ -z "${PYTHON:-}" ]; then
    PYTHON="$here/.venv/bin/python"
    if [ ! -x "$PYTHON" ]; then
        python3 -m venv "$here/.venv"
        "$PYTHON" -m pip install --requirement "$here/requirements.txt"
    fi
fi
exec "$PYTHON" "$here/drive.py" "$@"
