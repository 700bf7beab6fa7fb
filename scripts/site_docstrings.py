"""How docstrings become Markdown: an extension of griffe, which reads them for the site."""

import re

import griffe

ROLE = re.compile(r":(?:mod|class|func|meth|data):`(?P<name>[^`]+)`")
# "hidden, depth: text", which may go on in lines further to the right
ARGUMENTS = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+):(?P<text>.*(?:\n(?P=indent) +\S.*)*)", re.M)
EXAMPLE = re.compile(r"(?:^|(?<=\n))(?P<indent> *)>>> .*(?:\n(?P=indent)\S.*|\n(?P=indent) +\S.*)*")


class Markdown(griffe.Extension):
    """Roles become links, or code where they name nothing public; examples become blocks of code."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """A docstring's roles, arguments and examples as Markdown."""
    return ARGUMENTS.sub(each, EXAMPLE.sub(fence, ROLE.sub(link, text.replace("``", "`"))))


def link(role: re.Match) -> str:
    """flowtrain.flows.maf → code, which is a link where the site has a section of that name."""
    name = role["name"]
    return f'<autoref identifier="{name}" optional><code>{name.removeprefix("flowtrain.")}</code></autoref>'


def each(arguments: re.Match) -> str:
    """Arguments that share a text, each with it: then each has its type and default."""
    names = arguments["names"].split(", ")
    return "\n".join(f"{arguments['indent']}{name}:{arguments['text']}" for name in names)


def fence(example: re.Match) -> str:
    indent = example["indent"]
    return f"{indent}```pycon\n{example[0]}\n{indent}```"
