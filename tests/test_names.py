"""Names of columns on a command line: any of them can be written, and a refusal prints the line to type."""

import csv
import shlex
import subprocess
import sys

import pytest
import test_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import flowtrain

from flowtrain.cli import names
from flowtrain.cli.hydra_internals import split_sweep
from flowtrain.cli.overrides import parse
from flowtrain.config import restore
from flowtrain.config.build import build_dataset
from flowtrain.config.compose import train_config
from flowtrain.errors import UsageError
from flowtrain.runtime import checkpoint

ODD = [
    "CO(GT)",
    "T [K]",
    "a,b",
    "x=y",
    "Größe",
    "温度",
    "μ:σ",
    "2x",
    "007",
    "1e3",
    "true",
    "null",
    "#n",
    "$y",
    "@z",
    "5%",
]
ODD += ['q"t', "it's", "back\\slash", "_id", "{z}", "a b", "17"]


def value_of(word: str):
    (item,) = parse([word])
    return item.value()


def line_to_type(word: str) -> list[str]:
    """The words, as a shell reads them, that the refusal of ``word`` prints."""
    with pytest.raises(UsageError) as caught:
        parse([word])
    text = str(caught.value)
    assert text.startswith(f"{word}: quote ") and "\n" not in text
    return shlex.split(text.partition("; type: ")[2])


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("dataset.columns=[CO(GT),T]", ["CO(GT)", "T"]),
        ("dataset.columns=[Größe,温度,a b]", ["Größe", "温度", "a b"]),
        ("dataset.columns=[max(a,b),T [K],x]", ["max(a,b)", "T [K]", "x"]),
        ("dataset.columns=[a(,b]", ["a(", "b"]),
        ("dataset.columns=[a=b,#n,!]", ["a=b", "#n", "!"]),
        ("dataset.columns=[5\",it's]", ['5"', "it's"]),
        ("dataset.columns=[1,true,null,1e3,007,2x]", [1, "true", "null", "1e3", "007", "2x"]),
        ('dataset.context=[ CO(GT) , "a,b" ]', ["CO(GT)", "a,b"]),
        ("dataset.weights=N(eff)", "N(eff)"),
        ("dataset.weights=true", "true"),
        ("dataset.types={CO(GT): angle, b: [0, 1], 1: time}", {"CO(GT)": "angle", "b": [0, 1], "1": "time"}),
        ("dataset.types.Größe=category", {"Größe": "category"}),
        ("dataset.read={sep: ;, decimal: ','}", {"sep": ";", "decimal": ","}),
        ("context={CO(GT): 1, 温度: 2.5}", {"CO(GT)": 1, "温度": 2.5}),
        ("context.CO(GT)=1", {"CO(GT)": 1}),
        ("dataset.path=my(file).csv", "my(file).csv"),
    ],
)
def test_a_refusal_prints_the_line_to_type(typed, value):
    (word,) = line_to_type(typed)
    assert value_of(word) == value


def test_what_needs_no_quotes():
    assert value_of("dataset.columns=[a_-+./$%*@?|: b,2x]") == ["a_-+./$%*@?|: b", "2x"]


def test_the_lists_of_a_sweep_are_quoted_each():
    (word,) = line_to_type("dataset.columns=[CO(GT)],[T,x=y]")
    assert split_sweep(parse([word])) == [['dataset.columns=["CO(GT)"]'], ['dataset.columns=[T,"x=y"]']]


def test_where_quotes_do_not_help_a_file_is_offered():
    with pytest.raises(UsageError, match=r"dataset\.columns=@FILE reads names from a file"):
        parse(['dataset.columns=["a,b'])


@pytest.mark.parametrize("quote", ['"', "'"])
def test_keys_of_mappings_may_be_quoted(quote):
    assert value_of(f"dataset.types={{{quote}CO(GT){quote}: angle, b: {quote}c: d{quote}}}") == {
        "CO(GT)": "angle",
        "b": "c: d",
    }
    word = f"x={{a: {{{quote}b c{quote}: [{{{quote}d:{quote}: 1}}]}}}}"
    assert value_of(word) == {"a": {"b c": [{"d:": 1}]}}
    assert parse([word])[0].input_line == word


