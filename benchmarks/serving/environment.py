"""The peers, in a folder of their own: a virtual environment, and llama.cpp built from the source that a package holds.

DIR/env      onnxruntime-genai and ctranslate2, with what converts a model to their forms
DIR/llama-cpp-python==VERSION
             its source, which holds llama.cpp's; in `build`, llama-server and llama-batched-bench for this machine's
             instructions (a quarter of an hour on two cores)
DIR/models   SmolLM2 in every contestant's form
"""

from __future__ import annotations

import shutil
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.processes import call, install
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

    @property
    def llama(self) -> Path:
        """The source that llama.cpp is built from, and in."""
        return self.folder / LLAMA_SOURCE

    def program(self, name: str) -> Path:
        """Of llama.cpp."""
        return self.llama / "build" / "bin" / name


def no_peers(folder: Path) -> Peers:
    """Ours alone."""
    return Peers(folder.absolute(), dict.fromkeys((LLAMA, GENAI, CTRANSLATE2), "left out by --ours-only"))


def make_peers(folder: Path) -> Peers:
    """Install and build what is not there yet. A peer that cannot be had is missing, with the reason."""
    peers = Peers(folder.absolute())
    peers.folder.mkdir(parents=True, exist_ok=True)
    _try(peers, LLAMA, lambda: _build_llama(peers))
    for name, packages in PACKAGES.items():
        _try(peers, name, lambda packages=packages: install(peers.folder / "env", packages))  # type: ignore[misc]
    return peers


def _try(peers: Peers, name: str, make: Callable[[], object]) -> None:
    try:
        make()
    except UserError as error:
        peers.missing[name] = str(error)


def _build_llama(peers: Peers) -> None:
    source, build = peers.llama, peers.llama / "build"
    if (built := build / ".built").exists():
        return
    if not source.exists():
        _unpack_llama(peers)
    cmake, ninja = _build_tool(peers, "cmake"), _build_tool(peers, "ninja")
    settings = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    made_by = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", source / "vendor" / "llama.cpp", "-B", build]
    _do("cmake configures llama.cpp", [cmake, *made_by, *settings])
    _do("cmake builds llama.cpp", [cmake, "--build", build, "-j", "2", "--target", *LLAMA_PROGRAMS])
    built.touch()


def _build_tool(peers: Peers, name: str) -> str:
    """The machine's own, or that of its package."""
    if found := shutil.which(name):
        return found
    return str(install(peers.folder / "env", BUILD_TOOLS).with_name(name))


def _unpack_llama(peers: Peers) -> None:
    python, sdist = install(peers.folder / "env", ()), peers.folder / "sdist"
    download = ["download", "-q", "--no-deps", "--no-binary", ":all:", "-d", sdist, LLAMA_SOURCE]
    _do(f"pip download {LLAMA_SOURCE}", [python, "-m", "pip", *download])
    (archive,) = sdist.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(sdist, filter="data")
    (sdist / archive.name.removesuffix(".tar.gz")).rename(peers.llama)
    shutil.rmtree(sdist)


def _do(what: str, command: Sequence[object]) -> None:
    print(f"peers: {what}", file=sys.stderr, flush=True)
    call(what, command)
