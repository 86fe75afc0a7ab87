"""A text of any kind as numbers, one for each of its characters or bytes.

Tiny Shakespeare, the default, is Karpathy's `char-rnn/data/tinyshakespeare/input.txt`.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

Level = Literal["char", "byte"]
TINY_SHAKESPEARE = Path("tinyshakespeare", "input.txt")
_HELD_OUT = 20  # a twentieth to choose by, another one to report

_MISSING = """\
There is no text in {path}. Tiny Shakespeare, 1.1 MB, is \
data/tinyshakespeare/input.txt in https://github.com/karpathy/char-rnn: put it there, \
or set the environment variable ORTHAX_DATA to the folder that has {inside} in it. \
Any other text will do as well: --text FILE"""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the tokens of a text stand for.

    Attributes:
      characters: of a model of characters, in the order of their numbers; empty for one
        of bytes, whose tokens are the 256 bytes of UTF-8.
    """

    characters: str = ""

    @property
    def size(self) -> int:
        """The number of tokens."""
        return len(self.characters) or 256

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, shape `(n,)`, int32.

        Raises:
          ValueError: if a character is not in the vocabulary.
        """
        if not self.characters:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        known = np.array([ord(x) for x in self.characters], np.uint32)  # in order
        found = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        at = np.searchsorted(known, found).clip(max=len(known) - 1)
        if (known[at] != found).any():
            odd = chr(found[(known[at] != found).argmax()])
            raise ValueError(
                f"The text has the character {odd!r}; expected one of the "
                f"{self.size} of the vocabulary, or a model of bytes, which has all."
            )
        return at.astype(np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of tokens; bytes that are no UTF-8 come out as U+FFFD."""
        if not self.characters:
            return bytes(np.asarray(tokens, np.uint8)).decode(errors="replace")
        return "".join(self.characters[int(token)] for token in tokens)


class Text(NamedTuple):
    """A text in three parts, one behind the other.

    Attributes:
      train: tokens to train on, shape `(n,)`, int32; nine tenths.
      validation: tokens to choose by, the twentieth behind them.
      test: tokens to report, the last twentieth.
      vocabulary: what they stand for.
      name: of the file; of Tiny Shakespeare that of its folder.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    vocabulary: Vocabulary
    name: str


def find_text(path: Path | None = None) -> Path:
    """Return the file of a text: the one that is given, or Tiny Shakespeare.

    Raises:
      FileNotFoundError: if it is not there; says what is expected where.
    """
    folder = Path(os.environ.get("ORTHAX_DATA") or "data").expanduser()
    path = path or folder / TINY_SHAKESPEARE
    if not path.is_file():
        missing = _MISSING.format(path=path.absolute(), inside=TINY_SHAKESPEARE)
        raise FileNotFoundError(missing)
    return path


def load_text(path: Path | None = None, *, level: Level = "char") -> Text:
    """Return a text, divided in three; the vocabulary is that of the whole.

    Args:
      path: of a file in UTF-8 (of any kind for a model of bytes); by default Tiny
        Shakespeare in the folder of the environment variable ORTHAX_DATA.
      level: what a token is.

    Raises:
      FileNotFoundError: if there is no such file; says what is expected where.
      ValueError: if it is empty, or for characters no UTF-8.
    """
    path = find_text(path)
    content = path.read_bytes()
    if level == "byte":
        vocabulary = Vocabulary()
        tokens = np.frombuffer(content, np.uint8).astype(np.int32)
    else:
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is no UTF-8 ({error}); expected that for characters: convert "
                "it, or train a model of bytes, --level byte"
            ) from None
        vocabulary = Vocabulary("".join(sorted(set(text))))
        tokens = vocabulary.encode(text)
    held = len(tokens) // _HELD_OUT
    if not held:
        raise ValueError(
            f"{path} has {len(tokens)} {level}s; expected at least {_HELD_OUT}."
        )
    parts = np.split(tokens, [len(tokens) - 2 * held, len(tokens) - held])
    inside = path.parts[-2:] == TINY_SHAKESPEARE.parts
    return Text(*parts, vocabulary, path.parent.name if inside else path.name)
