"""Text as tokens: special tokens once and only at the ends, and a text that is cut without changing its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from craft_ray.models.chat import LITERAL, Rendered, special_tokens

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Cut:
    """The tokens of a text, and where its pieces begin among them."""

    ids: list[int]
    places: list[int]
    """For each cut of the text, the index of the first token after it."""
    merged: bool
    """Whether the text as a whole has other tokens, because some of them would extend over a cut. The pieces are then
    tokenised one by one, as the model meets them when it continues the first."""

    def inside(self) -> tuple[int, ...]:
        """The tokens between the first and the second cut, between the third and the fourth, and so on."""
        spans = zip(self.places[::2], self.places[1::2], strict=True)
        return tuple(at for start, end in spans for at in range(max(start, 1), end))


class TextEncoder:
    """A tokenizer as a decoder needs it: what it appends (the EOS of T5's, of some Llamas') is left out, because the
    response follows; and a BOS that the text brings along is not put in front twice."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._prefix, self.appended = self._ends()
        self._special = special_tokens(tokenizer)
        self.leads = self.following("", "a") != self._bare("a")
        """Whether a text on its own gets something in front that it does not get after another one."""

    def plain(self, text: str) -> list[int]:
        """The tokens of a text with the special tokens that the tokenizer puts in front of it."""
        ids = self.without_appended(self._tokenizer(text)["input_ids"])
        first = len(self._prefix)
        if first and ids[:first] == self._prefix and ids[first : first + 1] == self._prefix[-1:]:
            del ids[first]
        return ids

    def written(self, text: str) -> list[int]:
        """The tokens of a text that a chat template wrote with all its special tokens."""
        head, *rest = text.split(LITERAL)
        ids = self._bare(head)
        for piece in rest:
            ids += self.following("", piece)  # after the first character of a special token, which is not one itself
        return ids

    def following(self, before: str, text: str) -> list[int]:
        """The tokens of a text that follows another, none of which reaches into the other. SentencePiece's tokenizers
        put a space in front of a text on its own."""
        token = next((token for token in self._special if before.endswith(token)), None)
        for lead in ("\n", ".", "?") if token is None else (token,):
            head, whole = self._bare(lead), self._bare(lead + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self._bare(text)

    def cut(self, text: str, at: Sequence[int], encode: Encode) -> Cut:
        """The tokens of a text that is cut at these characters.

        Args:
            encode: `plain` or `written`.
        """
        whole = encode(text)
        heads = [encode(text[:end]) for end in at]
        if all(whole[: len(head)] == head for head in heads):
            return Cut(whole, [len(head) for head in heads], False)
        ids, places = list(heads[0]), [len(heads[0])]
        for start, end in zip(at, [*at[1:], len(text)], strict=True):
            for number, piece in enumerate(text[start:end].split(LITERAL)):
                ids += self.following("" if number else text[:start], piece)
            places.append(len(ids))
        return Cut(ids, places[:-1], True)

    def learnt(self, rendered: Rendered) -> Cut:
        """What a chat template wrote, cut where each turn that is learnt begins and ends."""
        return self.cut(rendered.text, [at for span in rendered.spans for at in span], self.written)

    def without_appended(self, ids: Sequence[int]) -> list[int]:
        """Tokens without those that the tokenizer appended to them."""
        size = len(self.appended)
        return list(ids[:-size] if size and list(ids[-size:]) == self.appended else ids)

    def _ends(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text."""
        words = ("a", "0", *(self._tokenizer.decode([number]) for number in range(min(len(self._tokenizer), 300))))
        word = next((word for word in words if self._bare(word)), "")  # a small vocabulary need not know "a"
        ids, bare = list(self._tokenizer(word)["input_ids"]), self._bare(word)
        assert bare, f"{type(self._tokenizer).__name__} has no token for any text"
        for start in range(len(ids) - len(bare) + 1):
            if ids[start : start + len(bare)] == bare:
                return ids[:start], ids[start + len(bare) :]
        raise AssertionError(f"{type(self._tokenizer).__name__} tokenises a text otherwise between special tokens")

    def _bare(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
