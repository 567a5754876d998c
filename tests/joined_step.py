"""One optimizer step on one or two processes; writes losses, gradients and weights. Run by test_train.py.

Arguments: cache of the synthetic data, number of processes, loss scheme, output file.
"""

import sys
from pathlib import Path

import torch

from pamm.train import create_loop
from tiny import experiment

if __name__ == "__main__":
    root, devices, scheme, out = sys.argv[1:]
    settings = experiment(root, steps=1, batch=4, devices=int(devices), scheme=scheme)
    loop, loader = create_loop(settings, Path(out).with_suffix(""))
    losses, _ = loop.update(next(iter(loader)))
    if loop.fabric.is_global_zero:
        gradients = {name: p.grad for name, p in loop.network.named_parameters()}
        torch.save({"losses": losses, "gradients": gradients, "weights": loop.network.state_dict()}, out)
    loop.fabric.barrier()
    loop.close()
