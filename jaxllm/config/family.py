"""What a model family is: how its config.json is read and written."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxllm.config.model import ModelConfig
from jaxllm.errors import listed, note, shown

Json = Mapping[str, Any]
Names = Literal["customllm", "deepseek"]


@dataclass(frozen=True)
class Family(ABC):
    """The models of one model_type."""

    model_type: str
    """As it is written."""
    architecture: str
    """Its class in transformers, or the class of the exported code."""

    names: ClassVar[Names]
    """The table of tensor names in `convert.mapping`."""
    bare: ClassVar[Json] = {}
    """Keys of a new file that the config does not decide."""

    @abstractmethod
    def read(self, values: Json) -> ModelConfig: ...

    @abstractmethod
    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Raises a UserError if the family does not have an option of this config."""

    @abstractmethod
    def holds(self, config: ModelConfig) -> bool:
        """Whether the family has all options of this config."""

    def is_interleaved(self, values: Json) -> bool:
        """Whether files with this config.json rotate the pairs (2i, 2i+1) of a rotary head, as new files do."""
        return True


def within_vocabulary(key: str, values: Json, said: bool = True) -> Any:
    """A special token's id, or ids, without those that the vocabulary does not have: transformers writes the defaults
    of its classes into small models, and other tools -1 for no token. A message reports ids that a file has. A pad
    token beyond the vocabulary is kept, to be refused as transformers refuses it."""
    given, size = values.get(key), values.get("vocab_size")
    if not isinstance(size, int):
        return given
    ids = given if isinstance(given, list) else [given]
    beyond = [
        token for token in ids if isinstance(token, int) and (token < 0 or (token >= size and key != "pad_token_id"))
    ]
    if not beyond:
        return given
    if said:
        note(f"{key} is {shown(given)}: left out {listed(map(str, beyond))}, as ids are 0 to {size - 1}")
    inside = [token for token in ids if token not in beyond]
    return (inside or None) if isinstance(given, list) else None
