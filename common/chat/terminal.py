"""A conversation in the terminal, or texts that the model continues."""

import contextlib
import re
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from common import errors
from common.data.sources.bad_rows import to_bad_row_error
from common.inference.generation import Answer, Generator
from common.inference.prompt_rows import PromptReader

COMMANDS = {
    "/reset": "forgets the conversation",
    "/system TEXT": "sets the system turn, none without TEXT, and forgets the conversation",
    "/help": "shows these commands",
    "/exit": "ends, as Ctrl-D does",
}
KEYS = "Ctrl-C stops an answer"
HELP = "\n".join(f"  {command:<14} {does}" for command, does in COMMANDS.items())


class Terminal:
    """Reads turns from stdin and prints the model's answers to stdout; what else there is to say goes to stderr."""

    def __init__(self, generator: Generator, reader: PromptReader) -> None:
        self.generator, self.reader = generator, reader
        self.is_chat = reader.mode != "complete" and reader.encoder.template is not None
        self.turns: list[dict[str, Any]] = []
        self.is_terminal = sys.stdin.isatty()

    def run(self) -> None:
        """Answers line by line until /exit or the end of stdin."""
        if self.is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  editing and history for input()
            what = "a conversation" if self.is_chat else "each line is continued"
            say(f"{what}; {KEYS}; commands:\n{HELP}")
        while (line := self._read()) is not None:
            if not line.strip():
                continue
            command = re.fullmatch(r"(/[a-z]+)(?:\s+(.*))?", line.strip(), re.DOTALL)
            if command and command[1] == "/exit":
                return
            if command:
                self._obey(command[1], command[2] or "")
            else:
                self._answer(line)

    def _read(self) -> str | None:
        """The next line; None at the end of stdin."""
        while True:
            try:
                return input("> ") if self.is_terminal else next(sys.stdin).rstrip("\n")
            except (EOFError, StopIteration):
                if self.is_terminal:
                    print()
                return None
            except UnicodeDecodeError as error:
                say(f"that line is not {sys.stdin.encoding}, and was not used ({error})")
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
                say("\n/exit or Ctrl-D ends")

    def _obey(self, command: str, text: str) -> None:
        if command == "/help":
            say(HELP)
        elif not self.is_chat and command in ("/reset", "/system"):
            say(f"{command} is for conversations: here each line is continued by itself (MODE)")
        elif command == "/reset":
            self.turns = []
            say("a new conversation")
        elif command == "/system":
            self.turns = []
            self.reader = replace(self.reader, system=text)
            say(f"a new conversation, {'with this system turn' if text else 'without a system turn of yours'}")
        else:
            say(f"{command} is no command; with a space before it, it is text for the model:\n{HELP}")

    def _answer(self, line: str) -> None:
        """Prints the answer to `line`; a line that cannot be used leaves the conversation as it was."""
        turns = [*self.turns, {"role": "user", "content": line}]
        try:
            ids = self.reader.ids_of_turns(turns) if self.is_chat else self.reader.ids_of_line(line)
        except Exception as error:
            hint = "; /reset begins a new conversation" if self.turns else ""
            say(f"not answered: {to_bad_row_error(error)}{hint}")
            return
        answer = self._stream(ids)
        if answer.finish_reason == "length":
            say(f"(ended at MAX_NEW_TOKENS={self.generator.config.max_new_tokens})")
        if answer.finish_reason == "interrupted":
            say("(stopped)" if answer.ids else "(stopped before its first token: the line is forgotten)")
        if self.is_chat and (answer.ids or answer.finish_reason != "interrupted"):
            self.turns = [*turns, {"role": "assistant", "content": answer.text}]

    def _stream(self, ids: list[int]) -> Answer:
        stop, answers = threading.Event(), list[Answer]()
        with _set_by_ctrl_c(stop):
            for piece in self.generator.stream(ids, stop, answers):
                print(errors.visible(piece), end="", flush=True)
            print(flush=True)
        (answer,) = answers
        return answer


@contextlib.contextmanager
def _set_by_ctrl_c(event: threading.Event) -> Iterator[None]:
    """SIGINT sets `event` in the block."""
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def say(text: str) -> None:
    """Prints `text` to stderr."""
    print(errors.visible(text), file=sys.stderr, flush=True)
