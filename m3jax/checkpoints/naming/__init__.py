"""Brings the tensors of several checkpoints to one set of names: the first one's.

The same model is written with other names by other programs and releases. Each step
here is a pure function that takes tables of tensors by name and gives them back
renamed, with a line for the user:

    wrappers   prefixes that torch.compile, DDP, FSDP and PEFT put before every name
    rules      the user's own, REGEX=REPLACEMENT
    buffers    what follows from config.json: the first's are copied
    prefixes   the base model's prefix, on or off, or its parts in another order
    layouts    experts and projections, one by one or in one tensor
    registry   what transformers knows of a model's other names and layouts
    ties       heads that are their embedding, stored, left out or stored alone

`common` runs them, and only those that are needed: where names are equal, nothing is
looked up and transformers is not imported.
"""

from m3jax.checkpoints.naming.common import Named as Named
from m3jax.checkpoints.naming.common import common as common
