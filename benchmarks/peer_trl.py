"""One contestant of `benchmarks.peers`: a job trained by TRL. Runs in the peers' environment, without Twinloop.

    python peer_trl.py JOB.json

Prints one line of JSON: {"units", "cpu_s", "wall_s", "loss"} of the measured steps.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true"}

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)


class Stopwatch(TrainerCallback):
    """Times all steps after the warm ones, to the end of training. units: counted by whoever knows them."""

    def __init__(self, warm: int):
        self.warm, self.units, self.loss = warm, 0.0, float("nan")
        self.cpu = self.wall = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.warm:
            self.units, self.cpu, self.wall = 0.0, time.process_time(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            self.cpu, self.wall = time.process_time() - self.cpu, time.perf_counter() - self.wall

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    rows = [json.loads(line) for line in Path(job["data"]).read_text().splitlines()]
    scores = {"num_labels": 1} if job["method"] == "reward" else {}
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = kind.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa", **scores)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    watch = Stopwatch(job["warm_steps"])
    with TemporaryDirectory() as out:
        trainer = {"pretrain": _sft, "sft": _sft, "reward": _reward, "dpo": _dpo, "grpo": _grpo}[job["method"]](
            job, rows, model, tokenizer, watch, out
        )
        trainer.add_callback(watch)
        trainer.train()
    print(json.dumps({"units": watch.units, "cpu_s": watch.cpu, "wall_s": watch.wall, "loss": watch.loss}))


def _common(job: dict[str, Any], out: str) -> dict[str, Any]:
    return {
        "output_dir": out,
        "max_steps": job["warm_steps"] + job["steps"],
        "learning_rate": job["learning_rate"],
        "optim": "adamw_torch_fused",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": job["steps"],
        "dataloader_num_workers": 0,
        "max_grad_norm": 1.0,
    }


def _lora(job: dict[str, Any]) -> Any:
    if not job["lora_rank"]:
        return None
    rank = job["lora_rank"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _sft(job: dict[str, Any], rows: list[Any], model: Any, tokenizer: Any, watch: Stopwatch, out: str) -> Any:
    packed = job["setting"] == "packed"
    config = SFTConfig(
        **_common(job, out),
        per_device_train_batch_size=job["rows"] if packed else job["examples"],
        packing=packed,
        max_length=job["seq_len"],
        completion_only_loss=job["method"] == "sft",
    )

    class Counting(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            mask = inputs.get("attention_mask")
            watch.units += float(inputs["input_ids"].numel() if mask is None else (mask > 0).sum())
            return super().compute_loss(model, inputs, *args, **options)

    return Counting(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                    peft_config=_lora(job))  # fmt: skip


def _counting_pairs(trainer: Any, watch: Stopwatch) -> Any:
    class Counting(trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            watch.units += inputs["input_ids"].shape[0] / 2
            return super().compute_loss(model, inputs, *args, **options)

    return Counting


def _dpo(job: dict[str, Any], rows: list[Any], model: Any, tokenizer: Any, watch: Stopwatch, out: str) -> Any:
    config = DPOConfig(
        **_common(job, out),
        per_device_train_batch_size=job["examples"],
        max_length=job["seq_len"],
        precompute_ref_log_probs=True,
        beta=0.1,
    )

    counting = _counting_pairs(DPOTrainer, watch)
    return counting(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                    peft_config=_lora(job))  # fmt: skip


def _reward(job: dict[str, Any], rows: list[Any], model: Any, tokenizer: Any, watch: Stopwatch, out: str) -> Any:
    config = RewardConfig(**_common(job, out), per_device_train_batch_size=job["examples"], max_length=job["seq_len"])

    counting = _counting_pairs(RewardTrainer, watch)
    return counting(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                    peft_config=_lora(job))  # fmt: skip


def _grpo(job: dict[str, Any], rows: list[Any], model: Any, tokenizer: Any, watch: Stopwatch, out: str) -> Any:
    config = GRPOConfig(
        **_common(job, out),
        per_device_train_batch_size=job["examples"] * job["group_size"],
        num_generations=job["group_size"],
        max_completion_length=job["max_new_tokens"],
        temperature=1.0,
        beta=0.0,
    )

    def reward(completions: list[str], **_: Any) -> list[float]:
        watch.units += len(completions)
        return [float(zlib.crc32(text.encode()) % 2) for text in completions]

    return GRPOTrainer(model, reward, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                       peft_config=_lora(job))  # fmt: skip


if __name__ == "__main__":
    main()
