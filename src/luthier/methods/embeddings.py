"""Embeddings: what tokens mean on the way in, for all tokens or for chosen ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from luthier import contracts
from luthier.errors import CheckpointError, Fault, SpecError


class Options(contracts.Options):
    """Which embeddings learn."""

    tokens: list[int | str] | None = Field(
        None, min_length=1, description="only these tokens, by id or by text (each token of a text); default all"
    )
    untie: bool = Field(
        False, description="leave the output head frozen where it shares the embedding's weights (all tokens only)"
    )


class Embeddings(contracts.Method):
    Options = Options
    fresh = "exact"
    learning_rate = 5e-4
    bracket = (1e-5, 1e-2)
    about = contracts.About(
        family="selective",
        title="embeddings: the vectors of all or of chosen tokens learn",
        trains="the embedding matrix, or chosen rows of it",
        formula="h_0 = E'[token], only E' (or chosen rows) learns",
        source="chosen rows: PEFT's TrainableTokens; whole matrices as in Artetxe et al. 2019, arXiv 1910.11856",
        sites=("embeddings",),
        text=(
            "Only the table that turns tokens into vectors learns. Where the output head is tied to it (SmolLM2, "
            "Gemma) the scores of those tokens change too, which is most of the effect; `untie: true` keeps the head "
            "as it was. Name `tokens` to train a few rows, for markers and words that the base has hardly seen: a "
            "file of kilobytes that plain PEFT loads. The whole table is a large file that learns new words and "
            "languages better than new skills."
        ),
    )

    def attach(self, model: Any, *, seed: int, evidence: contracts.Evidence | None = None) -> contracts.Adapted:
        """Free the whole table, or put chosen rows on it through PEFT; SpecError for tokens that are not there."""
        from luthier.adapt import blocks
        from luthier.adapt.freed import FreedAdapted

        if self.options.tokens is not None:
            return self._rows(model, seed)
        return FreedAdapted(
            model, [f"{blocks.embedding(model)[0]}.weight"], untied=self.options.untie and blocks.tied(model)
        )

    def load(self, model: Any, folder: Path) -> contracts.Adapted:
        """Put a saved table, or saved rows, on the model."""
        from luthier import store
        from luthier.adapt import folder as files
        from luthier.adapt import freed, wrapped

        written = store.read_json(folder / files.CONFIG)
        if str(written.get("peft_type")).startswith(files.OWN):
            return freed.load(model, folder)
        faults = _misplaced(written.get("token_indices"), len(model.get_input_embeddings().weight))
        if faults:
            raise CheckpointError("the adapter's tokens are refused", where=str(folder / files.CONFIG), faults=faults)
        return wrapped.load(model, folder)

    def groups(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Decay would pull the vectors of tokens that no row holds towards zero: none."""
        return {name: {"weight_decay": 0.0} for name in names}

    def _rows(self, model: Any, seed: int) -> contracts.Adapted:
        from peft import TrainableTokensConfig

        from luthier.adapt import blocks, wrapped

        name, rows = blocks.embedding(model)[0], len(model.get_input_embeddings().weight)
        if self.options.untie and blocks.tied(model):
            raise SpecError("only goes with the whole table", where="method.untie", remedy="leave out `tokens`")
        numbers = self._numbers(model)
        faults = _misplaced(numbers, rows)
        if faults:
            raise SpecError("method.tokens: tokens that are not there", faults=faults)
        config = TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=numbers, target_modules=[name])
        return wrapped.attach(model, config, seed=seed)

    def _numbers(self, model: Any) -> list[int]:
        """The chosen tokens' ids, sorted, each once."""
        tokens = self.options.tokens
        found = {token for token in tokens if isinstance(token, int)}
        texts = [token for token in tokens if isinstance(token, str)]
        if texts:
            from luthier.text.tokenizer import Tokenizer

            place = Path(str(model.config.name_or_path))
            if not (model.config.name_or_path and place.is_dir()):
                raise SpecError("texts need the base's tokenizer", where="method.tokens", remedy="give ids instead")
            tokenizer = Tokenizer.from_folder(place)
            found |= {number for text in texts for number in tokenizer.encode(text)}
        return sorted(found)


def _misplaced(numbers: Any, size: int) -> list[Fault]:
    """What is wrong with a list of token ids for a table of `size` rows."""
    if not isinstance(numbers, list) or not numbers or not all(type(number) is int for number in numbers):
        return [Fault("token_indices", "must be a list of whole numbers")]
    faults = [Fault(str(n), f"is outside 0-{size - 1}, this base's tokens") for n in numbers if not 0 <= n < size][:20]
    if len(set(numbers)) < len(numbers):
        faults.append(Fault("token_indices", "names a token twice"))
    return faults
