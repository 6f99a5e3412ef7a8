"""ONNX Runtime sessions: over an exported model's own weights, or over tensors that someone else owns."""

from __future__ import annotations

import ctypes
import functools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from twinloop.common.errors import UserError
from twinloop.models.adapter_form import AdapterForm
from twinloop.models.config import DecoderConfig, Precision
from twinloop.models.exported import GRAPH_FILE
from twinloop.models.onnx_graph import build_graph
from twinloop.models.onnx_nodes import UNBOUND_LOCATION, unbound_bytes
from twinloop.models.shapes import weight_shapes
from twinloop.serving.engine.kv_cache import Device

# GroupQueryAttention has float32 on CPU only, and bfloat16 on CUDA only (1.31).
_DEVICE_OF: dict[Precision, Device] = {"fp32": "cpu", "int8": "cpu", "int4": "cpu", "fp16": "cuda", "bf16": "cuda"}
_PROVIDER: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

# Under this many parameters a step is shorter than what a second thread costs to wake.
_ONE_THREAD_PARAMETERS = 4_000_000

_ELEMENT_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}
"""OrtValue.data_type() to onnx.TensorProto's number."""


def choose_device(precision: Precision, provider: Device | None) -> Device:
    """Where a precision runs. Raises UserError if that is not the provider asked for, or is not there."""
    device = _DEVICE_OF[precision]
    if provider not in (None, *_PROVIDER):
        raise UserError(f"engine: provider {provider!r} is not one of {', '.join(_PROVIDER)}")
    if provider not in (None, device):
        possible = " or ".join(name for name, where in _DEVICE_OF.items() if where == provider)
        raise UserError(f"engine: {precision} does not run on {provider}; export the model as {possible} for it")
    if device == "cuda" and not cuda_devices():
        raise UserError(f"engine: {precision} needs a CUDA device and there is none; export the model as fp32 or int8")
    return device


@functools.cache
def cuda_devices() -> int:
    """CUDA devices that the driver shows; 0 without a driver. (The provider is compiled in wherever we run.)"""
    if _PROVIDER["cuda"] not in ort.get_available_providers():
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def open_exported(
    exported_dir: Path, config: DecoderConfig, *, device: Device, threads: int | None
) -> ort.InferenceSession:
    """A session over an exported model's graph and weights, whose integrity was checked already."""
    return _open(exported_dir / GRAPH_FILE, _options(config, device, threads), device)


def open_bound(
    config: DecoderConfig,
    weights: Mapping[str, ort.OrtValue],
    *,
    precision: Precision,
    capacity: int,
    device: Device,
    threads: int | None,
    lora: AdapterForm | None = None,
) -> ort.InferenceSession:
    """A session whose initializers are the caller's tensors: a change made in place shows in the next run."""
    shapes = weight_shapes(config) | (lora.shapes(config) if lora else {})
    if missing := sorted(set(shapes) - set(weights)):
        raise ValueError(f"weights lack {missing[0]} and {len(missing) - 1} more")
    types = {weights[name].data_type() for name in shapes}
    if len(types) > 1 or not types <= set(_ELEMENT_TYPES):
        raise ValueError(f"weights must all be float32, float16 or bfloat16, and alike; they are {sorted(types)}")
    options = _options(config, device, threads)
    options.add_session_config_entry("session.disable_prepacking", "1")  # a packed copy would not follow the owner's
    for name, shape in shapes.items():
        if tuple(weights[name].shape()) != shape:
            raise ValueError(f"{name} has shape {tuple(weights[name].shape())}, the network's is {shape}")
        options.add_initializer(name, weights[name])
    weights_type = _ELEMENT_TYPES[types.pop()]
    graph = build_graph(config, None, precision=precision, capacity=capacity, weights_type=weights_type, lora=lora)
    with tempfile.TemporaryDirectory(prefix="twinloop-graph-") as folder:
        path = Path(folder) / GRAPH_FILE
        path.write_bytes(graph.SerializeToString())
        # ONNX Runtime wants the file of the weights to exist, though every one is replaced: a hole of that size.
        with (path.parent / UNBOUND_LOCATION).open("wb") as hole:
            hole.truncate(unbound_bytes(graph))
        # Folding would compute the cast of a weight once and for all.
        return _open(path, options, device, disabled_optimizers=["ConstantFolding"])


def session_threads(config: DecoderConfig, device: Device, threads: int | None) -> int:
    """How many threads a session takes, of at most `threads` (None: every core)."""
    if device == "cuda" or config.num_parameters < _ONE_THREAD_PARAMETERS:
        return 1
    return usable_cores() if threads is None else threads


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _options(config: DecoderConfig, device: Device, threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = session_threads(config, device, threads)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin while they wait slow everything else on the cores, the HTTP server first.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    if device == "cuda":
        options.use_deterministic_compute = True
    return options


def _open(
    path: Path, options: ort.SessionOptions, device: Device, disabled_optimizers: list[str] | None = None
) -> ort.InferenceSession:
    providers: list[str | tuple[str, dict[str, str]]] = [_PROVIDER["cpu"]]
    if device == "cuda":
        ort.preload_dlls(msvc=False)
        ort.set_default_logger_severity(3)  # else it warns of every session that no plug-in provider was found (1.31)
        cuda = {"device_id": "0", "arena_extend_strategy": "kSameAsRequested"}
        providers.insert(0, (_PROVIDER["cuda"], cuda))
    # Read when a session is made. The tiled kernel takes 2 to 4 times longer over a prompt than the plain one, at
    # every length up to a chunk that we measured (x86, head width 32 and 64, 1.31.1); decode steps use neither.
    os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")
    try:
        session = ort.InferenceSession(
            str(path), options, providers=providers, disabled_optimizers=disabled_optimizers, enable_fallback=0
        )
        if session.get_providers()[0] == _PROVIDER[device]:
            return session
        reason = "only its CPU provider answers"
    except Exception as error:  # what it raises where a library is missing has no type of its own
        if device == "cpu":
            raise
        reason = " ".join(str(error).split())[:200]
    raise UserError(
        f"engine: ONNX Runtime could not start on CUDA ({reason}); check that the CUDA 13 and cuDNN 9 libraries load"
    )
