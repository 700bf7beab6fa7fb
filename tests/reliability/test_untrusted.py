"""Promise 8: opening a hostile checkpoint runs no code, reads no environment variable and writes no file; archives and
images of data are bounded."""

import copy
import io
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from pathlib import Path

import hostile
import pytest
import torch
from hydra.utils import instantiate
from inprocess import flowtrain
from omegaconf import OmegaConf

from flowtrain.cli import exit_codes
from flowtrain.data import CIFAR10, ImageDensity, ImageFolder, Patches
from flowtrain.data.download import fetch
from flowtrain.data.image_files import MAX_PIXELS, load_image
from flowtrain.data.inputs import ImageFiles
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.runtime import checkpoint

# raised by the code that writes the hostile files
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in (".*deprecated", ".*Duplicate name")]

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["eval ckpt={}", "sample ckpt={}", "check ckpt={}", "score ckpt={} input=x.npy", "train resume={}"]
EVENTS = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "shutil.copyfile",
    "webbrowser.open",
)
_actions: list | None = None  # recorded while a command is watched


def _record(event: str, arguments: tuple) -> None:
    if _actions is None:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and "__pycache__" not in str(path):
            _actions.append(f"open {path}")
    elif event in EVENTS:
        _actions.append(f"{event} {arguments}")


sys.addaudithook(_record)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The state of a small run, and its checkpoint."""
    cwd = tmp_path_factory.mktemp("trained")
    assert flowtrain(cwd, "train", "smoke=true", "max_steps=1", "logger=none") == 0
    (file,) = cwd.glob("outputs/*/*/checkpoints/best.pt")
    return checkpoint.read(file), file


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """``watch(cwd, *words)``: a command's exit code, its message, and its actions on the machine."""
    read = []
    get = type(os.environ).__getitem__
    monkeypatch.setattr(type(os.environ), "__getitem__", lambda self, key: read.append(key) or get(self, key))
    monkeypatch.setenv(hostile.SECRET, "a secret")

    def run(cwd, *words) -> tuple[int, str, list[str]]:
        global _actions
        read.clear()
        _actions = []
        try:
            code, text = flowtrain(cwd, *words), ""
        except Exception as error:
            text, code = exit_codes.describe_error(error)
        finally:
            actions, _actions = _actions, None
        return code, text, actions + [f"read {key}" for key in read if key == hostile.SECRET]

    return run


def test_the_hostile_files_do_harm_when_they_are_opened_unsafely(trained, tmp_path):
    """So that the tests below test a danger."""
    for number, name in enumerate(hostile.nodes(tmp_path)):
        touch = tmp_path / f"node{number}"
        try:
            instantiate(OmegaConf.create(hostile.nodes(touch)[name]))
        except TypeError:  # raised after the harmful call
            pass
        assert touch.exists(), name
    for number, name in enumerate(hostile.calls(tmp_path)):
        touch = tmp_path / f"call{number}"
        file = tmp_path / f"call{number}.pt"
        checkpoint.save({"x": hostile.calls(touch)[name]}, file)
        torch.load(file, weights_only=False)
        assert touch.exists(), name


def test_the_watch_records_actions(trained, watch, tmp_path):
    code, text, actions = watch(tmp_path, "eval", f"ckpt={trained[1]}", "examples=20")
    assert code == 0 and any("eval.json" in action for action in actions)
    OmegaConf.to_container(OmegaConf.create({"a": "${oc.env:" + hostile.SECRET + "}"}), resolve=True)


def test_hostile_checkpoints_are_refused(trained, watch, tmp_path, promise, pytestconfig):
    state, _ = trained
    (tmp_path / "sentinel").mkdir()
    touch = tmp_path / "sentinel" / "touched"
    files = hostile.all_files(state, touch)
    folder = tmp_path / "files"
    folder.mkdir()
    wrong, tried = {}, 0
    for number, (name, write) in enumerate(files.items()):
        file = folder / f"{number}.pt"
        write(file)
        commands = COMMANDS if pytestconfig.getoption("--reliability") else [COMMANDS[number % len(COMMANDS)]]
        for command_line in commands:
            words = command_line.format(file).split(" ")
            code, text, actions = watch(tmp_path, *words)
            tried += 1
            if code != 1 or str(file.name) not in text and "passwd" not in text or not text.isprintable() or actions:
                wrong[f"{name}: {' '.join(words[:1])}"] = code, text[:200], actions[:3]
            if len(text) > 1000 or "HYDRA_FULL_ERROR" in text:
                wrong[f"{name}: {' '.join(words[:1])}"] = "text", text[:300]
        file.unlink()
    if list(touch.parent.iterdir()) or sorted(os.listdir(tmp_path)) != ["files", "sentinel"]:
        wrong["sentinel"] = sorted(os.listdir(tmp_path)), list(touch.parent.iterdir())
    promise(
        8,
        "≥ 40 hostile checkpoints refused in one line, exit 1, sentinel untouched",
        f"{len(files) - len({key.rpartition(':')[0] for key in wrong})} of {len(files)} ({tried} openings)",
    )
    assert not wrong, "\n".join(f"{key}: {value}" for key, value in wrong.items())
    assert len(files) >= 40


def test_hostile_checkpoints_are_refused_in_new_processes(trained, tmp_path, promise, count):
    state, _ = trained
    (tmp_path / "sentinel").mkdir()
    files = hostile.all_files(state, tmp_path / "sentinel" / "touched")
    names = random.Random(0).sample(sorted(files), count(20))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), hostile.SECRET: "a secret"}
    wrong = {}
    for number, name in enumerate(names):
        file = tmp_path / "stranger.pt"
        file.unlink(missing_ok=True)
        files[name](file)
        command = [sys.executable, "-m", "flowtrain", *COMMANDS[number % len(COMMANDS)].format(file).split()]
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        if result.returncode != 1 or result.stdout or result.stderr.count("\n") != 1 or "a secret" in result.stderr:
            wrong[name] = result.returncode, result.stdout, result.stderr
        if sorted(os.listdir(tmp_path)) != ["sentinel", "stranger.pt"] or os.listdir(tmp_path / "sentinel"):
            wrong[name] = "sentinel"
    promise(8, "20 of them in processes of their own", f"{len(names) - len(wrong)} of {len(names)}")
    assert not wrong


