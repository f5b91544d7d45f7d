"""A message is one line of a length that can be read."""

from __future__ import annotations

from craft_ray.errors import LONGEST, CraftError


def test_a_message_keeps_its_start_and_its_remedy_around_a_huge_value() -> None:
    message = CraftError(f"the column {'x' * 5_000_000} is missing:\nadd it").message
    assert message.startswith("the column xxx")
    assert message.endswith("xxx is missing: add it")
    assert "characters) ..." in message
    assert len(message) < LONGEST + 100
    assert CraftError("a\n b").message == "a b"
