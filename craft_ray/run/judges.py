"""Whether an answer is right, and how right it is: by what it contains, by its number, by a pattern, by its words, or
by a function of the user's own."""

from __future__ import annotations

import re
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, InvalidOperation
from typing import Any, Protocol

from craft_ray.config import EvalSet, FunctionEvalSet, NumericEvalSet, RegexEvalSet
from craft_ray.data.cells import shown
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError, DataError
from craft_ray.extras import install, missing
from craft_ray.run.own_function import OwnFunction

NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
"""A number that no word runs into: in `H2O costs $1,234.50kg` it is 1,234.50. The minus of `5-3` is between numbers."""
EXACT = Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])


class Judge(Protocol):
    """Compares a reply with what is expected: the response of a sample as the model's tokenizer gives it back, which
    need not be the text in the data (case, accents, spaces)."""

    identity: str
    """Hash of code that decides a score, in addition to the config; empty for our own."""

    def check(self, expected: str, sample: Sample) -> None:
        """
        Raises:
            DataError: what is expected cannot be compared with anything.
        """
        ...

    def __call__(self, reply: str, expected: str, sample: Sample) -> bool | float:
        """Whether the reply is right, or a score from 0 to 1."""
        ...


def judge_of(eval_set: EvalSet, key: str) -> Judge | None:
    """The judge of a metric of answers; None for exact_match, which compares tokens, and for other kinds of metrics.

    Args:
        key: the section's key in the configuration, for errors.

    Raises:
        ConfigError: its package is missing, or there is no such function.
    """
    if isinstance(eval_set, NumericEvalSet):
        return Numeric(eval_set.tolerance)
    if isinstance(eval_set, RegexEvalSet):
        return Pattern(eval_set.pattern)
    if isinstance(eval_set, FunctionEvalSet):
        return OwnFunction(eval_set.function, eval_set.folder, key)
    if eval_set.metric == "contains":
        return Contains()
    if eval_set.metric == "rouge_l":
        return RougeL(key)
    return None


class Contains:
    """Right if the response occurs in the reply, letter by letter."""

    identity = ""

    def check(self, expected: str, sample: Sample) -> None:
        if not expected.strip():
            raise DataError(f"{sample.where}: its response is empty, and every reply contains that: remove the row")

    def __call__(self, reply: str, expected: str, sample: Sample) -> bool:
        return expected.strip() in reply


class Numeric:
    """Right if the last number of the reply is that of the response."""

    identity = ""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = Decimal(str(tolerance))

    def check(self, expected: str, sample: Sample) -> None:
        if last_number(expected) is None:
            raise DataError(
                f"{sample.where}: its response {shown(expected)} holds no number, which metric numeric "
                f"compares: fix or remove the row"
            )

    def __call__(self, reply: str, expected: str, sample: Sample) -> bool:
        self.check(expected, sample)
        found, right = last_number(reply), last_number(expected)
        assert right is not None
        return found is not None and EXACT.abs(EXACT.subtract(found, right)) <= self._tolerance


def last_number(text: str) -> Decimal | None:
    """The last number in a text; commas may separate its thousands."""
    found = NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None
    except InvalidOperation:  # its exponent is beyond every number's
        return None


class Pattern:
    """Right if what a group finds in the reply is the response, or without a group if the pattern is found."""

    identity = ""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)

    def check(self, expected: str, sample: Sample) -> None:
        """Whatever it is, a reply may equal it."""

    def __call__(self, reply: str, expected: str, sample: Sample) -> bool:
        found = self._pattern.search(reply)
        if found is None or not self._pattern.groups:
            return found is not None
        within = self._pattern.search(expected)
        right = expected if within is None or within[1] is None else within[1]
        return found[1] is not None and found[1].strip() == right.strip()


class RougeL:
    """How much of two texts is a common subsequence of words: the F1 of ROUGE-L.

    C.-Y. Lin, ROUGE: A package for automatic evaluation of summaries (2004).
    """

    identity = ""

    def __init__(self, key: str) -> None:
        lacking = missing("rouge_score")
        if lacking:
            raise ConfigError(f"{key}.metric is rouge_l, but {lacking}: {install('rouge')}")
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer

        tokenizer: Any = DefaultTokenizer(use_stemmer=False)
        self._words = tokenizer.tokenize
        self._scorer: Any = RougeScorer(["rougeL"], tokenizer=tokenizer)

    def check(self, expected: str, sample: Sample) -> None:
        if not self._words(expected):
            raise DataError(
                f"{sample.where}: its response {shown(expected)} holds no word of the letters a to z and "
                f"digits, and rouge_l counts no others: score it by a function of your own, or remove the row"
            )

    def __call__(self, reply: str, expected: str, sample: Sample) -> float:
        self.check(expected, sample)
        return float(self._scorer.score(expected, reply)["rougeL"].fmeasure)
