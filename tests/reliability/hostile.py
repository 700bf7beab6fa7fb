"""Hostile checkpoints. Each has the right digest, so that only its content is wrong."""

from __future__ import annotations

import copy
import io
import os
import pickle
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from flowtrain.runtime import checkpoint

SECRET = "FLOWTRAIN_TEST_SECRET"  # an environment variable that no checkpoint may read


def seal(path: Path, archive: bytes) -> Path:
    """Write an archive with its digest in the comment, as flowtrain does."""
    length = checkpoint._COMMENT.to_bytes(2, "little")
    digest = checkpoint._digest(io.BytesIO(archive), len(archive))
    path.write_bytes(archive[:-2] + length + checkpoint._MARK + digest.encode())
    return path


def make_zip(members: dict[str, bytes] | list[tuple], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, content)
    return out.getvalue()


def torch_archive(data: bytes, **more: bytes) -> bytes:
    """An archive like torch's, with the given pickle."""
    members = {"a/data.pkl": data, "a/byteorder": b"little", "a/version": b"3\n", "a/data/0": bytes(16)}
    return make_zip(members | {f"a/{name}": content for name, content in more.items()})


class Call:
    """Pickles as a call of ``function``, which unpickling runs."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# ---- pickles -------------------------------------------------------------------------------------------------------


def calls(touch: Path) -> dict[str, Call]:
    """Calls that create the folder ``touch``."""
    import shutil
    import subprocess

    from flowtrain.config import runs

    path = str(touch)
    return {
        "os.mkdir": Call(os.mkdir, path),
        "os.system": Call(os.system, f"mkdir {path}"),
        "subprocess.call": Call(subprocess.call, ["mkdir", path]),
        "builtins.exec": Call(exec, f"import os; os.mkdir({path!r})"),
        "builtins.eval": Call(eval, f"__import__('os').mkdir({path!r})"),
        "shutil.copytree": Call(shutil.copytree, str(Path(__file__).parent), path),
        "pathlib.Path.mkdir": Call(Path.mkdir, touch),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.mkdir, path))),
        "torch.save": Call(torch.save, 1, path),
        "flowtrain.config.runs.claim": Call(runs.claim, path),
    }


def pickles(state: dict, touch: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    for name, call in calls(touch).items():
        yield f"pickle {name}", lambda path, call=call: checkpoint.save({**state, "step": call}, path)
    call = calls(touch)["os.mkdir"]
    for place, hostile in {"config": {"config": call}, "weights": {"model": {"w": call}}, "key": {call: 1}}.items():
        yield f"pickle in the {place}", lambda path, hostile=hostile: checkpoint.save({**state, **hostile}, path)
    raw = f"cos\nmkdir\n(S{str(touch)!r}\ntR.".encode()
    yield "pickle by hand", lambda path: seal(path, torch_archive(raw))
    stacked = b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c" + bytes([len(str(touch))]) + str(touch).encode() + b"\x85R."
    yield "pickle, STACK_GLOBAL", lambda path: seal(path, torch_archive(stacked))
    instance = f"(S{str(touch)!r}\nios\nmkdir\n.".encode()
    yield "pickle, INST", lambda path: seal(path, torch_archive(instance))
    walk = f"ctorch.optim.adam\ntorch.hub.os.mkdir\n(S{str(touch)!r}\ntR.".encode()
    yield "pickle, attribute walk", lambda path: seal(path, torch_archive(walk))
    yield "pickle of a class", lambda path: checkpoint.save({**state, "step": Path("/")}, path)
    for name in ("legacy torch", "pickle alone", "legacy with a digest"):
        yield name, lambda path, name=name: _write_legacy(path, {**state, "step": call}, name)
    script = torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1))
    yield "TorchScript", lambda path: seal(path, _bytes_of(lambda out: torch.jit.save(script, out)))
    yield (
        "TorchScript by name",
        lambda path: seal(path, torch_archive(pickle.dumps(state["step"]), **{"constants.pkl": b""})),
    )
    lists = b"\x80\x02}U\x06config" + b"]" * 1_000_000 + b"a" * 999_999 + b"s."
    yield "a million levels", lambda path: seal(path, torch_archive(lists))
    tuples = b"\x80\x02}U\x06config)" + b"\x85" * 100_000 + b"s."
    yield "a hundred thousand tuples", lambda path: seal(path, torch_archive(tuples))


def _write_legacy(path: Path, state: dict, name: str) -> None:
    out = io.BytesIO()
    if name == "pickle alone":
        pickle.dump(state, out)
    else:
        torch.save(state, out, _use_new_zipfile_serialization=False)
    path.write_bytes(out.getvalue())
    if name == "legacy with a digest":
        seal(path, out.getvalue() + b"PK\5\6" + bytes(18))


def _bytes_of(write: Callable) -> bytes:
    out = io.BytesIO()
    write(out)
    return out.getvalue()


# ---- archives and tensors ------------------------------------------------------------------------------------------


def archives(state: dict, touch: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    good = {"a/data.pkl": _pickle_state(state), "a/byteorder": b"little", "a/version": b"3\n"}
    yield (
        "zip bomb",
        lambda path: seal(path, make_zip(good | {"a/data/0": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)),
    )
    for name in ("../../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "a/\x1b[2J", "a//b", "C:/evil"):
        yield f"member {name!r}", lambda path, name=name: seal(path, make_zip(good | {name: b"x"}))
    link = zipfile.ZipInfo("a/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    yield (
        "member that is a link",
        lambda path: seal(path, make_zip([*good.items(), (link, str(touch))])),
    )
    yield (
        "two members of a name",
        lambda path: seal(path, make_zip([*good.items(), ("a/data.pkl", b"cos\nmkdir\n.")])),
    )
    yield "no pickle", lambda path: seal(path, make_zip({"a/version": b"3\n"}))
    yield "empty archive", lambda path: seal(path, make_zip({}))
    yield "empty file", lambda path: path.touch()
    yield "text", lambda path: path.write_text("import os")
    yield (
        "data behind its end",
        lambda path: seal(path, torch_archive(good["a/data.pkl"]) + b"PK\3\4" + bytes(200)),
    )
    yield "link to another file", lambda path: path.symlink_to("/etc/passwd")

    tensor = torch.zeros(4)
    weights = {
        "an enormous shape": tensor.as_strided((1_000_000, 1_000_000), (0, 0)),
        "a sparse tensor": tensor.to_sparse(),
        "a tensor without data": torch.empty(10**12, device="meta"),
        "a quantized tensor": torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        "a parameter": torch.nn.Parameter(tensor),
        "a list": [1.0],
    }
    name = next(iter(state["model"]))
    for kind, value in weights.items():
        changed = {**state, "model": {**state["model"], name: value}}
        yield f"weights: {kind}", lambda path, changed=changed: checkpoint.save(changed, path)
    wrong = {
        "another shape": {name: torch.zeros(3, 5)},
        "another type": {name: state["model"][name].to(torch.complex64)},
        "one too many": {"extra": tensor},
    }
    for kind, value in wrong.items():
        for part in ("model", "ema"):
            changed = {**state, part: {**state[part], **value}}
            yield f"weights of {part}: {kind}", lambda path, changed=changed: checkpoint.save(changed, path)
    for numel in (10**6, 2**62, -1):
        declared = _declare_storage(state, numel)
        yield f"a storage of {numel} numbers", lambda path, declared=declared: seal(path, declared)
    for gone in ("config", "model", "ema", "columns"):
        without = {key: value for key, value in state.items() if key != gone}
        yield f"no {gone}", lambda path, without=without: checkpoint.save(without, path)
    yield "a list", lambda path: seal(path, _bytes_of(lambda out: torch.save([state], out)))
    for name, value in {"no": None, "an older": 1, "a later": 10**9, "a text as": "2"}.items():
        yield f"{name} format", lambda path, value=value: checkpoint.save({**state, "format": value}, path)


def _pickle_state(state: dict) -> bytes:
    """Pickle a state without tensors, as torch does."""
    return pickle.dumps(
        {"format": checkpoint.FORMAT, "config": state["config"], "model": {}, "ema": None, "columns": None}, protocol=2
    )


def _declare_storage(state: dict, numel: int) -> bytes:
    """An archive with a tensor whose storage declares ``numel`` numbers but has 16 bytes."""
    long = numel.to_bytes(9, "little", signed=True)
    number = b"\x8a\x09" + long
    storage = b"((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu" + number + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + b"K\x00" + number + b"\x85K\x01\x85\x89}tR"
    config = pickle.dumps(state["config"], protocol=2)[2:-1]
    return torch_archive(b"\x80\x02}U\x06config" + config + b"s(U\x05model}U\x01w" + tensor + b"su.")


# ---- configurations ------------------------------------------------------------------------------------------------


def nodes(touch: Path) -> dict[str, dict]:
    """Nodes that create ``touch`` when Hydra instantiates them; Hydra's own block-list allows them."""
    path = str(touch)
    return {
        "os.mkdir": {"_target_": "os.mkdir", "path": path},
        "os.makedirs": {"_target_": "os.makedirs", "name": path},
        "shutil.copytree": {"_target_": "shutil.copytree", "src": str(Path(__file__).parent), "dst": path},
        "attribute walk": {"_target_": "torch.optim.adam.torch.hub.os.mkdir", "path": path},
        "walk of our own": {
            "_target_": "flowtrain.data.image_folders.Path.mkdir",
            "self": {"_target_": "pathlib.Path", "_args_": [path]},
        },
        "pathlib.Path.touch": {
            "_target_": "pathlib.Path.touch",
            "_args_": [{"_target_": "pathlib.Path", "_args_": [path]}],
        },
        "flowtrain.config.runs.claim": {"_target_": "flowtrain.config.runs.claim", "path": path},
        "positional": {"_target_": "os.mkdir", "_args_": [path]},
        "torch.save": {"_target_": "torch.save", "obj": 1, "f": path},
        "a list within": {
            "_target_": "torch.optim.Adam",
            "_partial_": True,
            "betas": [{"_target_": "os.mkdir", "path": path}],
        },
        "logging.FileHandler": {"_target_": "logging.FileHandler", "filename": path},
    }


