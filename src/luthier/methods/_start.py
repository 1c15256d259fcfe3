"""What a soft prompt starts from: options that several methods share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from luthier import contracts

if TYPE_CHECKING:
    import torch


class StartOptions(contracts.Options):
    """Where first values come from."""

    init: Literal["vocabulary", "text", "random"] = Field(
        "vocabulary", description="start as frequent tokens of the base, as the tokens of `text`, or as noise"
    )
    text: str | None = Field(
        None, min_length=1, description="what to start from, with init: text; repeated until it fills the prompt"
    )

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if (self.init == "text") != (self.text is not None):
            raise ValueError("`init: text` and `text` go together")
        return self

    def ids(self, model: Any, tokens: int) -> torch.Tensor:
        """The ids (tokens,) that the prompt starts as, for all but noise."""
        from luthier.adapt import prompts

        return prompts.draw_ids(model, tokens) if self.text is None else prompts.text_ids(model, tokens, self.text)
