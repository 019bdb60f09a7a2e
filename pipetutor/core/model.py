"""A model as the list of layers that a pipeline cuts, of which each rank builds its own alone.

Whoever writes a model writes all of it. A rank runs that code, too, but no parameter of a layer that it does not hold
keeps any memory: as soon as one is registered, torch's ``meta`` device takes it.

    rank 0      Embedding  Block    .         .            . on meta: a shape, and no numbers
    rank 1          .        .    Block   Embedding          the tied copy begins as the first one does

Each random draw of that code has a seed of its own, made of the run's seed and of how many draws there were before.
So the weights of a layer do not depend on who builds what, nor on the number of stages.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from pipetutor.core.layers import build, flatten_layers, layer_names, set_dropout
from pipetutor.core.loss import CrossEntropy
from pipetutor.core.partition import Layer
from pipetutor.core.records import to_json
from pipetutor.core.tied import Tied, owner
from pipetutor.system.named import Named
from pipetutor.system.uncompiled import torchvision

__all__ = ["Model", "build_model", "write_catalog"]


class _Function(nn.Module):
    """A layer without parameters, which is a plain function."""

    def __init__(self, function: Callable[[Any], Any]):
        super().__init__()
        self._function = function
        self.name = getattr(function, "__name__", type(function).__name__)  # a partial one has no name

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._function(input)


class LayerList(nn.Module):
    """A list of layers as one module, whose ``state_dict`` has each tied module once."""

    def __init__(self, names: Sequence[str], layers: Sequence[nn.Module]):
        super().__init__()
        self._layers = tuple(layers)  # where torch does not look for modules
        for name, layer in zip(names, layers, strict=True):
            if name not in self._modules:
                self.add_module(name, owner(layer))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        for layer in self._layers:
            input = layer(input)
        return input


@dataclass(frozen=True)
class Model:
    """A model, whole or in part: what is not held is on the device ``meta``.

    Attributes:
        whole: the model as one module.
        layers: the same as a list: the output of each is the input of the next.
        names: the prefix of each layer's parameters in the ``state_dict`` of ``whole``.
        loss_fn: takes what the last layer gives, and labels; returns the mean over the micro-batch.
    """

    whole: nn.Module
    layers: list[nn.Module]
    names: list[str]
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    @classmethod
    def of(cls, whole: nn.Module) -> "Model":
        """Return a vision model as a list.

        Raises:
            ValueError: it is no chain of layers; see ``pipetutor.core.layers.join_layers``.
        """
        layers = flatten_layers(whole)
        return cls(whole, layers, layer_names(whole, layers), CrossEntropy())

    def about(self) -> list[Layer]:
        """Return what the partition needs to know of each layer."""
        found = []
        for layer in self.layers:
            kind = layer.name if isinstance(layer, _Function) else type(owner(layer)).__name__
            weights = sum(p.numel() for p in layer.parameters() if p.requires_grad)
            found.append(Layer(kind, weights, layer.key if isinstance(layer, Tied) else ""))
        return found

    def state(self, low: int = 0, high: int | None = None) -> dict[str, torch.Tensor]:
        """Return the parameters and buffers of the layers low ... high-1, by their names in ``whole``."""
        state: dict[str, torch.Tensor] = {}
        for name, layer in zip(self.names[low:high], self.layers[low:high], strict=True):
            state |= owner(layer).state_dict(prefix=f"{name}." if name else "", keep_vars=True)
        return state


class _Building(TorchDispatchMode):
    """While a model is built: a seed for each random draw, and no memory for what is not held.

    Args:
        seed: of the run.
        held: numbers of the tensors to keep, in the order in which they are registered; None keeps all.
    """

    def __init__(self, seed: int, held: frozenset[int] | None):
        super().__init__()
        self._seed, self._held, self._draws = seed, held, itertools.count()
        self.tensors: list[torch.Tensor] = []
        self._known: set[int] = set()
        self._hooks = ExitStack()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            (own,) = np.random.SeedSequence((self._seed, next(self._draws))).generate_state(1, np.uint64)
            torch.manual_seed(int(own) >> 1)
        changes = func._schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags
        if changes and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return args[0]  # there are no numbers to change; to find that out, torch would load its compiler
        return func(*args, **(kwargs or {}))

    def _register(self, _: nn.Module, __: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or id(tensor) in self._known:
            return tensor
        if self._held is not None and len(self.tensors) not in self._held and not is_lazy(tensor):
            meta = tensor.detach().to("meta")
            tensor = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
        self._known.add(id(tensor))
        self.tensors.append(tensor)
        return tensor

    def __enter__(self) -> "_Building":
        random.seed(self._seed)
        np.random.seed(self._seed)
        torch.manual_seed(self._seed)
        for register in (register_module_parameter_registration_hook, register_module_buffer_registration_hook):
            self._hooks.enter_context(register(self._register))  # type: ignore[arg-type]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()
        torch.manual_seed(self._seed)  # what dropout draws does not depend on what was built

    def shapes(self) -> list[torch.Size]:
        return [tensor.shape for tensor in self.tensors]


def build_model(
    name: str, seed: int = 0, *, dropout: float | None = None, held: Iterable[range] | None = None
) -> Model:
    """Build a model, or some layers of it.

    torch's random numbers stand at the seed afterwards.

    Args:
        name: a torchvision model; ``gpt``; or a function of one's own, as ``module:function``, that returns a list of
            layers: modules, functions, DeepSpeed's ``LayerSpec`` and ``TiedLayerSpec``; or that list and a loss.
        seed: of the weights.
        dropout: probability for every dropout layer; None keeps the model's own, 0 turns dropout off.
        held: the layers to build; None builds all of them.

    Raises:
        ValueError: there is no such model, or it is none that a pipeline can cut.

    >>> [layer.kind for layer in build_model("gpt:layers=1").about()]
    ['Embedding', 'Positions', 'Block', 'LayerNorm', 'Embedding']
    """
    named = Named.parse(name)
    if held is None:
        return _construct(named, dropout, _Building(seed, None))
    outline = _Building(seed, frozenset())
    model = _construct(named, dropout, outline)
    indices = [index for span in held for index in span]
    if not indices:
        return model
    if max(indices) >= len(model.layers):
        raise ValueError(f"{name} has made {len(model.layers)} layers, and more before; it must always make the same")
    layers = [model.layers[index] for index in indices]
    wanted = {id(t) for layer in layers for t in itertools.chain(layer.parameters(), layer.buffers())}
    numbers = frozenset(number for number, tensor in enumerate(outline.tensors) if id(tensor) in wanted)
    building = _Building(seed, numbers)
    model = _construct(named, dropout, building)
    if building.shapes() != outline.shapes():
        raise ValueError(f"{name} makes another model each time that it is called; it must always make the same one")
    return model


def _construct(named: Named, dropout: float | None, building: _Building) -> Model:
    with building:
        if named.is_own:
            model = _from_list(named.text, named.call())
        elif named.name == "gpt":
            from pipetutor.core.gpt import gpt  # with DeepSpeed's specs, which load DeepSpeed

            model = _from_list(named.text, gpt(**named.arguments))
        else:
            model = Model.of(build(named.name))
    if dropout is not None:
        set_dropout(model.whole, dropout)
    return model


def _from_list(name: str, found: Any) -> Model:
    """Make a model of what a function returned."""
    loss_fn: Any = CrossEntropy()
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], list | nn.Sequential):
        found, loss_fn = found
        if not callable(loss_fn):
            raise ValueError(f"{name}: the loss must be a module or a function, and is a {type(loss_fn).__name__}")
    if isinstance(found, nn.Sequential):
        found = list(found)
    if not isinstance(found, list) or not found:
        what = "an empty list" if found == [] else f"a {type(found).__name__}"
        raise ValueError(
            f"{name} returns {what}, and a pipeline cuts a list of layers: return one, such as [nn.Linear(4, 8), "
            "nn.ReLU()], or join_layers(model) of a torchvision model"
        )
    shared: dict[str, nn.Module] = {}
    layers = [_layer(f"{name}: layer {index}", layer, shared) for index, layer in enumerate(found)]
    names = [layer.key if isinstance(layer, Tied) else str(index) for index, layer in enumerate(layers)]
    _check_parameters(name, layers)
    return Model(LayerList(names, layers), layers, names, loss_fn)


def _layer(where: str, layer: Any, shared: dict[str, nn.Module]) -> nn.Module:
    """Build a layer of the list."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    if isinstance(layer, TiedLayerSpec):
        if not layer.key.isidentifier():
            raise ValueError(f"{where}: the key {layer.key!r} of a tied layer must be a name, such as 'embedding'")
        if layer.key not in shared:
            shared[layer.key] = _built(where, layer)
        module = shared[layer.key]
        there, tied = dict(module.named_parameters()).keys(), set(layer.tied_weight_attr)
        if there != tied:
            raise ValueError(
                f"{where}: {type(module).__name__} has the parameters {', '.join(there)}, and tied are "
                f"{', '.join(sorted(tied))}: tie all (tied_weight_attr={sorted(there)}), or put others elsewhere"
            )
        return Tied(layer.key, module, layer.forward_fn)
    if isinstance(layer, LayerSpec):
        return _built(where, layer)
    if isinstance(layer, nn.Module):
        return layer
    if callable(layer) and not isinstance(layer, type):
        return _Function(layer)
    hint = f"; write {layer.__name__}(...)" if isinstance(layer, type) else ""
    raise ValueError(
        f"{where} is {_a(layer)}, and must be a module, a function, a LayerSpec or a TiedLayerSpec{hint}"
    )


