"""``flowtrain COMMAND key=value …``: the front door. Imports PyTorch only when a job starts."""

from __future__ import annotations

import difflib
import os
import sys

from flowtrain import __version__
from flowtrain.cli import checkpoint_words, exit_codes
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
  flowtrain check                                    is its flow exact? or check model=glow, a new one
  flowtrain score input=table.csv                    or a folder of images
  flowtrain bench suite=sample                       what it costs here, beside nflows and others
  flowtrain train resume=true                        go on where it stopped
  torchrun --nproc-per-node=8 -m flowtrain train     or, on one machine, devices=8
  eval "$(flowtrain -sc install=bash)"               tab completion (bash, zsh; fish: | source)

HYDRA_FULL_ERROR=1 shows an error's traceback. Exit codes: 0; 1 failed; 2 refused; 130, 143 interrupted.
""".format("\n".join(f"  {name:8} {command.summary}" for name, command in COMMANDS.items()))


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
        text, code = exit_codes.explain(error)
        print(f"flowtrain: {text}", file=sys.stderr)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        exit_codes.leave(code)
    sys.exit(code)


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
        raise UsageError(f"no command '{command}'; {hint}")

    from flowtrain.runtime import distributed

    if not distributed.is_main():
        from flowtrain.cli import jobs

        jobs.serve()
        return 0
    return compose(command, words)


def complete(argv: list[str]) -> int:
    """Answer the shell; a line that is wrong so far has no completions, and no error amid the prompt."""
    from flowtrain.cli.completion import prepare

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

    from flowtrain.cli import jobs
    from flowtrain.cli.overrides import check, one_line
    from flowtrain.config import runs
    from flowtrain.runtime import distributed

    parser = get_args_parser()
    parser.error = lambda message: _refuse_flag(parser, message)
    args = parser.parse_intermixed_args(words)
    flags = [word for word in words if word not in args.overrides]
    if args.multirun and args.cfg:
        raise UsageError("--cfg shows one job: leave --multirun and its lists of values out")
    runs.claiming = not (args.help or args.hydra_help or args.cfg or args.info)
    config_name, args.overrides = checkpoint_words.restored(
        command, args.overrides, args.help or args.hydra_help, runs.claiming
    )
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
    raise UsageError(message + (f"; did you mean '{near[0]}'?" if near else ""))


def hydra(config_name: str, argv: list[str], task=lambda cfg: None) -> None:
    import hydra
    from hydra._internal import utils

    from flowtrain.cli.options import hide_shared_files
    from flowtrain.config.compose import conf_dir

    hide_shared_files()
    sys.argv = ["flowtrain", *argv]
    utils.run_and_report = lambda function: function()  # errors reach main() instead of being printed
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(task)()
