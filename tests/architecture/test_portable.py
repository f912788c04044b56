"""The package runs on Windows too: what only POSIX has is imported where its absence is handled."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.architecture.package_source import Module, assert_only, modules

POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
# Windows has os.kill, but sends the signal 0 as Ctrl-C.
POSIX_NAMES = {
    "os": {
        *(
            "chown",
            "fork",
            "getegid",
            "geteuid",
            "getgid",
            "getloadavg",
            "getpgid",
            "getuid",
            "kill",
            "killpg",
        ),
        *("killpg", "mkfifo", "nice", "sched_getaffinity", "setsid", "statvfs", "sysconf", "uname", "wait"),
        *("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC"),
    },
    "signal": {"SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "alarm", "pause"},
}
# Without O_BINARY, which `open` sets, os.open changes line ends on Windows.
OPENS_BY_DESCRIPTOR = {
    "simpletuner/helpers/data/sources/local.py": "as an opener of open(), which sets the flags",
    "simpletuner/helpers/io/atomic.py": "a folder, to flush it",
    "simpletuner/helpers/io/logs.py": "the null device",
}


def test_what_only_posix_has_is_imported_where_its_absence_is_handled() -> None:
    found = [f"{module}:{line} {name}" for module in modules() for line, name in _of_posix(module)]
    assert not found, f"not on Windows: {found}"


def _of_posix(module: Module) -> Iterator[tuple[int, str]]:
    handled = {
        id(node)
        for attempt in ast.walk(module.tree)
        if isinstance(attempt, ast.Try) and any(map(_catches_import_error, attempt.handlers))
        for statement in attempt.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(module.tree):
        if id(node) in handled:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, each.name) for each in node.names if each.name in POSIX_MODULES)
        elif isinstance(node, ast.ImportFrom):
            names = POSIX_NAMES.get(node.module or "", set())
            yield from ((node.lineno, each.name) for each in node.names if each.name in names)
            if node.module in POSIX_MODULES:
                yield node.lineno, str(node.module)
        elif isinstance(node, ast.Attribute) and node.attr in POSIX_NAMES.get(ast.unparse(node.value), set()):
            yield node.lineno, ast.unparse(node)


def _catches_import_error(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.type, ast.Name) and handler.type.id == "ImportError"


def test_files_are_opened_by_open() -> None:
    found = {
        str(module) for module in modules() for node in ast.walk(module.tree) if _is_call(node, "os", "open")
    }
    assert_only(found, allowed=OPENS_BY_DESCRIPTOR)


def _is_call(node: ast.AST, owner: str, name: str) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == owner
    )


def test_texts_are_read_and_written_in_a_named_encoding() -> None:
    found = [
        f"{module}:{node.lineno}"
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"read_text", "write_text"}
        and len(node.args) < 2
        and not any(each.arg == "encoding" for each in node.keywords)
        and not (node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value == "utf-8")
    ]
    assert not found, f"Windows has another default encoding: {found}"