def test_quoted_keys_survive_a_sweep():
    words = ["seed=1,2", 'dataset.types={"CO(GT)": angle}', 'dataset.read={"a:": 1},{"b\\"c": 2}']
    jobs = [[value_of(word) for word in job] for job in split_sweep(parse(words))]
    assert jobs == [[seed, {"CO(GT)": "angle"}, read] for seed in (1, 2) for read in ({"a:": 1}, {'b"c': 2})]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1), min_size=1))
def test_every_name_can_be_written(content):
    content = [name.replace("${", "$") for name in content]
    assert value_of(f"x={names._write(content)}") == content
    assert value_of(f"x={names._write(dict.fromkeys(content, 1))}") == dict.fromkeys(content, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.text(
        st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Z"], exclude_characters=",[]{}()\"'\\$:"),
        min_size=1,
    )
)
def test_every_name_that_cannot_be_read_bare_is_printed_in_quotes(name):
    try:
        value = value_of(f"dataset.columns=[{name}]")
    except UsageError:
        (word,) = line_to_type(f"dataset.columns=[{name}]")
        value = value_of(word)
    assert [str(one) for one in value] == [name] or value == [int(name.replace("_", ""))]


def write_table(path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(ODD)
        writer.writerows([[(7 * row + 3 * column) % 11 + row / 60 for column in range(len(ODD))] for row in range(60)])


def test_a_run_with_odd_names_in_a_file(tmp_path):
    write_table(tmp_path / "t.csv")
    lines = "\r\n\r\n".join(name for name in ODD if name != "CO(GT)")
    (tmp_path / "columns.txt").write_bytes(f"\ufeff{lines}\r\n".encode())
    words = ["dataset=table", "dataset.path=t.csv", "dataset.columns=@columns.txt", 'dataset.context=["CO(GT)"]']
    tiny = ["smoke=true", "max_steps=2", "model=maf", "logger=none"]
    assert flowtrain(tmp_path, "train", *tiny, *words) == 0
    assert flowtrain(tmp_path, "sample", "n=3", "plot=false", 'context={"CO(GT)": 0.5}') == 0
    (samples,) = tmp_path.glob("outputs/*/*/sample/*/samples.csv")
    with samples.open(newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == ODD[1:]
    (file,) = tmp_path.glob("outputs/*/*/checkpoints/last.pt")
    assert checkpoint.read_config(file)["dataset"]["columns"] == ODD[1:]


def test_a_refusal_repeats_the_word_as_it_was_typed():
    (word,) = names.prepare(["dataset.types={CO(GT): real}"])
    line = str(names.quoting(word))
    assert line.startswith("dataset.types={CO(GT): real}: quote names")
    assert line.endswith("type: 'dataset.types={\"CO(GT)\": real}'")


def test_the_printed_line_works_in_a_shell(tmp_path):
    write_table(tmp_path / "t.csv")
    typed = (
        f"dataset.columns=[{','.join(name for name in ODD if name not in ('a,b', '{z}', 'back' + chr(92) + 'slash'))}]"
    )
    first = test_cli.flowtrain("train", "dataset=table", "dataset.path=t.csv", typed, cwd=tmp_path)
    assert first.returncode == 2 and first.stderr.count("\n") == 1
    line = first.stderr.strip().partition("; type: ")[2]
    shown = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m flowtrain train dataset=table dataset.path=t.csv --cfg job {line}"],
        cwd=tmp_path,
        env=test_cli.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    listed = shown.stdout.partition("  columns:\n")[2].partition("\npreprocess")[0]
    for name in ODD[:2] + ["Größe", 'q"t', "it's"]:
        assert name in listed.replace("''", "'")


@pytest.mark.parametrize(
    ("key", "content", "says"),
    [
        ("dataset.columns", None, "dataset.columns=@f: no such file or directory"),
        ("dataset.context", b"\n \n", "dataset.context=@f: holds no names; write one a line"),
        ("dataset.columns", "Größe".encode("latin-1"), "dataset.columns=@f: is not UTF-8 text"),
        ("dataset.types", b"[a, b]", "dataset.types=@f: must hold lines of NAME: VALUE"),
        ("dataset.read", b"a: [", "dataset.read=@f: cannot be read: "),
        ("dataset.read", b"a: 2020-99-99", "dataset.read=@f: cannot be read: "),
    ],
)
def test_a_file_that_holds_no_names_is_refused(tmp_path, monkeypatch, key, content, says):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "f").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        names.prepare([f"{key}=@f"])
    assert str(caught.value).startswith(says)


def test_a_mapping_from_a_file(tmp_path):
    (tmp_path / "types.yaml").write_text('"CO(GT)": angle\nGröße: [0, 1.5]\n_id: category\n1: null\n', "utf-8")
    (word,) = names.prepare([f"dataset.types=@{tmp_path}/types.yaml"])
    assert value_of(word) == {"CO(GT)": "angle", "Größe": [0, 1.5], "_id": "category", "1": None}


def test_any_column_is_a_key_of_types_and_only_of_a_table(tmp_path, capsys):
    (tmp_path / "mine/dataset").mkdir(parents=True)
    (tmp_path / "mine/dataset/own.yaml").write_text("defaults: [table, _self_]\ntypes: {a: [0, 1]}\nread: {}\n")
    (tmp_path / "mine/experiment").mkdir()
    (tmp_path / "mine/experiment/of.yaml").write_text("# @package _global_\ndataset: {types: {b: time}}\n")
    own = ["train", "--config-dir", "mine", "--cfg", "job", "dataset=own", "experiment=of"]
    assert (
        flowtrain(tmp_path, *own, "dataset.types={c(d): angle}".replace("c(d)", '"c(d)"'), "dataset.types.a=angle") == 0
    )
    assert "  types:\n    a: angle\n    b: time\n    c(d): angle\n" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"dataset\.types is a mapping"):
        flowtrain(tmp_path, *own, "dataset.types=angle")
    with pytest.raises(UsageError, match=r"no key 'dataset\.types'"):
        flowtrain(tmp_path, "train", "dataset=moons", "dataset.types={a: angle}")


