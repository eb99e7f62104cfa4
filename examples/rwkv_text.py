"""Train transformers' RWKV-4 to write Python, character by character, without and with the one line that accelerates it."""

import argparse
import os
import pathlib
import time

import torch
from transformers import RwkvConfig, RwkvForCausalLM  # pip install transformers

from sdit_kernels.compat import rwkv

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("--steps", type=int, default=300, help="training steps of the accelerated model (default: %(default)s)")
steps, files = p.parse_args().steps, sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8).long()
torch.manual_seed(0)
model = RwkvForCausalLM(RwkvConfig(vocab_size=256, hidden_size=128, num_hidden_layers=4, bos_token_id=10, eos_token_id=None))
start = {name: value.clone() for name, value in model.state_dict().items()}


def train(steps):
    model.train().load_state_dict(start)
    model(text[None, :512], labels=text[None, :512]).loss.backward()  # the first call compiles kernels
    adam, draw, began = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0), time.perf_counter()
    for step in range(1, steps + 1):
        ids = text[torch.randint(len(text) - 512, (4, 1), generator=draw) + torch.arange(512)]
        loss = model(ids, labels=ids).loss
        adam.zero_grad(), loss.backward(), adam.step()
        print(f"\r{step:4}  loss {loss.item():.4f}  {1e3 * (time.perf_counter() - began) / step:.0f} ms a step", end="")
    print()


train(5)
print(rwkv.accelerate(model))  # the line that accelerates the model
train(5), train(steps)
print(bytes(model.eval().generate(torch.tensor([[*b"def "]]), max_new_tokens=200, do_sample=True)[0].tolist()).decode("latin"))
