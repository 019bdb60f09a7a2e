"""torchvision, without the compiler that comes with it and that nobody here uses.

``import torchvision`` loads ``torch._dynamo`` for one function of an operator of detection models, an optimizer loads
it to say that a graph may break at its step, and autograd loads symbolic shapes to compare two ordinary ones. With
inductor and sympy that is a second of processor time or more, in every rank. So stand-ins take their place, which
answer what is asked outside a compilation. Whoever wants more of them, as ``torch.compile`` does, gets the real
modules, which then stay.

    from pipetutor.system.uncompiled import torchvision
"""

import importlib
import operator
import sys
from types import ModuleType
from typing import Any


class _StandIn(ModuleType):
    """A module of the compiler, until it is asked for what only the real one has."""

    def __init__(self, name: str, **known: Any):
        super().__init__(name)
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        # Who looks at all modules asks for names with underscores; who imports a part of the package, for its path.
        if name.startswith("__") and (self.__name__, name) != ("torch._dynamo", "__path__"):
            raise AttributeError(name)
        package = self.__name__.split(".")[:2]  # a checkpoint wants symbolic shapes, and nothing of torch._dynamo
        for other in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            if other.split(".")[:2] == package:
                del sys.modules[other]
        return getattr(importlib.import_module(self.__name__), name)


def _is_compile_supported(device: str) -> bool:
    importlib.import_module("torch._dynamo.eval_frame")  # which no stand-in has: the real modules come
    return sys.modules["torch._dynamo.utils"].is_compile_supported(device)


def _take_their_place() -> None:
    utils = _StandIn("torch._dynamo.utils", is_compile_supported=_is_compile_supported)
    dynamo = _StandIn(
        "torch._dynamo",
        utils=utils,
        trace_rules=_StandIn("torch._dynamo.trace_rules", clear_lru_cache=lambda: None),  # at each new process group
        disable=lambda fn, *args, **options: fn,
        graph_break=lambda: None,
    )
    shapes = _StandIn("torch.fx.experimental.symbolic_shapes", expect_true=bool, sym_eq=operator.eq)
    sys.modules |= {module.__name__: module for module in (dynamo, utils, shapes)}


if not sys.modules.keys() & {"torch._dynamo", "torch.fx.experimental.symbolic_shapes"}:
    _take_their_place()

import torchvision  # noqa: E402

__all__ = ["torchvision"]
