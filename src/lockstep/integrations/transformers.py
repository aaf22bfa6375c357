"""Importing this module registers `ep_implementation="lockstep"` with Transformers."""

from typing import Any

from transformers.distributed import expert_parallel

from lockstep.errors import ConfigurationError

if not hasattr(expert_parallel, "EPImplementationInterface"):
    raise ConfigurationError(
        "this version of Transformers has no registry of expert-parallel implementations (5.23 and 5.24 have): use "
        "lockstep.from_pretrained"
    )


class LockstepEP(expert_parallel.EPImplementation):
    """Marks experts that Transformers has divided among the ranks; `lockstep.join` takes over their model."""

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        experts._lockstep_divided_over = ep_mesh.get_group()

    def __call__(self, *_: Any) -> Any:
        """Calls outside `join` end here."""
        raise RuntimeError("the experts of this model are spread over the ranks: call it inside lockstep.join(model)")


expert_parallel.EPImplementationInterface.register("lockstep", LockstepEP)
