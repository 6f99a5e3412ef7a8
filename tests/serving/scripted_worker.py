"""One of several server processes whose model answers a script. The arguments: a folder, the seconds a token takes, and
what the supervisor hands over. A file `broken` in the folder keeps it from starting."""

import os
import sys
from pathlib import Path

from served import ScriptedScheduler, make_app, small_tokenizer

from twinloop.serving.api import serve
from twinloop.serving.keys import KeyStore
from twinloop.serving.worker_process import WorkerProcess

folder, delay_s, place = sys.argv[1:]
process = WorkerProcess(place)
if (Path(folder) / "broken").exists():
    sys.exit("this cannot be served")
tokenizer = small_tokenizer()
keys = KeyStore(Path(folder) / "keys.json")
scheduler = ScriptedScheduler(tokenizer, delay_s=float(delay_s))
app = make_app(Path(folder), scheduler, tokenizer, process=process, keys=keys)
app.get("/pid")(os.getpid)
serve(app, process.listener, on_ready=lambda: process.ready(f"{process.count} of {process.starting}"))