def _targets(touch: Path) -> dict[str, dict]:
    path = str(touch)
    return nodes(touch) | {
        "os.system": {"_target_": "os.system", "command": f"mkdir {path}"},
        "subprocess.run": {"_target_": "subprocess.run", "args": ["mkdir", path]},
        "subprocess.Popen": {"_target_": "subprocess.Popen", "args": ["mkdir", path]},
        "builtins.exec": {"_target_": "builtins.exec", "_args_": [f"import os; os.mkdir({path!r})"]},
        "builtins.open": {"_target_": "builtins.open", "file": path, "mode": "w"},
        "torch.load": {"_target_": "torch.load", "f": path, "weights_only": False},
        "torch.hub.load": {"_target_": "torch.hub.load", "repo_or_dir": path, "source": "local", "model": "m"},
        "hydra.utils.instantiate": {
            "_target_": "hydra.utils.instantiate",
            "_recursive_": False,
            "config": {"_target_": "os.mkdir", "path": path},
        },
        "hydra.utils.call": {"_target_": "hydra.utils.call", "config": {"_target_": "os.mkdir", "path": path}},
        "hydra.utils.get_method": {"_target_": "hydra.utils.get_method", "path": "os.mkdir"},
        "importlib": {"_target_": "importlib.import_module", "name": "antigravity"},
        "a resolver": {
            "_target_": "omegaconf.OmegaConf.register_new_resolver",
            "name": "x",
            "resolver": {"_target_": "hydra.utils.get_method", "path": "os.mkdir"},
        },
        "partial": {"_target_": "os.mkdir", "_partial_": True, "path": path},
        "a base class": {"_target_": "torch.optim.Optimizer", "params": [], "defaults": {}},
        "a private module": {"_target_": "flowtrain.data.download.fetch", "root": path, "files": [], "download": 1},
        "a list as target": {"_target_": ["os.mkdir"], "path": path},
        "no target": {"_target_": None},
        "a number as target": {"_target_": 3},
        "a module": {"_target_": "os"},
        "positional, of ours": {"_target_": "flowtrain.distributions.StandardNormal", "_args_": [path]},
        "not converted": {"_target_": "flowtrain.distributions.StandardNormal", "_convert_": "object"},
        "not recursive": {"_target_": "flowtrain.distributions.StandardNormal", "_recursive_": False},
    }


