"""Promise 15: whatever file a user brings, it is read or refused in one line, within bounds of time and memory."""

import random
import signal

from mutations import (
    STRANGE,
    cut,
    describe,
    flip,
    images,
    odd_h5,
    odd_parquet,
    valid,
    wrap,
    write_enormous,
    write_mutation,
)

MUTATIONS = 2000
MEMORY, SECONDS = 2 * 2**30, 60
MOST_WARNINGS, LONGEST_LINE = 20, 2000  # lines; characters


def fault(process) -> str | None:
    """What is wrong with the end of a process; None if nothing is: exit code 0, or one line and 1 or 2, and at most
    warnings of one line before it."""
    code = process.wait(SECONDS)
    if code is None:
        process.kill(signal.SIGKILL)
        process.wait()
        return f"took more than {SECONDS} s"
    *lines, last = process.err.splitlines() or [""]
    if code == 0:
        lines, last = process.err.splitlines(), ""
    ours = all(line.startswith("warning: ") for line in lines) and len(lines) <= MOST_WARNINGS
    if code not in (0, 1, 2) or not ours or code and not last.startswith("flowtrain: ") or len(last) > LONGEST_LINE:
        return f"exit code {code}: {process.err[:300]} … {process.err[-600:]}"
    memory = int(process.out.split()[-1])
    return f"needed {memory / 2**30:.1f} GiB" if memory > MEMORY else None


def test_mutations_of_valid_files_are_read_or_refused_in_one_line(server, tmp_path, count, promise):
    asked, wrong = count(MUTATIONS), []
    for number in range(asked):
        opened_as, path = write_mutation(tmp_path, number)
        if found := fault(server.start(tmp_path, opened_as, str(path), kind="open")):
            wrong.append(f"{path.name} as {opened_as}: {found}: {describe(path)}")
        path.unlink()
    promise(15, "mutated files read, or refused in one line, below 2 GB and 60 s", f"{asked - len(wrong)} of {asked}")
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)


def test_enormous_files_are_read_or_refused_in_one_line(server, tmp_path, pytestconfig, promise):
    asked, wrong = 0, []
    for opened_as, path in write_enormous(tmp_path, gigabyte=pytestconfig.getoption("--reliability")):
        asked += 1
        if found := fault(server.start(tmp_path, opened_as, str(path), kind="open")):
            wrong.append(f"{path.name}: {found}")
        if len(path.name) < 255:
            path.unlink()
    promise(15, "enormous files read, or refused in one line, below 2 GB and 60 s", f"{asked - len(wrong)} of {asked}")
    assert not wrong, "\n".join(wrong)


TRAIN = ("train", "max_steps=1", "smoke=true", "report=false", "threads=1", "hydra.run.dir=run")
FLOW = ("model=nsf_coupling", "model.hidden=8", "model.pairs=1", "dataset=table")


def commands():
    """Files to train on and files to score with a trained flow: (name of a command, its kind, the file)."""
    dice = random.Random(0)
    text = valid("csv")
    yield "score the file itself", "csv", text
    for kind in ("csv.gz", "dat", "jsonl", "parquet", "npy", "xlsx"):
        yield f"train on a {kind}", kind, valid(kind)
        yield f"train on a damaged {kind}", kind, dice.choice([cut, flip, wrap])(valid(kind), dice)
    for number, change in enumerate(STRANGE):
        yield f"score after {change.__name__}", "csv", change(text.decode(), random.Random(number)).encode()
    yield "score in another encoding", "csv", text.decode().encode("utf-16-le")
    yield "score a file cut short", "csv", cut(text, dice)
    yield "score images", "csv", images("zip")
    yield "score odd types", "parquet", odd_parquet(dice)
    yield "score odd types", "h5", odd_h5(dice)


def test_commands_end_well_or_in_one_line(server, tmp_path, count, promise):
    good = tmp_path / "good.csv"
    good.write_bytes(valid("csv"))
    assert server.run(tmp_path, *TRAIN, *FLOW, f"dataset.path={good}") == 0
    chosen, wrong = [*commands()], []
    chosen = chosen[:: len(chosen) // count(len(chosen))]
    for number, (name, kind, data) in enumerate(chosen):
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(data)
        if "train" in name:
            words = (*TRAIN, *FLOW, f"dataset.path={path}")
        else:
            words = ("score", "ckpt=../run", f"input={path}")
        process = server.start(tmp_path / str(number), *words)
        code, err = process.wait(SECONDS), process.err
        errors = [line for line in err.splitlines() if not line.startswith(f"{path}")]  # the others are our warnings
        well = (
            code in (0, 1, 2) and len(errors) == (code > 0) and all(line.startswith("flowtrain: ") for line in errors)
        )
        unexpected = "HYDRA_FULL_ERROR" in err or "traceback in" in err
        if not well or unexpected or code and name == "score the file itself":
            wrong.append(f"{name}: exit code {code}: {err[-600:]}")
    promise(
        15,
        "the same through train and score, in processes of their own",
        f"{len(chosen) - len(wrong)} of {len(chosen)}",
    )
    assert not wrong, "\n".join(wrong)
