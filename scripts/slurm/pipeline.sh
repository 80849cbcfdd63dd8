#!/bin/bash
# SFT, reward model and PPO as three jobs, each started when the one before it has succeeded:
#   bash scripts/slurm/pipeline.sh recipes/configs/qwen3_8b runs/qwen3_8b [sbatch options, such as --nodes 4]
set -euo pipefail

config=${1:?which base? for example recipes/configs/qwen3_8b}
output=${2:?where to? for example runs/qwen3_8b}
options=("${@:3}")

submit() { # STEP DEPENDENCY ARGUMENTS…
  sbatch --parsable --job-name "rlhf-$1" ${2:+"--dependency=afterok:$2"} "${options[@]}" scripts/slurm/recipe.sbatch \
    "recipes/$1.py" --config "$config/$1.yaml" --output_dir "$output/$1" "${@:3}"
}

sft=$(submit sft "")
reward=$(submit reward "${sft%%;*}" --model_name_or_path "$output/sft")
ppo=$(submit ppo "${reward%%;*}" --model_name_or_path "$output/sft" --reward_model_name_or_path "$output/reward")
echo "sft ${sft%%;*}, reward ${reward%%;*}, ppo ${ppo%%;*}"
