#!/usr/bin/env bash
# The memory that `temper plan` expects of stages that never ran, beside the peaks of runs, at two model sizes. Stages are short:
# a peak is reached in the first steps. About twenty minutes on two cores, most of it PPO of the larger model.
set -euo pipefail
cd "$(dirname "$0")"
temper=${TEMPER:-../../target/release/temper}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for shape in "256 6 4" "768 12 12"; do
    read -r width layers heads <<< "$shape"
    settings=(--store "$folder/store")
    for setting in "n_embd=$width" "n_layer=$layers" "n_head=$heads"; do settings+=(--set "stages.base.with.$setting"); done
    "$temper" plan pipeline.yaml "${settings[@]}" --json > "$folder/plan.json"
    "$temper" run pipeline.yaml "${settings[@]}" -j 1 > /dev/null
    echo "width $width, $layers layers"
    for stage in base sft "proxy[1]" full ensemble rl; do
        "$temper" show pipeline.yaml "$stage" "${settings[@]}" --json | python3 -c '
import json, sys
stage, plan = sys.argv[1], json.load(open(sys.argv[2]))
expected = next(s for s in plan["stages"] if s["stage"] == stage)["expected_memory_bytes"] / 1e6
peak = json.load(sys.stdin)["provenance"]["peak_bytes"] / 1e6
print(f"  {stage:9} expected {expected:5.0f} MB, peak {peak:5.0f} MB, ratio {expected / peak:.2f}")' "$stage" "$folder/plan.json"
    done
done
