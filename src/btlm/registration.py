"""Registers BTLM with Transformers' Auto classes, whichever of btlm and Transformers is imported first."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_transformers() -> None:
    """Register BTLM with Transformers' Auto classes: now if Transformers is imported already, else once it is."""
    sys.meta_path.insert(0, _AfterImport())
    if "transformers" in sys.modules:
        _register_once_complete()


def _register_once_complete() -> None:
    """Register BTLM if no module of Transformers or of the network is half imported; otherwise, wait until they are.

    Any file of the network may be what imports Transformers. One of Transformers' own imports can also import btlm:
    through a plug-in, or a user's file that has the name of a library. At that time, the modules that the network needs
    may be incomplete.
    """
    half_imported = [
        spec
        for name, module in sys.modules.copy().items()
        if (name.partition(".")[0] == "transformers" or name.startswith("btlm.model."))
        and isinstance(spec := getattr(module, "__spec__", None), ModuleSpec)
        and getattr(spec, "_initializing", False)
    ]
    for spec in half_imported:
        spec.__class__ = _Awaited
    if not half_imported and not _AfterImport.registered:
        _AfterImport.registered = True
        _register()


class _Awaited(ModuleSpec):
    """Spec of a half imported module: Python sets ``_initializing`` to False when the import has ended or failed."""

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__["_initializing"])

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value and self.name in sys.modules:
            _register_once_complete()


def _register() -> None:
    import transformers

    from btlm import model
    from btlm.model import BTLMConfig

    transformers.AutoConfig.register("btlm", BTLMConfig)
    transformers.AutoTokenizer.register(BTLMConfig, tokenizer_class=transformers.GPT2Tokenizer)
    transformers.AutoModel.register(BTLMConfig, model.BTLMModel, exist_ok=True)
    transformers.AutoModelForCausalLM.register(BTLMConfig, model.BTLMLMHeadModel)
    for task in ("SequenceClassification", "TokenClassification"):
        getattr(transformers, f"AutoModelFor{task}").register(BTLMConfig, getattr(model, f"BTLMFor{task}"))


class _AfterImport(MetaPathFinder):
    """Lets the other finders find Transformers, and registers BTLM once it has run."""

    registered = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register_once_complete()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