def _synthetic(shape) -> dict:
    return {"_target_": "flowtrain.data.Synthetic", "shape": shape}


def _put(config: dict, key: str, value) -> dict:
    """A copy of ``config`` with a value at a dotted key."""
    config = copy.deepcopy(config)
    *parts, last = key.split(".")
    node = config
    for part in parts:
        node = node[part]
    node[last] = value
    return config


def _nest(levels: int):
    node = {}
    for _ in range(levels):
        node = {"a": node}
    return node


def _share_lists(levels: int):
    node = "x"
    for _ in range(levels):
        node = [node] * 10
    return node


def _list_in_itself():
    node = []
    node.append(node)
    return node


def configs(state: dict, touch: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    path, config = str(touch), state["config"]
    mkdir = {"_target_": "os.mkdir", "path": path}
    changes = {f"target {name}": ("base", node) for name, node in _targets(touch).items()} | {
        f"target in {place}": (place, mkdir)
        for place in ("model", "univariate", "dataset", "optimizer", "scheduler", "trainer", "published", "model.knob")
    }
    changes |= {
        "target in a list of lists": ("model.knob", [[1, [mkdir]]]),
        "target deep within": ("model.knob", {"a": {"b": {"c": [{"d": mkdir}]}}}),
        "a flow that is none": ("model", {"_target_": "flowtrain.nets.ZeroConv", "out": 1}),
        "a data set that is none": ("dataset", {**config["dataset"], "_target_": "flowtrain.data.Columns"}),
        "hydra callbacks": ("hydra", {"callbacks": {"x": mkdir}}),
        "hydra logging": (
            "hydra",
            {"job_logging": {"handlers": {"x": {"class": "logging.FileHandler", "filename": path}}}},
        ),
        "hydra run dir": ("hydra", {"run": {"dir": path}}),
        "hydra launcher": ("hydra/launcher", mkdir),
        "defaults": ("defaults", [{"override /hydra/launcher": "joblib"}]),
        "a package of Hydra's": ("_global_", {"hydra": {"callbacks": {"x": mkdir}}}),
        "a key that leads out": ("../base", {}),
        "an unknown key": ("nonsense", 1),
        "a variable": ("model.knob", "${oc.env:" + SECRET + "}"),
        "a variable within text": ("model.name", "x${oc.env:" + SECRET + ",y}"),
        "a variable in a key": ("model.knob", {"${oc.env:" + SECRET + "}": 1}),
        "an escaped variable": ("model.knob", "\\${oc.env:" + SECRET + "}"),
        "our own resolver": ("model.knob", "${claim:" + path + "}"),
        "our resolver of runs": ("model.knob", "${run_dir:" + path + ",false}"),
        "a decoder": ("model.knob", "${oc.decode:'${oc.env:" + SECRET + "}'}"),
        "a bomb of interpolations": (
            "model.knob",
            {"a0": "x" * 50} | {f"a{i}": f"${{.a{i - 1}}}" * 10 for i in range(1, 10)},
        ),
        "a circle of interpolations": ("model.knob", {"a": "${.b}", "b": "${.a}"}),
        "a value left open": ("seed", "???"),
        "a hundred levels": ("model.knob", _nest(100)),
        "a hundred lists": ("model.knob", eval("[" * 60 + "]" * 60)),
        "a list of lists of one list": ("model.knob", _share_lists(12)),
        "a list in itself": ("model.knob", _list_in_itself()),
        "a long text": ("model.knob", "x" * 10_000_000),
        "many keys": ("model.knob", {f"k{i}": i for i in range(100_000)}),
        "a key that is a number": ("model.knob", {1: 2}),
        "a key that is nothing": ("model.knob", {None: 2}),
        "bytes": ("model.knob", b"x"),
        "a set": ("model.knob", {1, 2}),
        "a complex number": ("model.knob", 1j),
        "a tensor": ("model.knob", torch.zeros(2)),
        "a tuple": ("model.knob", (1, 2)),
        "control characters": ("model.name", "\x1b]0;owned\x07\x1b[2J"),
        "half a character": ("model.name", "\ud800"),
        "no mapping": ("model", [1]),
        "wrong type at the root": ("seed", [1]),
        "out of range at the root": ("batch_size", -1),
        "out of range in the trainer": ("trainer.workers", 10**9),
        "a mapping for a number": ("trainer.clip", {"a": 1}),
        "an allowed module": ("allow", ["os"]),
        "enormous layers": ("model.hidden", 10**9),
        "endless layers": ("model.steps", 10**9),
        "an enormous shape": ("dataset", _synthetic([1, 10**6, 10**6])),
        "a negative shape": ("dataset", _synthetic([1, -8, 8])),
        "a shape of text": ("dataset", _synthetic("8x8")),
        "a shape without numbers": ("dataset", _synthetic([])),
        "endless numbers": ("dataset", _synthetic([1, 2**70, 8])),
        "a data set of another shape": ("dataset", _synthetic([1, 10**9, 10**9])),
    }
    for name, (key, value) in changes.items():
        if name == "an allowed module":  # with a target in it
            changed = _put(_put(config, key, value), "model.knob", mkdir)
        else:
            changed = _put(config, key, value) if "/" not in key else {**config, key: value}
        yield name, lambda path, changed=changed: checkpoint.save({**state, "config": changed}, path)
    yield "a configuration of text", lambda path: checkpoint.save({**state, "config": "model: glow"}, path)


def all_files(state: dict, touch: Path) -> dict[str, Callable[[Path], object]]:
    """Every kind of hostile checkpoint: name -> the function that writes it."""
    out = {}
    for name, write in (*pickles(state, touch), *archives(state, touch), *configs(state, touch)):
        assert name not in out
        out[name] = write
    return out
