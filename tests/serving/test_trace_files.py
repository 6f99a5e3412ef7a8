"""The files of traces, where several server processes write into one folder."""

import subprocess
import sys
from contextlib import ExitStack

from pydantic import BaseModel
from served import wait_until

from twinloop.serving.traces import TraceStore

FILES = 2
WRITER = f"""
import sys
import time
from pathlib import Path
from pydantic import BaseModel
from twinloop.serving.traces import TraceStore

class Said(BaseModel):
    trace_id: str
    time: str

folder = Path(sys.argv[1])
store = TraceStore(folder, file_bytes=200, files={FILES})  # two traces a file
for id in map(str.strip, sys.stdin):
    store.record(id, Said(trace_id=id, time=id[-6:]))
    while not any(id in file.read_text() for file in folder.iterdir() if file.exists()):
        time.sleep(0.002)
    print(id, flush=True)
store.close()
"""


class Words(BaseModel):
    trace_id: str


class Writer:
    """A process that writes a trace when it is told to."""

    def __init__(self, folder, number):
        self._number = number
        command = [sys.executable, "-c", WRITER, str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def write(self, number):
        """Returns the trace's id, once it is on the disk."""
        self._process.stdin.write(f"{self._number:016x}{number:016x}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.communicate(timeout=30)
        assert self._process.returncode == 0


def kept(folder):
    reader = TraceStore(folder)
    ids = {trace["trace_id"] for trace in reader.newest()}
    reader.close()
    return ids


def test_a_process_keeps_its_files_however_many_others_write_and_those_of_ended_ones_are_bounded(tmp_path):
    with ExitStack() as stack:
        writers = [stack.enter_context(Writer(tmp_path, number)) for number in range(FILES + 2)]
        written = {writer.write(number) for number in range(4) for writer in writers}
        assert kept(tmp_path) == written
        assert len([*tmp_path.iterdir()]) == FILES * len(writers)
    with Writer(tmp_path, 9) as later:
        newest = later.write(9)
    assert newest in kept(tmp_path)
    assert len([*tmp_path.iterdir()]) == FILES + 1


def test_a_file_that_another_store_of_this_process_number_writes_is_kept(tmp_path):
    """Servers in several containers may have one number and one folder."""
    stores = [TraceStore(tmp_path, files=FILES) for _ in range(FILES + 2)]
    for store in stores:
        before = len([*tmp_path.iterdir()])
        store.record("a" * 32, Words(trace_id="a" * 32))
        wait_until(lambda before=before: len([*tmp_path.iterdir()]) > before)
    assert len([*tmp_path.iterdir()]) == len(stores)
    for store in stores:
        store.close()
