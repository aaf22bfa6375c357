from dataclasses import dataclass

from lockstep.errors import ConfigurationError
from lockstep.metadata.sizes import check_int


@dataclass(frozen=True)
class ParallelConfig:
    """The number of data-parallel and tensor-parallel ranks, and this rank's place among them.

    The experts are spread over all `data_parallel_size * tensor_parallel_size` ranks, tensor-parallel ranks of one
    data-parallel rank next to each other.

    Args:
        data_parallel_size: ranks with tokens of their own, >= 1.
        data_parallel_rank: this rank's place among them, `0..data_parallel_size - 1`.
        tensor_parallel_size: ranks that share one data-parallel rank's tokens, >= 1.
        tensor_parallel_rank: this rank's place among those, `0..tensor_parallel_size - 1`.

    Raises:
        ConfigurationError: if a size is below 1, a rank is not below its size, or one of them is not an integer.

    Example:
        >>> ParallelConfig(data_parallel_size=3, data_parallel_rank=2, tensor_parallel_size=2).rank
        4
    """

    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    tensor_parallel_size: int = 1
    tensor_parallel_rank: int = 0

    def __post_init__(self) -> None:
        for kind in ("data_parallel", "tensor_parallel"):
            size = check_int(f"{kind}_size", getattr(self, f"{kind}_size"), 1)
            rank = check_int(f"{kind}_rank", getattr(self, f"{kind}_rank"))
            if rank >= size:
                raise ConfigurationError(f"{kind}_rank must be below {kind}_size {size}, got {rank}")
            # Plain ints, even if NumPy integers were passed: they are compared, printed and sent as JSON.
            object.__setattr__(self, f"{kind}_size", size)
            object.__setattr__(self, f"{kind}_rank", rank)

    @property
    def world_size(self) -> int:
        """All ranks together: `data_parallel_size * tensor_parallel_size`."""
        return self.data_parallel_size * self.tensor_parallel_size

    @property
    def rank(self) -> int:
        """This rank's place among all ranks, which is its expert-parallel rank."""
        return self.data_parallel_rank * self.tensor_parallel_size + self.tensor_parallel_rank


# The constructor is made by dataclass, without a docstring; readers of ours show the constructor's as that of `new`.
ParallelConfig.__init__.__doc__ = ParallelConfig.__doc__
