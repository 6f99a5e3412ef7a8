"""Our server over one exported model, without a registry: the product's own application, and a route that counts.

    python -m benchmarks.serving.our_server EXPORTED [--slots 8] [--threads 1] [--drafts 7]

The first line on stdout is the address. `GET /benchmark/counts` has the seconds of CPU time of the whole process, of
the engine's thread, and of ONNX Runtime's calls in it (all of them where there is one thread), the steps in which
answers went on, and the tokens of answers.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime as ort

from twinloop.domains.loader import load_domain
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.api import create_app, run_server
from twinloop.serving.decisions import DecisionService, ModelInfo
from twinloop.serving.engine import Engine
from twinloop.serving.engine.drafts import DRAFT_TOKENS
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.engine.slots import SlotBatch
from twinloop.serving.knowledge.documents import DocumentStore
from twinloop.serving.model_manager import ModelManager
from twinloop.serving.traces import TraceStore

COUNTS = "/benchmark/counts"


@dataclass
class Counts:
    """Of the engine's one thread."""

    onnxruntime_s: float = 0.0
    engine_s: float = 0.0
    steps: int = 0

    def watch(self) -> None:
        """Count from now on, in all engines of this process."""
        run, step, step_along = ort.InferenceSession.run_with_iobinding, SlotBatch.step, SlotBatch.step_along

        def timed(*given: Any) -> None:
            began = time.thread_time()
            run(*given)
            self.engine_s = time.thread_time()
            self.onnxruntime_s += self.engine_s - began

        ort.InferenceSession.run_with_iobinding = timed
        SlotBatch.step = self._counted(step)  # type: ignore[method-assign]
        SlotBatch.step_along = self._counted(step_along)  # type: ignore[method-assign]

    def _counted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any) -> Any:
            self.steps += 1
            return step(*given)

        return counted


def serve(exported: Path, folder: Path, *, slots: int, threads: int, drafts: int) -> None:
    """Until SIGTERM. folder: for documents and traces."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    counts = Counts()
    counts.watch()
    tokenizer = ChatTokenizer.load(exported)
    scheduler = Scheduler(Engine.load(exported, slots=slots, threads=threads), draft_tokens=drafts)
    documents, traces = DocumentStore(folder / "documents.db"), TraceStore(folder / "traces")
    model = ModelInfo(name="smollm2", version="1", digest="0" * 64)
    service = DecisionService(scheduler, tokenizer, documents, model, load_domain("chat", folder).domain, traces)
    app = create_app(ModelManager(service))

    @app.get(COUNTS, include_in_schema=False)
    def counted() -> dict[str, float]:
        tokens = scheduler.metrics().totals.completion_tokens
        return {
            "cpu_s": time.process_time(),
            "engine_s": counts.engine_s,
            "onnxruntime_s": counts.onnxruntime_s,
            "steps": counts.steps,
            "tokens": tokens,
        }

    try:
        run_server(app, "127.0.0.1", 0, on_ready=lambda address: print(address, flush=True))
    finally:
        scheduler.close(drain=False)
        documents.close()
        traces.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", type=Path)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--drafts", type=int, default=DRAFT_TOKENS)
    given = parser.parse_args()
    with TemporaryDirectory(prefix="twinloop-served-") as folder:
        serve(given.exported, Path(folder), slots=given.slots, threads=given.threads, drafts=given.drafts)


if __name__ == "__main__":
    main()
