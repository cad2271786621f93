"""Commands on the pages exist, with flags that they take; tables are those of the code; links lead somewhere."""

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from fsefs_nnunet.cli.main import parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "documentation").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Shell commands of the page's code blocks, without variables set before them."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(text for language, text in blocks if language in ("", "bash")).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.split(r"&&|;|\|", line)]
    found = [re.sub(r"^(\w+=\S+\s+)+", "", part) for part in parts]
    return [command for command in found if re.match(r"(fseft|nnUNetv2_\w+|python)\b", command)]


LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "looks.md"]


def text_of(page: Path) -> str:
    """Without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.stem)
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not re.match(r"https?:|mailto:", link):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


CASES = [pytest.param(c, id=f"{page.stem}-{c[:60]}") for page in PAGES for c in commands(page)]


@pytest.mark.parametrize("page", ["methods.md", "plan_keys.md"])
def test_tables_are_those_of_the_code(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "documentation")
    tables = importlib.import_module("tables")
    assert (ROOT / "documentation" / page).read_text("utf-8") == tables.with_table(page), "run documentation/tables.py"


def help_of(script: Path, patch: pytest.MonkeyPatch) -> str:
    """Help page of a benchmark, whose parser is built in its main(); nothing else of it runs."""
    patch.syspath_prepend(script.parent)  # as Python does for a script
    patch.setattr(sys, "argv", [str(script), "--help"])
    module = importlib.import_module(script.stem)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        module.main()
    return said.getvalue()


class Parsing(Exception):
    """Holds the parser that a command was about to parse its arguments with."""


def parser_of(program: str, patch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """That of a command of nnU-Net's, of which nothing else runs."""

    def stop(self, *arguments):
        raise Parsing(self)

    (script,) = entry_points(group="console_scripts", name=program)
    with patch.context() as until_it_parses, pytest.raises(Parsing) as stopped:
        until_it_parses.setattr(argparse.ArgumentParser, "parse_args", stop)
        script.load()()
    return stopped.value.args[0]


@pytest.mark.parametrize("arguments", ["78 3d_fullres_5shot", "78 3d_fullres_5shot 0 --tr FSEFTTrainer"])
def test_a_wrong_command_is_seen(arguments, monkeypatch):
    with pytest.raises(SystemExit):
        test_command(f"nnUNetv2_train {arguments}", monkeypatch)


def test_the_pages_have_commands():
    assert len(CASES) > 25


@pytest.mark.parametrize("command", CASES)
def test_command(command, monkeypatch):
    program, *arguments = shlex.split(command, comments=True)
    if program == "fseft":
        with contextlib.suppress(SystemExit if "--version" in arguments else ()):
            parser().parse_args(arguments)
    elif program.startswith("nnUNetv2_"):
        known = parser_of(program, monkeypatch)
        known.allow_abbrev = False
        known.parse_args(arguments)
    elif arguments[0] != "-m":
        script = ROOT / arguments[0]
        assert script.is_file()
        flags = [argument.split("=")[0] for argument in arguments[1:] if argument.startswith("-")]
        usage = help_of(script, monkeypatch).split("\n\n")[0]  # what follows quotes examples
        known = set(re.findall(r"(?<![\w-])(--?\w[\w-]*)", usage))
        assert set(flags) <= known
