"""The least models that have what tests ask of one: ``tiny``, and ``tiny_norm``, which normalises batches."""

import functools

from torch import nn

from pipetutor.core.model import Model
from pipetutor.core.partition import catalog

from torchvision.models._api import register_model  # isort: skip  # behind the layers, which load torchvision lightly


class Tiny(nn.Module):
    """Features, avgpool and classifier, as AlexNet has them: 1,200 parameters, and layers that work in place."""

    def __init__(self, norm: type[nn.Module] = nn.Identity, num_classes: int = 10, weights: None = None):
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

        nn.init.normal_(self.classifier[-1].weight, std=2.0)  # gradients longer than 1, which clipping would shorten

    def forward(self, images):
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


def enter():
    """In this process, have torchvision and the catalog know both."""
    for name, norm in {"tiny": nn.Identity, "tiny_norm": nn.BatchNorm2d}.items():
        register_model(name)(functools.partial(Tiny, norm))
        catalog()[name] = tuple(Model.of(Tiny(norm)).about())
