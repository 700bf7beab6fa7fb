"""``flowtrain export``: a run's flow as programs of ONNX or torch.export, or as weights in safetensors."""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from flowtrain import __version__
from flowtrain.bijections.ode import ADAPTIVE, continuous_layers, traced_layers
from flowtrain.commands import ExportConfig
from flowtrain.commands.outputs import own_folder
from flowtrain.commands.restored import Restored, restore
from flowtrain.data.spec import class_names
from flowtrain.engine.evaluate import evaluation_mode
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.export import formats, model_card
from flowtrain.export.checks import ROWS, Reference
from flowtrain.export.loops import LONGEST, as_loops, count_steps
from flowtrain.export.programs import WHAT, Program
from flowtrain.export.tracing import trace
from flowtrain.runtime import checkpoint, distributed, files, safetensors_file

log = logging.getLogger("flowtrain")


def main(config: ExportConfig, run_dir: str) -> dict:
    """Write the programs ``config.what`` of the flow of ``config.ckpt``, each after it returned what the flow returns,
    with a README.md and export.json, into ``config.output`` or ``run_dir``; or its weights. Print a table and the lines
    of Python that use them.

    Returns the content of export.json.

    Raises:
        UsageError: what cannot be exported; nothing is written.
        FlowtrainError: a program returns something else than the flow; nothing is written.
    """
    if not distributed.is_main():
        return {}
    with own_folder(run_dir, config.output) as folder:
        if config.to == "onnx":
            formats.check_installed()
        restored = restore(config, config.ckpt, config.weights)
        contents = _weights(config, restored) if config.to == "safetensors" else _programs(config, restored)
        for name, data in contents.items():
            files.write(folder / name, data)
    report = json.loads(contents["export.json"])
    print(_table(report, folder), flush=True)
    code = contents["README.md"].decode().partition("```python")[2].partition("```")[0].strip()
    print(f"\nin {os.path.relpath(folder)}:\n\n{code}", flush=True)
    return report


def _programs(config: ExportConfig, restored: Restored) -> dict[str, bytes]:
    """The files of programs, by their names."""
    flow = restored.flow.cpu().float().eval().requires_grad_(False)
    wanted = (
        [config.what] if isinstance(config.what, str) else config.what or [what for what in WHAT if what != "score"]
    )
    notes = _fix_steps(flow, config)
    suffix = formats.SUFFIXES[config.to]
    contents, rows, described = {}, [], []
    for i, what in enumerate(wanted, 1):
        log.info("%s: program %d of %d, and its comparison with the flow", what, i, len(wanted))
        start = time.monotonic()
        program = Program(flow, what).eval()
        record = _record(config, restored, program)
        with evaluation_mode(torch.device("cpu")):
            reference = Reference(program, restored.dataset.spec)
            exported = _trace(program, reference)
            data, run = formats.to_torch_export(exported, record)
            difference = reference.difference(run)
            if config.to == "onnx":
                data, run = formats.to_onnx(exported, record)
                difference = max(difference, reference.difference(run))
        if not difference <= reference.tolerance:
            raise FlowtrainError(
                f"what={what}: the program differs from the flow by {difference:.2g} on some of 1,000 rows, more than"
                f" {reference.tolerance:g}; nothing is written"
            )
        file = f"{what}{suffix}"
        contents[file] = data
        opset = {"opset": formats.OPSET} if config.to == "onnx" else {}
        rows.append(
            {"what": what, "file": file, "bytes": len(data), "greatest_difference": difference, **opset}
            | {"tolerance": reference.tolerance, "rows": ROWS, "left_out": reference.left_out}
            | {"seconds": round(time.monotonic() - start, 1)}
            | {name: record[name] for name in ("inputs", "output")}
        )
        described += _describe(file, record)
    report = {"to": config.to, "checkpoint": config.ckpt, "weights": restored.weights, "programs": rows, "notes": notes}
    example = _example(config.to, rows[0])
    return contents | _documents(config, restored, report, example, ["## Programs", "", *described])


