"""The families of torchvision's models: those of one name whose lists have the same kinds of layers."""

import re

from pipetutor.core.partition import catalog, parameters_of


def smallest() -> list[str]:
    """Return the model with the fewest weights of each family."""
    found = {}
    for name in sorted(catalog(), key=lambda name: parameters_of(catalog()[name]), reverse=True):
        found[re.match("[a-z]+", name)[0], frozenset(layer.kind for layer in catalog()[name])] = name
    return sorted(found.values())


def image(name: str) -> tuple[int, int, int]:
    """Return the size of the smallest images that every model of the family takes."""
    return (3, 224, 224) if name.startswith(("maxvit", "vit")) else (3, 64, 64)