def test_no_text_of_a_run_is_an_interpolation(tmp_path):
    write_table(tmp_path / "t.csv")
    with pytest.raises(UsageError, match=r"\(\\\$\{q\} is text\)"):
        flowtrain(tmp_path, "train", "dataset=table", "dataset.path=t.csv", 'dataset.columns=["${q}"]')
    words = ["dataset=table", "dataset.path=t.csv", r'dataset.columns=["\${q}"]']
    with pytest.raises(UsageError, match=r"dataset\.columns: no name or text can hold '\$\{'"):
        build_dataset(train_config(*words))


def test_names_of_columns_in_a_checkpoint():
    plain = {name: {} for name in restore.NODES}
    restore._check_plain(plain | {"dataset": {"types": {"_id": "category"}}})
    for wrong in ({"types": {"_args_": 1}}, {"types": {"a": {"_id": 1}}}, {"_id": 1}):
        with pytest.raises(ValueError, match="it has a key _"):
            restore._check_plain(plain | {"dataset": wrong})


def test_completion_after_quoted_names(tmp_path):
    line = """flowtrain train dataset=table 'dataset.columns=["CO (GT)",T]' 'dataset.context=["it'"'"'s"]' model=ma"""
    done = test_cli.flowtrain("-sc", "query=bash", cwd=tmp_path, COMP_LINE=line)
    assert {"model=maf", "model=made"} <= set(done.stdout.split())
    (tmp_path / "columns.txt").touch()
    done = test_cli.flowtrain("-sc", "query=bash", cwd=tmp_path, COMP_LINE="flowtrain train dataset.columns=@co")
    assert done.stdout.split() == ["dataset.columns=@columns.txt"]
