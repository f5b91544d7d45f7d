"""One sample: what every stage uses, whether it trains, anchors or evaluates."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from craft_ray.data.cells import cut
from craft_ray.data.conversation import Conversation
from craft_ray.data.frame import Frame
from craft_ray.errors import DataError


@dataclass(frozen=True)
class Sample:
    """A question with its answer, if there is one; a conversation; or a moment of a robot's episode, with the task as
    the prompt."""

    id: str
    prompt: str
    """The input text. For a conversation, its transcript, which is shown and never given to a model."""
    image: bytes | None = None
    """An encoded image (PNG, JPEG). For a conversation or a list, the first one, which is shown."""
    response: str | None = None
    """The answer. For a conversation, the text of the assistant's last turn."""
    choices: tuple[str, ...] | None = None
    frame: Frame | None = None
    conversation: Conversation | None = None
    """What a model reads in place of `prompt`, `image` and `response`."""
    images: tuple[bytes, ...] | None = None
    """All images in the order of the text, if the data hold a list of them; a list may be empty."""
    skill: str | None = field(default=None, compare=False)
    """Which of several old skills an anchor belongs to."""
    origin: str | None = field(default=None, compare=False)
    """The file and the row, if they are known, with the id if a column holds it."""

    @property
    def where(self) -> str:
        """The sample in a message."""
        return self.origin or f"sample {cut(self.id)}"

    @property
    def pictures(self) -> tuple[bytes, ...] | None:
        """The encoded images that a model reads, in the order of the text; None if the data name no image."""
        if self.conversation is not None:
            return self.conversation.images
        return self.images if self.image is None or self.images is not None else (self.image,)

    def answer(self) -> str:
        """The response, when one is needed.

        Raises:
            DataError: there is none.
        """
        if self.response is not None:
            return self.response
        if self.conversation is not None:
            raise DataError(
                f"{self.where}: the conversation ends with a turn of the {self.conversation.messages[-1]['role']}, so "
                f"there is nothing to learn or to compare: end it with a turn of the assistant, or remove the row"
            )
        raise DataError(f"{self.where} has no response: name the column that holds it (columns.response)")

    def answering(self, response: str) -> Sample:
        """The same question with this answer."""
        if response == self.response:
            return self
        conversation = self.conversation and replace(
            self.conversation, answer={"role": "assistant", "content": response}
        )
        return replace(self, response=response, conversation=conversation)
