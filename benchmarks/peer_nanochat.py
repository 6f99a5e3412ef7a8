"""One contestant of `benchmarks.peers`: pretraining by nanochat's network, optimizer and compiled step.

    PYTHONPATH=CHECKOUT python peer_nanochat.py JOB.json

Runs in the peers' environment, without Twinloop. Rows are cut from one stream of tokens, so all of them are full.
Prints one line of JSON: {"units", "cpu_s", "wall_s", "loss"} of the measured steps.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import chain
from pathlib import Path

import torch
from nanochat.gpt import GPT, GPTConfig


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(1)
    documents = (json.loads(line)["input_ids"] for line in Path(job["data"]).read_text().splitlines())
    stream = torch.tensor(list(chain.from_iterable(documents)))
    network = json.loads((Path(job["model"]) / "config.json").read_text())
    config = GPTConfig(
        sequence_len=job["seq_len"],
        vocab_size=network["vocab_size"],
        n_layer=network["num_hidden_layers"],
        n_head=network["num_attention_heads"],
        n_kv_head=network["num_key_value_heads"],
        n_embd=network["hidden_size"],
        window_pattern="L",
    )
    model = GPT(config)
    model.init_weights()
    step = torch.compile(model, dynamic=False)
    optimizer = model.setup_optimizer()
    rows, length = job["rows"], job["seq_len"]
    started = (0.0, 0.0)
    for index in range(job["warm_steps"] + job["steps"]):
        if index == job["warm_steps"]:
            started = time.process_time(), time.perf_counter()
        start = index * rows * length % (len(stream) - rows * length - 1)
        piece = stream[start : start + rows * length + 1]
        loss = step(piece[:-1].view(rows, length), piece[1:].view(rows, length))
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
    cpu, wall = time.process_time() - started[0], time.perf_counter() - started[1]
    print(json.dumps({"units": rows * length * job["steps"], "cpu_s": cpu, "wall_s": wall, "loss": float(loss)}))


if __name__ == "__main__":
    main()