def _trace(program: Program, reference: Reference) -> torch.export.ExportedProgram:
    """With autoregressive inverses as loops where they would be long."""
    long = count_steps(program.flow.bijection, program.what == "sample") > LONGEST
    with as_loops(program.flow.bijection) if long else nullcontext():
        return trace(program, reference.inputs)


def _fix_steps(flow, config: ExportConfig) -> list[str]:
    """Give ODEs the solver that was asked for; lines about what this changes."""
    layers = continuous_layers(flow)
    if len(layers) < len(traced_layers(flow)):
        raise UsageError(
            f"to={config.to}: the inverses and log-determinants of this flow's residual layers take as many steps as"
            " the data need, which no exported program can do; to=safetensors keeps its weights"
        )
    if not layers:
        if config.solver:
            raise UsageError(f"solver={config.solver}: this flow has no ODE")
        return []
    adaptive = [layer for layer in layers if layer.solver in ADAPTIVE]
    own = layers[0].solver
    if not config.solver:
        if adaptive:
            raise UsageError(
                f"solver=null: the steps of this flow's ODE solver, {adaptive[0].solver}, depend on the data, which no"
                " exported program can do; give one of fixed steps: solver=rk4 solver_steps=32"
            )
        return []
    generator = torch.Generator().manual_seed(0)
    z = flow.base.sample(100, 1.0, None, generator) if flow.context_shape is None else None
    before = None if z is None else flow.decode(z)
    for layer in layers:
        layer.solver, layer.steps = config.solver, config.solver_steps
    if z is None or not adaptive:
        return [f"{config.solver} with {config.solver_steps} steps in place of the flow's solver"]
    change = (flow.decode(z).double() - before.double()).abs().max().item()
    steps = f"{config.solver} with {config.solver_steps} steps"
    return [f"samples by {steps} differ from those by {own} by at most {change:.2g}"]


def _record(config: ExportConfig, restored: Restored, program: Program) -> dict:
    """What the file says of itself."""

    def of(one):
        return {"shape": ["batch", *one.shape], "meaning": one.meaning, **({"noise": one.noise} if one.noise else {})}

    spec = restored.dataset.spec
    return {
        "what": program.what,
        "inputs": {name: of(one) for name, one in program.inputs.items()},
        "output": of(program.output),
        "unit": {"log_prob": "nats", "score": "nats per unit of x"}.get(program.what),
        "grey_levels": spec.grey_levels,
        "classes": list(class_names(spec)) or None,
        "columns": restored.columns.to_record() if restored.columns else None,
        "weights": restored.weights,
        "config": checkpoint.read_config(config.ckpt),
        "flowtrain": __version__,
    }


def _weights(config: ExportConfig, restored: Restored) -> dict[str, bytes]:
    """model.safetensors and its documents."""
    if config.what is not None:
        raise UsageError(f"what={config.what}: safetensors holds weights, not programs; leave it out")
    name = f"model{safetensors_file.SUFFIX}"
    columns = restored.columns.to_record() if restored.columns else None
    record = {"config": checkpoint.read_config(config.ckpt), "columns": columns}
    record |= {"weights": restored.weights, "version": __version__}
    data = safetensors_file.to_bytes(restored.flow.state_dict(), record)
    row = {"what": "weights", "file": name, "bytes": len(data), "greatest_difference": 0.0}
    report = {"to": config.to, "checkpoint": config.ckpt, "weights": restored.weights, "programs": [row], "notes": []}
    code = f'import flowtrain\n\nflow = flowtrain.load("{name}")\nprint(flow.sample(5'
    code += "))" if restored.flow.context_shape is None else ", context=context))"
    return {name: data} | _documents(config, restored, report, code, [])


