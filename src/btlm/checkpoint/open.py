"""A checkpoint by its name or folder, found once and passed on; what it holds is read when it is first asked for."""

import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btlm.model.architecture_btlm import Architecture
from btlm.model.config_keys_btlm import end_ids

from .config import read_architecture, read_config
from .locate import checkpoint_folder
from .tensor_file import MappedTensor, map_tensors
from .weight_files import check_size, weight_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from btlm.model import BTLMConfig


class Checkpoint:
    """An open checkpoint. Nothing of it needs torch except :meth:`config` and :attr:`transformers_tokenizer`.

    Args:
        name: What the user calls it.
        folder: Folder on this machine.
        has_weights: The folder has all that there is; else weights and tokenizer are downloaded when they are needed.
    """

    def __init__(self, name: Path | str, folder: Path, *, has_weights: bool = True) -> None:
        self.name = str(name)
        self.folder = folder
        self._has_weights = has_weights

    @classmethod
    def open(cls, name_or_path: "Checkpoint | Path | str", *, weights: bool = True) -> "Checkpoint":
        """Find a checkpoint; one that is open already is given back as it is.

        Args:
            name_or_path: Folder, or id on the Hugging Face Hub, whose files are downloaded to the Hub's cache.
            weights: Download weights and tokenizer now, not when they are first needed.

        Raises:
            ValueError: There is no such checkpoint.
        """
        if isinstance(name_or_path, Checkpoint):
            return name_or_path
        folder = checkpoint_folder(name_or_path, weights=weights)
        return cls(name_or_path, folder, has_weights=weights or Path(name_or_path).is_dir())

    @property
    def title(self) -> str:
        """A short name: that of the folder, of its run if the folder is called ``model``, or the id on the Hub."""
        if not Path(self.name).is_dir():
            return self.name
        folder = Path(self.name).resolve()
        return (folder.parent.name if folder.name == "model" else "") or folder.name

    def config(self) -> "BTLMConfig":
        """The configuration, checked; a new object that may be changed.

        Raises:
            ValueError: It is not one of BTLM, or its values are impossible.
        """
        return copy.deepcopy(self._config)

    @cached_property
    def _config(self) -> "BTLMConfig":
        return read_config(self.folder, self.architecture)

    @cached_property
    def architecture(self) -> Architecture:
        """The network; its ``eos_token_id`` is that of ``generation_config.json`` if there is such a file.

        Raises:
            ValueError: It is not one of BTLM, or its values are impossible.
        """
        return read_architecture(self.folder, self.name)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a text.

        Raises:
            ValueError: The checkpoint names something that is not a token.
        """
        return end_ids(self.architecture.eos_token_id, self.architecture.vocab_size)

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files of the weights, in safetensors where there are such.

        Raises:
            ValueError: There are none, or one is missing.
        """
        self._download()
        return weight_files(self.folder)

    @cached_property
    def tensors(self) -> dict[str, MappedTensor]:
        """The tensors where they lie in mapped files, by name.

        Raises:
            NotSupported: They are pickled in a form that only torch can read.
            ValueError: There are none, a file is damaged, or they are too small for the configuration.
        """
        quantized = self.architecture.quantization is not None
        check_size(self.weight_files, self.architecture.num_parameters(), quantized=quantized)
        return map_tensors(self.weight_files)

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, without Transformers where it has a ``tokenizer.json`` that fits.

        Raises:
            ValueError: There is none, or it has more tokens than the vocabulary.
        """
        from .tokenizer import read_tokenizer

        self._download()
        tokenizer = read_tokenizer(self.folder)
        if tokenizer is None or tokenizer.get_vocab_size() > self.architecture.vocab_size:
            loaded: Any = self.transformers_tokenizer  # which names the problem
            tokenizer = loaded.backend_tokenizer
        return tokenizer

    @cached_property
    def transformers_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer as Transformers has it; GPT-2's where there is none but a vocabulary of that size.

        Raises:
            ValueError: There is none, or it has more tokens than the vocabulary.
        """
        from .tokenizer import load_transformers_tokenizer

        self._download()
        return load_transformers_tokenizer(self.folder, self._config, self.name)

    def _download(self) -> None:
        if not self._has_weights:
            self.folder = checkpoint_folder(self.name)
            self._has_weights = True

    def __getstate__(self) -> dict[str, Any]:  # without what it has read
        return {name: value for name, value in vars(self).items() if name in ("name", "folder", "_has_weights")}