def test_init_refuses_hostile_checkpoints(trained, tmp_path):
    state, _ = trained
    (tmp_path / "sentinel").mkdir()
    files = hostile.all_files(state, tmp_path / "sentinel" / "touched")
    tiny = ("smoke=true", "logger=none")
    for name in ("pickle in the weights", "weights: an enormous shape"):
        files[name](tmp_path / "stranger.pt")
        with pytest.raises(FlowtrainError, match="not a flowtrain checkpoint"):
            flowtrain(tmp_path, "train", "init=stranger.pt", *tiny)
    assert not os.listdir(tmp_path / "sentinel")


@pytest.mark.parametrize("link", ["eval", "train.log", "samples/image.png", "checkpoints/previous.pt"])
def test_a_link_in_a_run_directory_is_refused(trained, tmp_path, link):
    shutil.copytree(trained[1].parents[1], tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(tmp_path / "run" / "eval", ignore_errors=True)
    (tmp_path / "run" / link).unlink(missing_ok=True)
    (tmp_path / "run" / link).symlink_to(tmp_path / "elsewhere")
    for words in (("eval", "ckpt=run"), ("train", "resume=run", "max_steps=2")):
        with pytest.raises(FlowtrainError, match=f"{link} is a link") as caught:
            flowtrain(tmp_path, *words)
        assert caught.value.exit_code == 1
    assert not os.listdir(tmp_path / "elsewhere")


def test_paths_and_devices_are_not_read_from_a_checkpoint(trained, tmp_path, capsys):
    state = copy.deepcopy(trained[0])
    state["config"]["dataset"] |= {"root": "/a/strangers/root", "path": None, "download": False}
    state["config"] |= {"init": "/a/strangers/init", "devices": 7, "allow": ["strangers_module"], "resume": True}
    checkpoint.save(state, tmp_path / "x.pt")
    assert flowtrain(tmp_path, "eval", "ckpt=x.pt", "--cfg", "job") == 0
    shown = capsys.readouterr().out
    assert "strangers" not in shown and "download: true" in shown and "devices: auto" in shown


# ---- data ----------------------------------------------------------------------------------------------------------


def _tar(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def _member(name: str, **attributes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(member, key, value)
    return member


@pytest.mark.parametrize(
    "members",
    [
        [_member("../evil", size=1)],
        [_member("a/../../evil", size=1)],
        [_member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
        [_member("link", type=tarfile.SYMTYPE, linkname=".."), _member("link/evil", size=1)],
        [_member("link", type=tarfile.LNKTYPE, linkname="../evil")],
        [_member("device", type=tarfile.CHRTYPE)],
    ],
    ids=["above", "above within", "link", "through a link", "hard link", "device"],
)
def test_a_downloaded_archive_cannot_write_elsewhere(tmp_path, members):
    from torchvision.datasets.utils import extract_archive

    archive = _tar(tmp_path / "data.tar.gz", *members)
    before = tarfile.TarFile.extraction_filter
    with pytest.raises(tarfile.TarError):
        fetch(tmp_path / "root", ["file"], lambda folder: extract_archive(str(archive), folder))
    assert tarfile.TarFile.extraction_filter is before
    assert sorted(os.listdir(tmp_path)) == ["data.tar.gz"]


def test_a_download_that_would_write_elsewhere_is_a_usage_error(tmp_path, monkeypatch):
    archive = _tar(tmp_path / "data.tar.gz", _member("../evil", size=1))

    def build(self, root, part, download):
        with tarfile.open(archive) as opened:
            opened.extractall(root)

    monkeypatch.setattr(CIFAR10, "_build", build)
    with pytest.raises(UsageError, match="downloading failed: .*evil.* outside the destination"):
        CIFAR10(root=str(tmp_path / "root")).split("train")


def test_a_good_archive_is_unpacked(tmp_path):
    archive = _tar(tmp_path / "data.tar.gz", _member("folder/file", size=3))

    def download(folder):
        with tarfile.open(archive) as opened:
            opened.extractall(folder)

    fetch(tmp_path / "root", ["folder/file"], download)
    assert (tmp_path / "root/folder/file").read_bytes() == bytes(3)


def _png(width: int, height: int) -> bytes:
    """A grey PNG that declares a size; its rows are zeros, which compress to almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(height * (width + 1), 10**6)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_001, 10_000, 100_000, 2**31 - 1])
def test_an_image_with_too_many_pixels_is_refused(tmp_path, side):
    """Before it is decoded, wherever images are read, and without a warning of the library."""
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(_png(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for make in (
            lambda: ImageFolder(path=str(tmp_path), val_size=1, test_size=1).split("train").take(torch.tensor([0])),
            lambda: next(ImageFiles(tmp_path, (1, 8, 8)).groups()),
            lambda: Patches(path=str(tmp_path), val_size=1, test_size=1, train_patches=9).split("train"),
            lambda: ImageDensity(path=str(tmp_path / "0.png")).split("train"),
        ):
            with pytest.raises(FlowtrainError, match="pixels"):
                make()
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000  # kB


def test_an_image_with_many_pixels_is_read():
    assert load_image(io.BytesIO(_png(900, 900)), "L").size == (900, 900)
    assert MAX_PIXELS == 64_000_000
