"""A JSON reader that reports slips with line and column and reads on after those it can repair."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
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
    """The value of a JSON file; None once a problem is noted under `source` that leaves no value.

    Comments, trailing and missing commas, duplicate keys (the last one counts) and Python's True, False and
    None are problems too, but the value is returned, so that the rest of the file can be checked.
    """
    text = read_text(path, source=source, problems=problems)
    return None if text is None else parse_json(text, source=source, problems=problems)


def read_text(path: Path, *, source: str, problems: Problems) -> str | None:
    """The text of a file; None once the reason why it cannot be read is noted under `source`."""
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            problems.add(source, "", f"larger than {LARGEST_FILE_BYTES >> 20} MiB. Check the path.")
            return None
        text = path.read_bytes().decode("utf-8-sig")
        if text.strip() != "null":
            return text
        problems.add(source, "", "null: must hold an object, {...}, or an array, [...].")
    except FileNotFoundError:
        problems.add(source, "", "not found. Check the path.")
    except OSError as error:
        problems.add(source, "", f"cannot be read: {error.strerror}.")
    except UnicodeDecodeError as error:
        found = f"0x{error.object[error.start]:02x}"
        problems.add(source, "", f"not UTF-8: byte {error.start} is {found}. Save it as UTF-8.")
    return None


def parse_json(
    text: str, *, source: str, problems: Problems, on_second: Callable[[str], None] | None = None
) -> JsonValue | None:
    """The value of a JSON text, like `read_json`; `on_second` gets a second value that follows."""

    def report(position: int, message: str) -> None:
        line = text.count("\n", 0, position) + 1
        column = position - text.rfind("\n", 0, position)
        problems.add(source, f"line {line}, column {column}", message)

    try:
        return _Parser(text, report, on_second).document()
    except _MalformedError as error:
        report(error.position, error.text)
        return None


class _Parser:
    def __init__(self, text: str, report: Report, on_second: Callable[[str], None] | None) -> None:
        self.text, self.report, self.on_second = text, report, on_second
        self.position, self.depth = 0, 0

    def document(self) -> JsonValue:
        self.skip_space()
        if not self.peek():
            raise _MalformedError(self.position, "the file is empty.")
        value = self.value()
        self.skip_space()
        if self.peek() in ("{", "[") and self.on_second is not None:
            self.on_second(self.text[self.position :])
        elif self.peek():
            raise _MalformedError(self.position, f"{shown(self.peek())} after the end of the JSON.")
        return value

    def peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def skip_space(self) -> None:
        while match := _SPACE.match(self.text, self.position):
            self.position = match.end()
            comment = _COMMENT.match(self.text, self.position)
            if comment is None:
                return
            self.report(self.position, "JSON has no comments. Remove it.")
            self.position = comment.end()

    def value(self) -> JsonValue:
        opening = self.peek()
        if opening in ("{", "["):
            self.depth += 1
            if self.depth > _DEEPEST:
                raise _MalformedError(self.position, f"nested more than {_DEEPEST} deep.")
            nested: JsonValue = self.object() if opening == "{" else [self.value() for _ in self.items("]")]
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
            self.report(start, f"{word} is not JSON. Write {_SPELLINGS[word]}.")
            word = _SPELLINGS[word]
        elif word not in _WORDS:
            raise _MalformedError(start, f"expected a value, found {self.found()}. {self.advice()}")
        self.position = match.end() if match else start
        return _WORDS[word]

    def found(self) -> str:
        # Only the first character: an unquoted text may be a password.
        return shown(self.peek()) if self.peek() else "the end of the file"

    def advice(self) -> str:
        if self.peek().isalpha() or self.peek() == "'":
            return 'Write a text in double quotes, "like this"; numbers are finite.'
        return "Write a text in double quotes, a number, true, false, null, [...] or {...}."

    def object(self) -> dict[str, JsonValue]:
        members: dict[str, JsonValue] = {}
        for start in self.items("}"):
            if self.peek() != '"':
                raise _MalformedError(start, f"expected a key in double quotes, found {self.found()}.")
            key = self.string()
            self.skip_space()
            if self.peek() != ":":
                raise _MalformedError(self.position, f"expected a colon after the key {shown(key)}.")
            self.position += 1
            self.skip_space()
            if key in members:
                self.report(start, f"duplicate key {shown(key)}. Keep one.")
            members[key] = self.value()
        return members

    def items(self, closing: str) -> Iterator[int]:
        """Start of each member of an object or array; stops after the closing bracket."""
        opened_at = self.position
        self.position += 1
        is_first = True
        while True:
            self.skip_space()
            comma_at = self.position if self.peek() == "," else None
            if comma_at is not None and not is_first:
                self.position += 1
                self.skip_space()
            if not self.peek():
                raise _MalformedError(opened_at, f"{self.text[opened_at]} has no closing {closing}")
            if self.peek() == closing:
                if comma_at is not None:
                    self.report(comma_at, f"a comma before the closing {closing}. Remove it.")
                self.position += 1
                return
            if not is_first and comma_at is None:
                if self.peek() not in '"{[-0123456789':
                    text = f"expected a comma or {closing}, found {self.found()}."
                    raise _MalformedError(self.position, text)
                self.report(self.position, "expected a comma before this.")
            is_first = False
            yield self.position

    def string(self) -> str:
        start = self.position
        match = _STRING.match(self.text, start)
        if match is None:
            raise _MalformedError(start, "this text has no closing double quote on its line.")
        self.position = match.end()
        try:
            value = json.loads(match[0], strict=False)
            value.encode()
        except json.JSONDecodeError as error:
            self.report(start + error.pos, "an invalid escape. Write a backslash as \\\\, or use /.")
            return match[0][1:-1]
        except UnicodeEncodeError:
            self.report(start, "holds half a surrogate pair. Write the whole character.")
            return ""
        return str(value)
