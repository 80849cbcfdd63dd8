"""Golden numbers: what TRL 1.12.0's PPOTrainer makes of fixed rollouts, for tests/trainers/test_golden.py.

    python benchmarks/golden_trl112.py [--output tests/trainers/golden]

Trains tiny random models for two rollouts a case, with TRL 1.12.0 in an environment of its own (see peer.py), and
writes `trl112.safetensors` (the models' weights and the tensors of each rollout: `CASE/ROLLOUT/NAME`) and
`trl112.json` (arguments, and the metrics TRL logged). Nothing of TRL's is replaced but the order in which it shuffles
rows into minibatches: responses are its own samples, and the tensors are read from `PPOTrainer.train` as it logs.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from peer import TRL, peer_python

# Token 1 ends a response in the cases that stop. Token 2 is EOS in the others, where every response is full length:
# no policy here samples it, nor the padding token 0.
PAD, STOP, NEVER = 0, 1, 2
VOCABULARY, FIRST_WORD = 32, 5
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "eos_token_id": STOP,
    "bos_token_id": None,
}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "lora_dropout": 0.0}

# TRL 1.12's names, and `rows` of the dataset, `lora`, `eos` and `pad`. A rollout is 16 responses of 8 tokens.
COMMON = {
    "rows": 64,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 1,
    "num_ppo_epochs": 3,
    "response_length": 8,
    "total_episodes": 32,
    "local_rollout_forward_batch_size": 16,
    "temperature": 1.0,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-5,  # the default of 1e-8 would turn the rounding of small gradients into steps
    "kl_coef": 0.2,
    "seed": 0,
    "lora": False,
    "eos": NEVER,
    "pad": PAD,
    "stop_token": None,
}
CASES = {
    "k1": {},
    "k3": {
        "kl_estimator": "k3",
        "whiten_rewards": True,
        "missing_eos_penalty": 1.0,
        "gamma": 0.9,
        "lam": 0.8,
        "temperature": 0.7,
        "vf_coef": 0.5,
        "cliprange": 0.1,
        "cliprange_value": 0.05,
    },
    "minibatches": {"num_mini_batches": 2, "gamma": 0.97},
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "accumulated_minibatches": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "num_mini_batches": 2,
    },
    # Its second rollout is the last batch of the dataset.
    "last_batch": {"rows": 32, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "max_grad_norm": {"max_grad_norm": 1e-4},
    "lora": {"lora": True, "learning_rate": 1e-2},
    "stops": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "eos": STOP,
        "stop_token": "eos",
        "missing_eos_penalty": 0.5,
    },
    "pad_is_eos": {"eos": STOP, "stop_token": "eos", "pad": STOP},
}
TENSORS = ("queries", "responses", "logprobs", "ref_logprobs", "values", "scores", "rewards", "advantages", "returns")
STATISTICS = ("approxkl", "pg_clipfrac", "pg_loss", "vf_loss", "vf_clipfrac", "ratio")


def build_models() -> dict:
    """Policy, reference, reward and value model, and the policy with a LoRA adapter, all with random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(**MODEL))
    policy.lm_head.weight.data.mul_(20)
    # All embeddings share their first feature, so a head's weight for it makes a token likely or impossible.
    policy.model.embed_tokens.weight.data[:, 0] += 0.1
    for token, weight in ((PAD, -10.0), (NEVER, -10.0), (STOP, 1.0)):
        policy.lm_head.weight.data[token] = 0.0
        policy.lm_head.weight.data[token, 0] = weight
    reference = copy.deepcopy(policy)
    for parameter in reference.parameters():
        parameter.data += 0.1 * parameter.data.std() * torch.randn_like(parameter)
    heads = {name: LlamaForSequenceClassification(LlamaConfig(**MODEL, num_labels=1)) for name in ("reward", "value")}
    for head in heads.values():
        head.score.weight.data.mul_(20)
    lora = get_peft_model(copy.deepcopy(policy), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **LORA))
    for name, parameter in lora.named_parameters():
        if ".lora_B." in name:
            parameter.data.mul_(0.05)
    return {"policy": policy, "ref": reference, **heads, "lora": lora}


def train(case: dict, models: dict, folder: str) -> tuple[list[dict], list[dict]]:
    """The tensors and the log of each rollout of one case."""
    import numpy
    import torch
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    from workload import word_tokenizer

    case = COMMON | case
    models = copy.deepcopy(models)
    tokenizer = word_tokenizer(VOCABULARY, case.pop("pad"), case.pop("eos"))
    generator = torch.Generator().manual_seed(1)
    lengths = [2 + row % 4 for row in range(case.pop("rows"))]
    rows = [torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    policy = models["lora" if case.pop("lora") else "policy"]
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    args = PPOConfig(
        folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        report_to="none",
        save_strategy="no",
        num_sample_generations=0,
        disable_tqdm=True,
        **case,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=models["ref"],
        reward_model=models["reward"],
        value_model=models["value"],
        train_dataset=Dataset.from_dict({"input_ids": rows}),
    )
    tensors, logs = [], []
    log, permutation = trainer.log, numpy.random.permutation

    def keep(metrics, *rest):
        running = sys._getframe(1).f_locals
        statistics = {name: running[f"{name}_stats"].clone() for name in STATISTICS}
        tensors.append({name: running[name].clone() for name in TENSORS} | statistics)
        logs.append({name: value for name, value in metrics.items() if name not in ("eps", "lr")})
        log(metrics, *rest)

    trainer.log = keep
    numpy.random.permutation = numpy.arange
    try:
        trainer.train()
    finally:
        numpy.random.permutation = permutation
    return tensors, logs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=str(Path(__file__).parent.parent / "tests" / "trainers" / "golden"))
    args = parser.parse_args()
    if version("trl") != TRL:
        environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
        python = peer_python()
        os.execve(python, [python, __file__, "--output", os.path.abspath(args.output)], environment)
    import torch
    from safetensors.torch import save_file

    models = build_models()
    saved = {
        f"{role}.{name}": weight.clone()
        for role, model in models.items()
        for name, weight in model.state_dict().items()
        if role != "lora" or ".lora_" in name
    }
    versions = {name: version(name).split("+")[0] for name in ("trl", "torch", "transformers", "peft", "accelerate")}
    numbers = {"versions": versions, "model": MODEL, "lora": LORA, "cases": {}}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            tensors, logs = train(case, models, folder)
        stops = torch.cat([rollout["responses"] for rollout in tensors]) == STOP
        print(name, f"{stops.any(1).float().mean().item():.2f} with token {STOP}", logs[-1], flush=True)
        numbers["cases"][name] = {"arguments": COMMON | case, "logs": logs}
        for index, rollout in enumerate(tensors):
            saved |= {f"{name}/{index}/{key}": value.contiguous() for key, value in rollout.items()}
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(saved, folder / "trl112.safetensors")
    (folder / "trl112.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
