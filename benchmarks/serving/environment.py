"""The peers, in a folder of their own: a virtual environment, and llama.cpp built from the source that a package holds.

DIR/env      onnxruntime-genai and ctranslate2, with what converts a model to their forms
DIR/src      the source of llama-cpp-python, which holds llama.cpp's
DIR/build    llama-server and llama-batched-bench, for this machine's instructions (a quarter of an hour on two cores)
DIR/models   SmolLM2 in every contestant's form
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.serving.goals import CTRANSLATE2, GENAI, LLAMA
from twinloop.common.errors import UserError

CONVERTERS = ("torch==2.13.0", "transformers==5.24.0")
PACKAGES = {
    GENAI: (*CONVERTERS, "onnx-ir==1.1.0", "onnxruntime==1.31.1", "onnxruntime-genai==0.18.0"),
    CTRANSLATE2: (*CONVERTERS, "ctranslate2==4.8.5"),
}
LLAMA_SOURCE = "llama-cpp-python==0.3.36"
BUILD_TOOLS = ("cmake==4.4.5", "ninja==1.13.2")
LLAMA_PROGRAMS = ("llama-server", "llama-batched-bench")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # else the build loads the web page from elsewhere
}


@dataclass(frozen=True)
class Peers:
    """missing: why a peer takes no part, by its name."""

    folder: Path
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        return self.folder / "env" / "bin" / "python"

    def program(self, name: str) -> Path:
        """Of llama.cpp."""
        return self.folder / "build" / "bin" / name


def no_peers(folder: Path) -> Peers:
    """Ours alone."""
    return Peers(folder.absolute(), dict.fromkeys((LLAMA, GENAI, CTRANSLATE2), "left out by --ours-only"))


def make_peers(folder: Path) -> Peers:
    """Install and build what is not there yet. A peer that cannot be had is missing, with the reason."""
    peers = Peers(folder.absolute())
    peers.folder.mkdir(parents=True, exist_ok=True)
    _try(peers, LLAMA, lambda: _build_llama(peers))
    for name, packages in PACKAGES.items():
        _try(peers, name, lambda packages=packages: _install(peers, packages))  # type: ignore[misc]
    return peers


def _try(peers: Peers, name: str, make: Callable[[], None]) -> None:
    try:
        make()
    except UserError as error:
        peers.missing[name] = str(error)


def _install(peers: Peers, packages: Sequence[str]) -> None:
    stamp = peers.folder / "env" / ".installed"
    installed = set(stamp.read_text().split()) if stamp.exists() else set()
    if installed.issuperset(packages):
        return
    if not peers.python.exists():
        venv.create(peers.folder / "env", with_pip=True)
    call(f"pip install {' '.join(packages)}", [peers.python, "-m", "pip", "install", "-q", *packages])
    stamp.write_text("\n".join(sorted(installed.union(packages))))


def _build_llama(peers: Peers) -> None:
    if all(peers.program(name).exists() for name in LLAMA_PROGRAMS):
        return
    if not (source := peers.folder / "src" / "vendor" / "llama.cpp").exists():
        _unpack_llama(peers)
    cmake, ninja = _build_tool(peers, "cmake"), _build_tool(peers, "ninja")
    build = peers.folder / "build"
    settings = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    made_by = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", source, "-B", build]
    call("cmake configures llama.cpp", [cmake, *made_by, *settings])
    call("cmake builds llama.cpp", [cmake, "--build", build, "-j", "2", "--target", *LLAMA_PROGRAMS])


def _build_tool(peers: Peers, name: str) -> str:
    """The machine's own, or that of its package."""
    if found := shutil.which(name):
        return found
    _install(peers, BUILD_TOOLS)
    return str(peers.python.parent / name)


def _unpack_llama(peers: Peers) -> None:
    if not peers.python.exists():
        venv.create(peers.folder / "env", with_pip=True)
    sdist, pip = peers.folder / "sdist", [peers.python, "-m", "pip"]
    download = ["download", "-q", "--no-deps", "--no-binary", ":all:", "-d", sdist, LLAMA_SOURCE]
    call(f"pip download {LLAMA_SOURCE}", [*pip, *download])
    (archive,) = sdist.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(sdist, filter="data")
    (sdist / archive.name.removesuffix(".tar.gz")).rename(peers.folder / "src")


def call(what: str, command: Sequence[object]) -> None:
    """Run a command to its end. Raises UserError, with its last words, where it fails."""
    print(f"peers: {what}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise UserError(f"{what}: {error}") from None
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"ended with code {done.returncode}"]
        raise UserError(f"{what}: {words[-1].strip()[:200]}")