def _built(where: str, spec: Any) -> nn.Module:
    try:
        return spec.build()
    except (MemoryError, RuntimeError):  # torch's, where there is no memory, says so itself
        raise
    except Exception as error:
        words = " ".join(str(error).split())
        kind = spec.typename.__name__
        raise ValueError(f"{where}: {kind} cannot be built: {type(error).__name__}: {words}") from None


def _a(thing: Any) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"


def _check_parameters(name: str, layers: Sequence[nn.Module]) -> None:
    """Refuse parameters that two stages would each have for itself, and those whose shapes nobody knows yet."""
    held: dict[int, int] = {}
    for index, layer in enumerate(layers):
        kind = type(owner(layer)).__name__
        for key, parameter in layer.named_parameters():
            if is_lazy(parameter):
                raise ValueError(f"{name}: layer {index} ({kind}) learns the shape of its {key} from data: give it")
            if not isinstance(layer, Tied) and (other := held.setdefault(id(parameter), index)) != index:
                raise ValueError(
                    f"{name}: layers {other} and {index} share their {key}, and on two stages each would have its "
                    "own: make both a deepspeed.pipe.TiedLayerSpec of one key"
                )


def write_catalog(path: Path) -> None:
    """Write models.json: for every torchvision model that can be flattened, its layers and their weights."""
    found: dict[str, list[Layer]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        try:
            found[name] = build_model(name, held=[]).about()
        except ValueError:
            continue
    # Without their last field: none of them has tied layers.
    lines = (f"{to_json(name)}: {to_json([layer[:2] for layer in layers])}" for name, layers in found.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write_catalog(Path(__file__).with_name("models.json"))
