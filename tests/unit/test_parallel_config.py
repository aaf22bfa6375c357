import json
from dataclasses import FrozenInstanceError, asdict

import numpy as np
import pytest

from lockstep import ConfigurationError, ParallelConfig


def test_one_rank_is_the_default():
    config = ParallelConfig()
    assert (config.world_size, config.rank) == (1, 0)


def test_tensor_parallel_ranks_of_one_data_parallel_rank_are_neighbours():
    ranks = [ParallelConfig(3, dp_rank, 2, tp_rank).rank for dp_rank in range(3) for tp_rank in range(2)]
    assert ranks == [0, 1, 2, 3, 4, 5]
    assert ParallelConfig(3, 0, 2, 0).world_size == 6


def test_a_config_is_an_immutable_value_of_plain_integers():
    config = ParallelConfig(np.int64(2), np.int64(1))
    assert config == ParallelConfig(2, 1)
    assert hash(config) == hash(ParallelConfig(2, 1))
    assert json.loads(json.dumps(asdict(config)))["data_parallel_rank"] == 1
    with pytest.raises(FrozenInstanceError):
        config.data_parallel_rank = 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_parallel_size": 0}, "data_parallel_size must be >= 1, got 0"),
        (
            {"data_parallel_size": 2, "data_parallel_rank": 2},
            "data_parallel_rank must be below data_parallel_size 2, got 2",
        ),
        ({"data_parallel_rank": -1}, "data_parallel_rank must be >= 0, got -1"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size must be an integer, got True"),
        ({"tensor_parallel_rank": 1}, "tensor_parallel_rank must be below tensor_parallel_size 1, got 1"),
        ({"data_parallel_size": "2"}, "data_parallel_size must be an integer, got '2'"),
    ],
)
def test_what_cannot_work_together_is_named(arguments, message):
    with pytest.raises(ConfigurationError, match=f"^{message}$"):
        ParallelConfig(**arguments)
