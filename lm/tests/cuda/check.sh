#!/usr/bin/env bash
# Checks the CUDA path on a machine without GPU and without CUDA toolkit: compiles it with NVIDIA's compiler from PyPI, and runs
# it over `null_driver.c`, which counts kernels instead of running them.
#
#   lm/tests/cuda/check.sh FOLDER          compiles, then runs the tests of lm/tests/cuda/main.rs
#   lm/tests/cuda/check.sh FOLDER check    compiles only
#
# FOLDER keeps compiler (0.3 GB) and build (1.2 GB) for the next time. Needs gcc, pip and unzip; the first time, 105 MB from PyPI
# and some minutes. Ends with 3 if PyPI cannot be reached.
set -euo pipefail

folder=$(realpath -m "${1:?usage: check.sh FOLDER [check]}")
here=$(dirname "$(realpath "$0")")
kit=$folder/toolkit

# The parts of CUDA 13.0 that compile kernels. The libraries that programs are linked with are the null driver.
packages=(
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
)
if [ ! -e "$kit/complete" ]; then
    rm -rf "$kit"
    mkdir -p "$kit/bin" "$kit/lib"
    pip download --quiet --disable-pip-version-check --no-deps --dest "$kit/wheels" "${packages[@]}" || {
        echo "not checked: the CUDA compiler cannot be downloaded from PyPI" >&2
        exit 3
    }
    for wheel in "$kit"/wheels/*.whl; do unzip -qo "$wheel" -d "$kit"; done
    rm -r "$kit/wheels"
    chmod +x "$kit"/nvidia/cu13/bin/* "$kit"/nvidia/cu13/nvvm/bin/*
    ln -s nvidia/cu13/include "$kit/include"
    # candle's kernels for quantised weights and mixtures of experts take ten minutes, and temper never calls them.
    cat > "$kit/bin/nvcc" <<'NVCC'
#!/usr/bin/env bash
real=$(dirname "$(realpath "$0")")/../nvidia/cu13/bin/nvcc
out=
for arg; do
    [ "$out" != next ] || out=$arg
    [ "$arg" != -o ] || out=next
done
case "${@: -1}" in
    */moe_*.cu | */mmq_*.cu | */mmvq_*.cu) exec gcc -c -x c /dev/null -o "$out" ;;
    *) exec "$real" "$@" ;;
esac
NVCC
    chmod +x "$kit/bin/nvcc"
    touch "$kit/complete"
fi
gcc -O1 -Wall -shared -fPIC "$here/null_driver.c" -o "$kit/lib/libcuda.so"
for library in cublas cublasLt cudart curand nvrtc; do ln -sf libcuda.so "$kit/lib/lib$library.so"; done

# Compute capability 8.0: candle compiles kernels for 9.0 and above in a form that no other device runs.
export CUDA_HOME=$kit NVCC=$kit/bin/nvcc PATH=$kit/bin:$PATH CUDA_COMPUTE_CAP=80 CARGO_TARGET_DIR=$folder/target
cd "$here/../../.."
cargo check -p temper-lm --features cuda
[ "${2:-}" != check ] || exit 0
profile=profile.dev.package.temper-lm
program=$(cargo rustc -p temper-lm --features cuda --test cuda --config $profile.opt-level=1 --config $profile.codegen-units=16 \
    --message-format=json-render-diagnostics -- --cfg null_driver \
    -C link-arg=-Wl,--unresolved-symbols=ignore-all -C link-arg=-Wl,-rpath,"$kit/lib" |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
# The null driver has the functions that are called; a call of another one ends the program with its name.
symbols() { nm -D "$@" | awk '$(NF - 1) ~ /^[TU]$/ && $NF !~ /@/ { print $NF }' | sort -u; }
{
    echo '#include <stdio.h>'
    echo '#include <stdlib.h>'
    comm -23 <(symbols --undefined-only "$program") <(symbols --defined-only "$kit/lib/libcuda.so") |
        sed 's/.*/void &(void) { fprintf(stderr, "the null driver has no &\\n"); abort(); }/'
} > "$kit/missing.c"
gcc -shared -fPIC -w "$kit/missing.c" -o "$kit/lib/missing.so"
LD_PRELOAD=$kit/lib/missing.so "$program" --nocapture
