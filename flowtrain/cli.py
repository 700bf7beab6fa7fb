"""``flowtrain COMMAND key=value …``: the front door. Imports PyTorch only when a job starts."""

from __future__ import annotations

import difflib
import os
import sys
from contextlib import suppress
from functools import partial

from flowtrain import __version__
from flowtrain.errors import FlowtrainError, Refused, cause_of
from flowtrain.signals import end_at_once, end_with_torchrun

COMMANDS = {
    "train": "fit a flow to data",
    "eval": "bits per dimension of a run",
    "sample": "draws from a run",
    "check": "audit of a run's flow, or of a new one",
    "score": "a likelihood for each row or picture",
    "bench": "time and memory beside other libraries",
}
USAGE = """usage: flowtrain COMMAND [key=value …] [--multirun]

{}

  flowtrain COMMAND --help                           its groups, options and keys, with examples
  flowtrain COMMAND --cfg job key=value …            the configuration, composed but not run

  flowtrain train model=glow dataset=digits
  flowtrain train --multirun model=nice,realnvp,glow seed=1,2
  flowtrain eval                                     the run that started last; or ckpt=outputs/…
  flowtrain sample n=64 temperature=0.7
  flowtrain check                                    is its flow exact? or check model=glow, a new one
  flowtrain score input=table.csv                    or a folder of pictures
  flowtrain bench suite=sample                       what it costs here, beside nflows and others
  flowtrain train resume=true                        go on where it stopped
  torchrun --nproc-per-node=8 -m flowtrain train     or, on one machine, devices=8
  eval "$(flowtrain -sc install=bash)"               tab completion (bash, zsh; fish: | source)

HYDRA_FULL_ERROR=1 shows an error's traceback. Exit codes: 0; 1 failed; 2 refused; 130, 143 interrupted.
""".format("\n".join(f"  {name:8} {text}" for name, text in COMMANDS.items()))
FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"


def main() -> None:
    end_at_once()
    end_with_torchrun()
    # before torch starts its threads: ones that spin while they wait make a shared machine ten times slower, and ones
    # that do not spin at all are woken too late for small operations: on two idle cores a step takes half as long again
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # of GNU's OpenMP, which PyTorch has on Linux: some microseconds
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # flowtrain eval | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        text, code = explain(error)
        print(f"flowtrain: {text}", file=sys.stderr)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        leave(code)
    sys.exit(code)


def leave(code: int) -> None:
    """End a process of a group at once. After an error the other ranks are the launcher's to end; after none, gloo's
    thread may still hold a tensor while the interpreter finalizes, and abort."""
    import logging

    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def explain(error: BaseException, run_dir: str | None = None) -> tuple[str, int]:
    """An error as one line and an exit code. What nobody foresaw leaves its traceback in the run's log."""
    import traceback

    if FULL_ERROR and type(error).__name__ != "Failed":  # a Failed has been shown where it happened
        traceback.print_exception(error)
    if found := cause_of(error, FlowtrainError):
        return " ".join(str(found).split()), found.exit_code
    text = " ".join(f"{type(error).__name__}: {error}".split())
    log = os.path.join(run_dir or "", "train.log")
    if run_dir and os.path.isfile(log):
        with suppress(OSError):  # of a full disk
            with open(log, "a") as file:
                traceback.print_exception(error, file=file)
            return f"{text} (traceback in {log})", 1
    return f"{text} (HYDRA_FULL_ERROR=1 shows where)", 1


def run(argv: list[str]) -> int:
    if any(word in ("-sc", "--shell-completion") for word in argv):
        return complete(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    command, words = argv[0], argv[1:]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(COMMANDS)}"
        raise Refused(f"no command '{command}'; {hint}")

    from flowtrain import distributed

    if not distributed.is_main():
        from flowtrain import jobs

        jobs.serve()
        return 0
    return compose(command, words)


def complete(argv: list[str]) -> int:
    """Answer the shell; a line that is wrong so far has no completions, and no error amid the prompt."""
    from flowtrain.completion import prepare

    try:
        command = prepare(argv, COMMANDS)
        if command:
            hydra(command, argv)
    except Exception:
        if not any(word.startswith("query=") for word in argv):
            raise
        return 1
    return 0


