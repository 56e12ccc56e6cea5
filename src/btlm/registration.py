"""Registers BTLM with Transformers' Auto classes, whichever of btlm and Transformers is imported first."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_transformers() -> None:
    """Register BTLM with Transformers' Auto classes: now if Transformers is imported already, else once it is."""
    sys.meta_path.insert(0, _AfterImport())
    if "transformers" in sys.modules:
        _import_model_once_complete()


def _import_model_once_complete() -> None:
    """Import ``btlm.model`` if no module of Transformers is half imported; otherwise, wait until they are imported.

    One of Transformers' own imports can import btlm: through a plug-in, or a user's file that has the name of a
    library. At that time, the modules that ``btlm.model`` needs may be incomplete.
    """
    half_imported = [
        spec
        for name, module in sys.modules.copy().items()
        if name.partition(".")[0] == "transformers"
        and isinstance(spec := getattr(module, "__spec__", None), ModuleSpec)
        and getattr(spec, "_initializing", False)
    ]
    for spec in half_imported:
        spec.__class__ = _Awaited
    if not half_imported:
        importlib.import_module("btlm.model")


class _Awaited(ModuleSpec):
    """Spec of a half imported module: Python sets ``_initializing`` to False when the import has ended or failed."""

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__["_initializing"])

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value and self.name in sys.modules:
            _import_model_once_complete()


def _register() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer

    from btlm.model import BTLMConfig, BTLMLMHeadModel, BTLMModel

    AutoConfig.register("btlm", BTLMConfig)
    AutoModel.register(BTLMConfig, BTLMModel)
    AutoModelForCausalLM.register(BTLMConfig, BTLMLMHeadModel)
    AutoTokenizer.register(BTLMConfig, tokenizer_class=GPT2Tokenizer)


class _AfterImport(MetaPathFinder):
    """Lets the other finders find a module, and runs an action once the module is imported.

    After Transformers, ``btlm.model`` is imported; after ``btlm.model``, it is registered. This order also works if
    ``btlm.model`` itself imports Transformers, while it is still incomplete.
    """

    actions = {"transformers": lambda: importlib.import_module("btlm.model"), "btlm.model": _register}  # noqa: RUF012

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                self.actions[fullname]()

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
