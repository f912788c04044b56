"""JSON as people write it: every slip that can be read past is reported with its line and column."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import JsonValue

from simpletuner.helpers.configuration.text.problems import Problems, shown

LARGEST_FILE_BYTES = 16 * 1024 * 1024
_DEEPEST = 64
_LONGEST_NUMBER = 400
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?(?![\w.])")
_STRING = re.compile(r'"(?:[^"\\\n\r]|\\.)*"')
_SPACE = re.compile(r"[ \t\r\n]*")
_COMMENT = re.compile(r"//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
_WORD = re.compile(r"[A-Za-z_]+")
_WORDS: Mapping[str, JsonValue] = {"true": True, "false": False, "null": None}
_SPELLINGS: Mapping[str, str] = {
    "True": "true",
    "False": "false",
    "None": "null",
    "TRUE": "true",
    "FALSE": "false",
}

Report = Callable[[int, str], None]


class _MalformedError(Exception):
    def __init__(self, position: int, text: str) -> None:
        super().__init__(text)
        self.position = position
        self.text = text


def read_json(path: Path, *, source: str, problems: Problems) -> JsonValue | None:
    """The value of a json file, or None if it cannot be read; each problem is noted under `source`.

    A value comes back despite comments, trailing or missing commas, duplicate keys (the last one counts) and
    Python's True, False and None, so that everything else in the file can be checked too.
    """
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            problems.add(
                source, "", f"larger than {LARGEST_FILE_BYTES >> 20} MiB, which is no configuration."
            )
            return None
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        problems.add(source, "", "not found. Check the path.")
        return None
    except OSError as error:
        problems.add(source, "", f"cannot be read: {error.strerror}.")
        return None
    except UnicodeDecodeError as error:
        problems.add(
            source,
            "",
            f"not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}. Save it as UTF-8.",
        )
        return None
    return parse_json(text, source=source, problems=problems)


def parse_json(text: str, *, source: str, problems: Problems) -> JsonValue | None:
    """The value of a json text, or None if it cannot be read; each problem is noted under `source`."""

    def report(position: int, message: str) -> None:
        line = text.count("\n", 0, position) + 1
        column = position - text.rfind("\n", 0, position)
        problems.add(source, f"line {line}, column {column}", message)

    try:
        return _Parser(text, report).document()
    except _MalformedError as error:
        report(error.position, error.text)
        return None


class _Parser:
    def __init__(self, text: str, report: Report) -> None:
        self.text, self.report = text, report
        self.position, self.depth = 0, 0

    def document(self) -> JsonValue:
        self.space()
        if not self.peek():
            raise _MalformedError(self.position, "the file is empty.")
        value = self.value()
        self.space()
        if self.peek():
            raise _MalformedError(self.position, f"{shown(self.peek())} after the end of the json.")
        return value

    def peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def space(self) -> None:
        while True:
            self.position = self.matched(_SPACE, self.position)
            comment = _COMMENT.match(self.text, self.position)
            if comment is None:
                return
            self.report(self.position, "a comment, which json does not have. Remove it.")
            self.position = comment.end()

    def matched(self, pattern: re.Pattern[str], position: int) -> int:
        match = pattern.match(self.text, position)
        return match.end() if match else position

    def value(self) -> JsonValue:
        opening = self.peek()
        if opening in ("{", "["):
            self.depth += 1
            if self.depth > _DEEPEST:
                raise _MalformedError(self.position, f"nested more than {_DEEPEST} deep.")
            nested: JsonValue = self.object() if opening == "{" else self.array()
            self.depth -= 1
            return nested
        if opening == '"':
            return self.string()
        number = _NUMBER.match(self.text, self.position)
        if number and number.end() - number.start() <= _LONGEST_NUMBER:
            self.position = number.end()
            return float(number[0]) if number[1] or number[2] else int(number[0])
        return self.word()

    def word(self) -> JsonValue:
        start = self.position
        match = _WORD.match(self.text, start)
        word = match[0] if match else ""
        if word in _SPELLINGS:
            self.report(start, f"{word} is not json. Write {_SPELLINGS[word]}.")
            word = _SPELLINGS[word]
        elif word not in _WORDS:
            raise _MalformedError(start, f"a value was expected, not {self.found()}. {self.advice()}")
        self.position = match.end() if match else start
        return _WORDS[word]

    def found(self) -> str:
        # Only the first character: what stands unquoted may be a password.
        return shown(self.peek()) if self.peek() else "the end of the file"

    def advice(self) -> str:
        if self.peek().isalpha() or self.peek() == "'":
            return 'Texts stand in double quotes, "like this"; numbers are finite.'
        return "Write a text in double quotes, a number, true, false, null, [...] or {...}."

    def object(self) -> dict[str, JsonValue]:
        members: dict[str, JsonValue] = {}
        for start in self.items("}"):
            if self.peek() != '"':
                raise _MalformedError(start, f"a key in double quotes was expected, not {self.found()}.")
            key = self.string()
            self.space()
            if self.peek() != ":":
                raise _MalformedError(self.position, f"a colon was expected after the key {shown(key)}.")
            self.position += 1
            self.space()
            if key in members:
                self.report(start, f"{shown(key)} stands here a second time. Keep one.")
            members[key] = self.value()
        return members

    def array(self) -> list[JsonValue]:
        return [self.value() for _ in self.items("]")]

    def items(self, closing: str) -> _Items:
        return _Items(self, closing)

    def string(self) -> str:
        start = self.position
        match = _STRING.match(self.text, start)
        if match is None:
            raise _MalformedError(start, "this text is not closed by a double quote on its line.")
        self.position = match.end()
        try:
            value = json.loads(match[0], strict=False)
            value.encode()
        except json.JSONDecodeError as error:
            self.report(
                start + error.pos, "a backslash that escapes nothing. Write a backslash as \\\\, or use /."
            )
            return match[0][1:-1]
        except UnicodeEncodeError:
            self.report(start, "holds half a surrogate pair, which is no character.")
            return ""
        return str(value)


class _Items:
    """Walks over the members of an object or array, up to and including its closing bracket."""

    def __init__(self, parser: _Parser, closing: str) -> None:
        self.parser, self.closing = parser, closing
        self.opened_at = parser.position
        parser.position += 1
        self.first = True

    def __iter__(self) -> _Items:
        return self

    def __next__(self) -> int:
        parser = self.parser
        parser.space()
        comma_at = parser.position if parser.peek() == "," else None
        if comma_at is not None and not self.first:
            parser.position += 1
            parser.space()
        if not parser.peek():
            bracket = "{" if self.closing == "}" else "["
            raise _MalformedError(
                self.opened_at, f"the {bracket} opened here is never closed by {self.closing}"
            )
        if parser.peek() == self.closing:
            if comma_at is not None:
                parser.report(comma_at, f"a comma before the closing {self.closing}. Remove it.")
            parser.position += 1
            raise StopIteration
        if not self.first and comma_at is None:
            if parser.peek() not in '"{[' + "-0123456789":
                raise _MalformedError(
                    parser.position, f"a comma or {self.closing} was expected, not {shown(parser.peek())}."
                )
            parser.report(parser.position, "a comma is missing before this.")
        self.first = False
        return parser.position
