"""A model over Ray actors, each with another number of prompts: python examples/ray_actors.py [CHECKPOINT [ACTORS]]"""

import os
import socket
import sys
import tempfile

import ray

import lockstep
from lockstep.models.tiny import make_tiny


@ray.remote
class Rank:
    """One rank of the model: an actor, placed where Ray finds room; on GPUs, @ray.remote(num_gpus=1)."""

    def free_address(self):
        """This actor's host and a free port, for rank 0 to be met at."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def load(self, rank, num_ranks, address, path):
        """What torchrun would have set, then the model. Collective over all actors."""
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(num_ranks),
            LOCAL_RANK="0",
            MASTER_ADDR=address[0],
            MASTER_PORT=str(address[1]),
        )
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = lockstep.from_pretrained(path)

    def generate(self, prompts):
        """Texts of this actor's prompts, none too. Collective: call it on all actors."""
        texts = []
        with lockstep.join(self.model):
            for prompt in prompts:
                inputs = self.tokenizer(prompt, return_tensors="pt")
                tokens = self.model.generate(**inputs, max_new_tokens=8, do_sample=False)
                texts.append(self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]))
        return texts


def main(path, num_ranks):
    ray.init(include_dashboard=False)
    actors = [Rank.remote() for _ in range(num_ranks)]
    address = ray.get(actors[0].free_address.remote())
    ray.get([actor.load.remote(rank, num_ranks, address, path) for rank, actor in enumerate(actors)])
    for round_number in range(2):
        shares = [[f"Prompt {number} of rank {rank}: " for number in range(3 * rank)] for rank in range(num_ranks)]
        answers = ray.get([actor.generate.remote(share) for actor, share in zip(actors, shares, strict=True)])
        for rank, texts in enumerate(answers):
            for text in texts:
                print(f"round {round_number}, rank {rank}: {text!r}")


if __name__ == "__main__":
    main(
        sys.argv[1] if len(sys.argv) > 1 else str(make_tiny(tempfile.mkdtemp())),
        int(sys.argv[2]) if len(sys.argv) > 2 else 2,
    )