def compose(command: str, words: list[str]) -> int:
    """Check the command line, then let Hydra compose and run it."""
    from hydra._internal.utils import get_args_parser
    from hydra.errors import HydraException

    from flowtrain import distributed, jobs, runs
    from flowtrain.commandline import check, one_line

    parser = get_args_parser()
    parser.error = lambda message: _refuse_flag(parser, message)
    args = parser.parse_intermixed_args(words)
    flags = [word for word in words if word not in args.overrides]
    if args.multirun and args.cfg:
        raise Refused("--cfg shows one job: leave --multirun and its lists of values out")
    runs.claiming = not (args.help or args.hydra_help or args.cfg or args.info)
    config_name, args.overrides = restored(command, args.overrides, args.help or args.hydra_help, runs.claiming)
    code = 0
    try:
        if not (args.hydra_help or args.help and command != "train"):
            check(command, config_name, args, args.multirun or "hydra.mode=MULTIRUN" in args.overrides)
        hydra(config_name, [*flags, *args.overrides], jobs.job)
    except SystemExit as end:
        code = end.code or 0
    except HydraException as error:
        raise one_line(error) from error
    if jobs.failures:
        raise jobs.failures.pop(0)
    if distributed.world() > 1 and not code:
        jobs.dismiss()
    return code


def _refuse_flag(parser, message: str):
    name = message.rpartition(" ")[2]
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(name, known, 1) if name.startswith("-") else None
    raise Refused(message + (f"; did you mean '{near[0]}'?" if near else ""))


def restored(command: str, overrides: list[str], stub: bool, running: bool) -> tuple[str, list[str]]:
    """The root configuration, and the overrides with checkpoints' paths replaced by options that hold their configs.

    Without ``ckpt=``, commands take the run that started last, and say which; or none, where a ``stub`` will do. But
    check takes a new model where a group, such as ``model=``, asks for one.
    """
    from flowtrain import restore, runs

    if command == "bench":  # of no run
        return command, overrides
    key = "resume" if command == "train" else "ckpt"
    if command == "check" and any(word.startswith("replay=") for word in overrides):
        key = "replay"
    given = next((word for word in overrides if word.startswith(f"{key}=")), None)
    paths = _values(given, key) if given else []
    others = [word for word in overrides if word != given]
    if key == "replay" and any(word.startswith("ckpt=") for word in others):
        raise Refused("give ckpt= or replay=, not both")
    if command == "train" and all(not isinstance(path, str) for path in paths):
        return "train", overrides
    from flowtrain.commandline import check_names, parse

    parsed = parse(others)
    if command == "check" and not given and (stub or any(_builds(item.key_or_group) for item in parsed)):
        return "check_model", overrides
    keys = {item.key_or_group: item.value() for item in parsed if not item.is_sweep_override()}
    allow = keys["allow"] if isinstance(keys.get("allow"), list) else []
    if not stub:
        check_names(command, others)
    if key == "replay":
        files = [runs.recorded(path) for path in paths]
    elif given:
        find = runs.given_to_continue if command == "train" else partial(runs.checkpoint_in, key=key)
        files = [find(path) for path in paths]
    elif stub:
        return command, [f"{key}={restore.stub(key)}", *others]
    else:
        files = [runs.last_started()]
        out = sys.stdout if running and not keys.get("json") else sys.stderr
        print(f"ckpt={os.path.relpath(files[0])}", file=out, flush=True)
    options = ",".join(restore.as_option(key, file, allow) for file in files)
    return (command if key == "ckpt" else key), [f"{key}={options}", *others]


def _builds(group: str) -> bool:
    """Whether choosing an option of ``group`` builds another flow than a checkpoint's."""
    from flowtrain.config import conf_dir

    return group not in ("hydra", "launcher") and (conf_dir() / group).is_dir()


def _values(word: str, key: str) -> list:
    """The value of ``key=value``: as it stands where such a path exists, else by Hydra's grammar, a sweep as a list."""
    from hydra.errors import HydraException

    from flowtrain.commandline import parse

    text = word.partition("=")[2]
    if os.path.exists(os.path.expanduser(text)):
        return [text]
    item = parse([word])[0]
    if not item.is_sweep_override():
        return [item.value()]
    try:
        return [str(value).strip("'\"") for value in item.sweep_iterator()]
    except HydraException as error:  # glob(), interval()
        raise Refused(f"'{word}' does not list its values: write {key}=a,b") from error


def hydra(config_name: str, argv: list[str], task=lambda cfg: None) -> None:
    import hydra
    from hydra._internal import utils

    from flowtrain.config import conf_dir

    sys.argv = ["flowtrain", *argv]
    utils.run_and_report = lambda function: function()  # errors reach main() instead of being printed
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(task)()
