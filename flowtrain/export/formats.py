"""Programs as files: of torch.export and of ONNX."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

import torch
from torch import Tensor
from torch.export import ExportedProgram

from flowtrain.errors import UsageError

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}
RECORD = "flowtrain.json"  # in a .pt2 file; in an ONNX file, the same JSON is the metadata "flowtrain"
OPSET = 20

Run = Callable[[dict[str, Tensor]], Tensor]


def check_installed() -> None:
    """Raise UsageError where the packages for ONNX are missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError("to=onnx: it needs more packages: pip install 'flowtrain[export]'") from error


def to_torch_export(program: ExportedProgram, record: dict) -> tuple[bytes, Run]:
    """The file's contents, and the program in it, to run."""
    file = io.BytesIO()
    with _quiet():
        torch.export.save(program, file, extra_files={RECORD: json.dumps(record)})
        file.seek(0)
        loaded = torch.export.load(file).module()
    return file.getvalue(), lambda inputs: loaded(**inputs)


def to_onnx(program: ExportedProgram, record: dict) -> tuple[bytes, Run]:
    """The file's contents, and the program in it, to run in ONNX Runtime. Its inputs and outputs have their names."""
    import onnxruntime
    from onnxscript import optimizer

    with _quiet():
        found = torch.onnx.export(
            program, dynamo=True, verbose=False, optimize=False, opset_version=OPSET, output_names=[record["what"]]
        )
        optimizer.inline(found.model)  # not optimize(), whose patterns take minutes
        optimizer.fold_constants(found.model)
        optimizer.remove_unused_nodes(found.model)
    found.model.metadata_props["flowtrain"] = json.dumps(record)
    data = found.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, _session_options(onnxruntime), providers=["CPUExecutionProvider"])

    def run(inputs):
        return torch.as_tensor(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])

    return data, run


def _session_options(onnxruntime):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return options


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's lines about its own steps."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)
