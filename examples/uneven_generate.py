"""Another number of prompts on every rank: torchrun --nproc-per-node 2 examples/uneven_generate.py [CHECKPOINT]"""

import os
import sys
import tempfile

import transformers

import lockstep
from lockstep.models.tiny import make_tiny

rank = int(os.environ.get("RANK", "0"))
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
path = sys.argv[1] if len(sys.argv) > 1 else make_tiny(tempfile.mkdtemp())
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
model = lockstep.from_pretrained(path)

prompts = [f"Prompt {number} of rank {rank}: " for number in range(1 + 3 * rank)]
with lockstep.join(model):
    for prompt in prompts:
        output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        print(f"rank {rank}: {tokenizer.decode(output[0])!r}", flush=True)
