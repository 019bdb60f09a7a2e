"""What each layer costs, and cutting a model by it."""

from pipetutor.costs.measuring import measure
from pipetutor.costs.table import LayerCosts

__all__ = ["LayerCosts", "measure"]
