"""Pairs mined from Python packages: the summary of a docstring asks, the function's body without it answers.

The rules, in the order they are applied; what fails one is counted under the name in brackets:

1. The file is UTF-8 Python that parses [not_utf8, no_python], at most `max_document_bytes` long [too_large].
2. A function or method, at any depth, has a docstring [no_docstring].
3. The summary is its first paragraph, white space made single spaces. It has `min_summary_words` to
   `max_summary_words` words [short_summary, long_summary] that hold a letter.
4. Statements follow the docstring [no_body], other than `pass`, `...` and `raise NotImplementedError` alone [stub], on
   lines of their own [one_line].
5. The body is the source from the line of the first of them to the function's last, without its indentation. It has
   `min_body_chars` to `max_body_chars` characters [short_body, long_body] and does not hold the summary
   [summary_in_body].

Neither name nor signature is part of the body: they would often repeat the summary.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.reading import SKIPPED_FOLDERS, spelled
from data_prep.source_config import PythonPairsSource
from pretrain.errors import ConfigError

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Mined:
    """A summary and the body of its function."""

    summary: str
    body: str
    name: str
    line: int


def package_files(source: PythonPairsSource, key: str) -> list[tuple[str, str, Path]]:
    """(name in provenance, top-level package, file) of every module, sorted. Raises ConfigError where none is.

    Without a path: the running interpreter's standard library and site-packages.
    """
    paths = sysconfig.get_paths()
    roots = ([("stdlib/", Path(paths["stdlib"])), ("site-packages/", Path(paths["purelib"]))] if source.path is None
             else [("", Path(source.path).absolute())])
    found = []
    for prefix, root in roots:
        if not root.is_dir():
            raise ConfigError(f"{key}.path", f"{root} is no folder of packages")
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).parts
            if any(part.startswith(".") or part in SKIPPED_FOLDERS for part in parts) or not path.is_file():
                continue
            package = spelled(Path(parts[0])).removesuffix(".py")
            found.append((prefix + spelled(path.relative_to(root)), package, path))
    if not found:
        raise ConfigError(f"{key}.path", f"no .py file below {', '.join(str(root) for _, root in roots)}")
    return sorted(found)


def mine(path: Path, rules: PythonPairsSource, max_bytes: int) -> Iterator[Mined | str | tuple[str, str]]:
    """What each function of a file gives, in order of lines: a pair, or the rule it failed.

    A file that is no Python gives one (rule, detail).
    """
    try:
        content = path.read_bytes()
        if len(content) > max_bytes:
            yield "too_large", f"{len(content)} bytes, max_document_bytes is {max_bytes}"
            return
        text = content.decode("utf-8-sig")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the mined code
            tree = ast.parse(text)
    except OSError as error:
        yield "unreadable", str(error.strerror)
    except UnicodeDecodeError as error:
        yield "not_utf8", f"byte {content[error.start]:#04x} at offset {error.start}"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        yield "no_python", str(error)
    else:
        # Lines as the parser counts them: form feeds and Unicode separators end none.
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
        for function in sorted(functions, key=lambda node: (node.lineno, node.col_offset)):
            yield _pair(function, lines, rules)


def _pair(function: Function, lines: list[str], rules: PythonPairsSource) -> Mined | str:
    docstring = ast.get_docstring(function)
    if docstring is None:
        return "no_docstring"
    summary = " ".join(docstring.strip().split("\n\n")[0].split())
    words = sum(any(c.isalpha() for c in word) for word in summary.split())
    if not rules.min_summary_words <= words <= rules.max_summary_words:
        return "short_summary" if words < rules.min_summary_words else "long_summary"
    statements = function.body[1:]
    if not statements:
        return "no_body"
    if len(statements) == 1 and _is_stub(statements[0]):
        return "stub"
    first = statements[0]
    start = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))])
    if start <= (function.body[0].end_lineno or 0):
        return "one_line"
    indent = lines[start - 1][:len(lines[start - 1]) - len(lines[start - 1].lstrip())]
    body = "\n".join(line.removeprefix(indent) for line in lines[start - 1:function.end_lineno]).strip("\n")
    if not rules.min_body_chars <= len(body) <= rules.max_body_chars:
        return "short_body" if len(body) < rules.min_body_chars else "long_body"
    if summary in " ".join(body.split()):
        return "summary_in_body"
    return Mined(summary, body, function.name, function.lineno)


def _is_stub(statement: ast.stmt) -> bool:
    """`pass`, `...` or `raise NotImplementedError`."""
    if isinstance(statement, ast.Raise):
        raised = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
        return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and statement.value.value is ...)