def _documents(
    config: ExportConfig, restored: Restored, report: dict, code: str, programs: list[str]
) -> dict[str, bytes]:
    """export.json and README.md."""
    values = checkpoint.read_config(config.ckpt)
    title = f"{values['model']['_target_'].rpartition('.')[2]} of {restored.dataset.spec.name}"
    text = model_card.write(title, _data_lines(restored), code, values, restored.run, [*programs, *report["notes"]])
    return {"export.json": (json.dumps(report, indent=2) + "\n").encode(), "README.md": text.encode()}


def _data_lines(restored: Restored) -> list[str]:
    spec = restored.dataset.spec
    lines = [
        f"- {spec.name}, of shape {list(spec.shape)}"
        + (f", integers below {spec.grey_levels}" if spec.grey_levels else "")
    ]
    if spec.context is not None:
        lines.append(
            f"- context: {list(spec.context_shape)}"
            + (f", one-hot classes {', '.join(class_names(spec))}" if class_names(spec) else "")
        )
    if restored.columns:
        lines += _column_lines("x", restored.columns.encoded)
        lines += [f"- context column `{column.name}`: {column.kind}" for column in restored.columns.context]
    return lines


def _column_lines(name: str, columns) -> list[str]:
    lines = []
    for i, column in enumerate(columns):
        text = f"- `{name}[:, {i}]`: {column.name}, {column.kind}"
        text += f", minus {column.offset:g}" if column.offset else ""
        text += (
            f": {', '.join(f'{code} {word}' for code, word in enumerate(column.categories[:20]))}"
            if column.categories
            else ""
        )
        lines.append(text)
    return lines


def _describe(file: str, record: dict) -> list[str]:
    lines = [f"- `{file}`: {record['output']['meaning']}, {record['output']['shape']}"]
    return [
        *lines,
        *(f"    - input `{name}` {one['shape']}: {one['meaning']}" for name, one in record["inputs"].items()),
    ]


def _example(to: str, row: dict) -> str:
    """Lines of Python that use the first program."""
    arrays = []
    for name, one in row["inputs"].items():
        shape = ", ".join(map(str, (5, *one["shape"][1:])))
        kind = {
            "normal": f"normal(size=({shape}))",
            "uniform": f"random(size=({shape}))",
            "logistic": f"logistic(size=({shape}))",
        }
        value = f"random.{kind[one['noise']]}" if one.get("noise") else f"np.zeros(({shape}))"
        arrays.append(f'    "{name}": {value}.astype(np.float32),  # {one["meaning"]}')
    inputs = ["random = np.random.default_rng(0)"] if any("random." in line for line in arrays) else []
    inputs += ["inputs = {", *arrays, "}"]
    if to == "onnx":
        head = [
            "import numpy as np",
            "import onnxruntime",
            "",
            f'session = onnxruntime.InferenceSession("{row["file"]}")',
        ]
        return "\n".join([*head, *inputs, "print(session.run(None, inputs)[0])"])
    head = ["import numpy as np", "import torch", "", f'program = torch.export.load("{row["file"]}").module()']
    call = "print(program(**{name: torch.from_numpy(value) for name, value in inputs.items()}))"
    return "\n".join([*head, *inputs, call])


def _table(report: dict, folder: Path) -> str:
    head = ("what", "file", "size", "greatest difference", "opset")
    rows = [
        (
            row["what"],
            os.path.relpath(folder / row["file"]),
            f"{row['bytes'] / 1024:,.0f} KiB",
            f"{row['greatest_difference']:.1e} of {row['tolerance']:.0e}"
            if "tolerance" in row
            else "none: the same bits",
            str(row.get("opset", "")),
        )
        for row in report["programs"]
    ]
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(row[i].ljust(widths[i]) for i in used).rstrip() for row in (head, *rows)]
    left_out = [f"{row['left_out']:,} for {row['what']}" for row in report["programs"] if row.get("left_out")]
    if left_out:
        lines.append(
            f"compared on 1,000 rows each, tails included; rows were drawn anew where float32 itself does not determine"
            f" the result well within the tolerance: {', '.join(left_out)}"
        )
    return "\n".join([*lines, *report["notes"]])
