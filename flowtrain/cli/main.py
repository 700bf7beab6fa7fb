"""``flowtrain COMMAND key=value …``. Imports PyTorch only when a job starts, and Hydra only to compose one."""

from __future__ import annotations

import difflib
import os
import sys
from contextlib import nullcontext

from flowtrain import __version__
from flowtrain.cli import exit_codes
from flowtrain.commands import COMMANDS
from flowtrain.errors import UsageError
from flowtrain.runtime.signals import end_at_once, end_with_torchrun

USAGE = """usage: flowtrain COMMAND [key=value …] [--multirun]

{}

  flowtrain COMMAND --help                           its groups, options and keys, with examples
  flowtrain COMMAND --cfg job key=value …            the configuration, composed but not run

  flowtrain train model=glow dataset=digits
  flowtrain train --multirun model=nice,realnvp,glow seed=1,2
  flowtrain eval                                     the run that started last; or ckpt=outputs/…
  flowtrain sample n=64 temperature=0.7
  flowtrain report                                   one page that shows it; training ends with it too
  flowtrain compare outputs/a outputs/b              which is better, and by how much
  flowtrain check                                    is its flow exact? or check model=glow: a new flow
  flowtrain score input=table.csv                    or a folder of images
  flowtrain bench suite=sample                       what it costs here, compared with nflows and others
  flowtrain train dry_run=true                       the model, the data and what the run would cost
  flowtrain train resume=true                        continue the run that stopped
  flowtrain rerun outputs/…                          repeat a run, and say what differs
  torchrun --nproc-per-node=8 -m flowtrain train     or, on one machine, devices=8
  eval "$(flowtrain completion bash)"                tab completion; also for zsh, and fish: flowtrain completion

HYDRA_FULL_ERROR=1 shows an error's traceback. Exit codes: 0; 1 failed; 2 wrong usage; 130, 143 interrupted.
""".format("\n".join(f"  {name:12} {command.summary}" for name, command in COMMANDS.items()))


def main() -> None:
    end_at_once()
    end_with_torchrun()
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that are not UTF-8
    # Before torch starts its threads. Threads that spin while they wait make a shared machine ten times slower; threads
    # that do not spin at all wake too late for small operations, and a step on two idle cores takes 1.5 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # for GNU's OpenMP, PyTorch's on Linux: some microseconds
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # flowtrain eval | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        text, code = exit_codes.describe_error(error)
        print(f"flowtrain: {text}", file=sys.stderr)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        exit_codes.leave(code)
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run one command line; its exit code."""
    if any(word in ("-sc", "--shell-completion") for word in argv):
        return complete(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    name, words = argv[0], argv[1:]
    if name == "completion":
        from flowtrain.cli.completion import script

        print(script(words), end="")
        return 0
    if name not in COMMANDS:
        names = [*COMMANDS, "completion"]
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}"
        raise UsageError(f"no command '{name}'; {hint}")

    from flowtrain.runtime import distributed

    if not distributed.is_main():
        from flowtrain.cli import jobs

        jobs.serve()
        return 0
    return compose(name, words)


def complete(argv: list[str]) -> int:
    """Answer the shell. A line with a mistake has no completions, and no error appears in the prompt."""
    from flowtrain.cli.completion import prepare
    from flowtrain.cli.hydra_internals import run_hydra

    try:
        root = prepare(argv)
        if root:
            run_hydra(root, argv, task=lambda cfg: None)
    except Exception:
        if not any(word.startswith("query=") for word in argv):
            raise
        return 1
    return 0


def compose(name: str, words: list[str]) -> int:
    """Check the command line, then let Hydra compose and run it."""
    from hydra.errors import HydraException

    from flowtrain.cli import jobs
    from flowtrain.cli.checkpoints import open_checkpoints
    from flowtrain.cli.checks import check
    from flowtrain.cli.continuation import concluded
    from flowtrain.cli.directories import temporary_outputs
    from flowtrain.cli.help import help_text
    from flowtrain.cli.hydra_internals import flag_parser, run_hydra
    from flowtrain.cli.messages import usage_error
    from flowtrain.cli.names import name_paths, prepare
    from flowtrain.config import runs
    from flowtrain.runtime import distributed

    command, parser = COMMANDS[name], flag_parser()
    parser.error = lambda message: _reject_flag(parser, message)
    args = parser.parse_intermixed_args(words)
    flags = [word for word in words if word not in args.overrides]
    if args.help:
        print(help_text(name, args.overrides, args.config_dir))
        return 0
    if args.multirun and args.cfg:
        raise UsageError("--cfg shows one job: leave --multirun and its lists of values out")
    runs.dry_run = bool(args.hydra_help or args.cfg or args.info)
    given = prepare(name_paths(command, args.overrides))
    root, args.overrides = open_checkpoints(command, given, placeholder=args.hydra_help)
    code = 0
    try:
        is_dry, config = False, None
        if not args.hydra_help:
            is_dry, config = check(command, root, args, args.multirun or "hydra.mode=MULTIRUN" in args.overrides)
        with temporary_outputs() if is_dry and not runs.dry_run else nullcontext(()) as words, concluded() as codes:
            composed = None if words or args.cfg or args.info or args.config_path else config
            run_hydra(root, [*flags, *args.overrides, *words], jobs.job, composed)
        code = max(codes, default=0)
    except SystemExit as end:
        code = end.code or 0
    except HydraException as error:
        raise usage_error(error) from error
    if jobs.failures:
        raise jobs.failures.pop(0)
    if distributed.world() > 1 and not code:
        jobs.dismiss()
    return code


def _reject_flag(parser, message: str):
    name = message.rpartition(" ")[2]
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(name, known, 1) if name.startswith("-") else None
    raise UsageError(message + (f"; did you mean '{near[0]}'?" if near else ""))
