"""Promise 15: whatever file a user brings, it is read or refused in one line, within bounds of time and memory."""

import signal

from mutations import describe, write_enormous, write_mutation

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
        path.unlink()
    promise(15, "enormous files read, or refused in one line, below 2 GB and 60 s", f"{asked - len(wrong)} of {asked}")
    assert not wrong, "\n".join(wrong)
