"""The least models that have what tests ask of one; who imports this module can train them by their names."""

from typing import Any

from torch import nn

from pipetutor.core.layers import catalog_entry, join_layers
from pipetutor.core.partition import catalog

from torchvision.models._api import register_model  # isort: skip  # behind the layers, which load torchvision lightly


class Tiny(nn.Module):
    """Features, avgpool and classifier, as AlexNet has them: 1,200 parameters, and layers that work in place."""

    def __init__(self, norm: type[nn.Module], num_classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 4, 7, 16), norm(4), nn.ReLU(inplace=True)),
            *(nn.Conv2d(4, 4, 3, padding=1), norm(4), nn.ReLU(inplace=True)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(16, 16), nn.ReLU(inplace=True)),
            *(nn.Linear(16, 8), nn.ReLU(inplace=True), nn.Linear(8, num_classes)),
        )

    def forward(self, images):
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


@register_model()
def tiny(weights: None = None, **about: Any) -> nn.Module:
    return Tiny(nn.Identity, **about)


@register_model()
def tiny_norm(weights: None = None, **about: Any) -> nn.Module:
    return Tiny(nn.BatchNorm2d, **about)


for model in (tiny, tiny_norm):
    catalog()[model.__name__] = tuple(catalog_entry(join_layers(model())))
