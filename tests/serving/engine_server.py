"""A server process on a real engine with random weights. The arguments: a folder, slots, and places in the queue. At a
SIGUSR1 another model takes the place of the one that answers, as a promotion does; at a SIGUSR2 memory that nothing
uses goes back to the system, which C's allocator else keeps for later."""

import ctypes
import gc
import os
import signal
import sys
import threading
from pathlib import Path

from served import DOMAIN, make_store
from test_structured import small_engine
from tool_templates import FAMILIES, save_tokenizer

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.api import create_app, run_server
from twinloop.serving.decisions import DecisionService, ModelInfo
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.model_manager import ModelManager
from twinloop.serving.traces import TraceStore

folder, slots, queue_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
save_tokenizer(FAMILIES["qwen"], folder)
tokenizer, documents, traces = ChatTokenizer.load(folder), make_store(folder), TraceStore(folder / "traces")
swapping = threading.Lock()


def service(version: int) -> DecisionService:
    scheduler = Scheduler(small_engine(tokenizer, slots=slots), queue_size=queue_size)
    model = ModelInfo(name="returns", version=str(version), digest="d" * 64)
    return DecisionService(scheduler, tokenizer, documents, model, DOMAIN, traces)


manager = ModelManager(service(1))


def swap(*_: object) -> None:
    def work() -> None:
        with swapping:
            manager.replace(service(int(manager.service.model.version) + 1))

    threading.Thread(target=work).start()


def trim(*_: object) -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


signal.signal(signal.SIGUSR1, swap)
signal.signal(signal.SIGUSR2, trim)
run_server(create_app(manager), "127.0.0.1", 0, on_ready=lambda url: print(url, os.getpid(), flush=True))
