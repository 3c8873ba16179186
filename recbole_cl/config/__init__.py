"""What was asked for: the properties of a run, from every place that may set one, checked and settled.

- :mod:`~recbole_cl.config.config` the class of all properties: which layer wins over which
- :mod:`~recbole_cl.config.values` reading YAML files, arguments and single values
- :mod:`~recbole_cl.config.files` where the defaults of the package and of a component lie
- :mod:`~recbole_cl.config.keys` which names of properties mean something
- :mod:`~recbole_cl.config.models`, :mod:`~recbole_cl.config.datasets`, :mod:`~recbole_cl.config.metrics` what there is
  under which name
- :mod:`~recbole_cl.config.strategies` the forms of ``strategy`` and the parameters of each
- :mod:`~recbole_cl.config.columns`, :mod:`~recbole_cl.config.task` what follows from the dataset's files and the model
- :mod:`~recbole_cl.config.device` CPU or which GPU

What a single property may be is said in :mod:`recbole_cl.schema`.
"""

from recbole_cl.config.config import CLConfig
from recbole_cl.config.datasets import find_dataset, list_datasets
from recbole_cl.config.files import RECBOLE, component_defaults, properties_dir
from recbole_cl.config.metrics import list_metrics
from recbole_cl.config.models import get_model_class, list_models, list_recbole_models
from recbole_cl.config.values import parse_arguments, parse_value, read_properties

__all__ = [
    "RECBOLE",
    "CLConfig",
    "component_defaults",
    "find_dataset",
    "get_model_class",
    "list_datasets",
    "list_metrics",
    "list_models",
    "list_recbole_models",
    "parse_arguments",
    "parse_value",
    "properties_dir",
    "read_properties",
]
