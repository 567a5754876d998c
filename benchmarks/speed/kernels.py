"""What each rewrite of `pamm.accelerate` gains on a whole network: the network with all of them, without one, without any.

    OMP_NUM_THREADS=2 python benchmarks/speed/kernels.py [--rounds 5] [--out kernels.json] [CASE ...]

All forms of a case share their parameters and take turns in one process, so that a busy machine slows all of them. A row
tells the median over the rounds of the seconds and of the processor's seconds (all threads), and the median over the rounds of
their ratios to the network with every rewrite. On a busy machine the processor's seconds are the steadier ones.

With --before FOLDER, another checkout's `src` folder, that version's network takes its turns too, in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from pamm.build import create_model

try:
    from pamm.config.experiment import TrainConfig
    from pamm.runtime.memory import keep_memory
except ImportError:  # an older version, measured with --before
    from pamm.experiment import TrainConfig
    from pamm.memory import keep_memory

TASKS = ("semseg", "human_parts", "sal", "normals", "edge")
"""PASCAL-Context's."""

CASES = {
    "prediction, ViT-B": ("pascal-pamm-b", (512, 512), False),
    "prediction, ViT-L": ("pascal-pamm-l", (512, 512), False),
    "prediction, released ViT-B": ("nyud-pamm-released-b", (448, 576), False),
    "training step, ViT-B": ("pascal-pamm-b", (512, 512), True),
    "training step, released ViT-B": ("nyud-pamm-released-b", (448, 576), True),
    "prediction, MTMamba": ("pascal-mtmamba", (512, 512), False),
    "training step, MTMamba": ("pascal-mtmamba", (512, 512), True),
}
"""Case → recipe, height and width, whether it is a training step (one image; forward, losses, backward, optimizer)."""


SLOW = 2.5
"""A form that takes so many times as long as the fastest is measured in the first round only."""


def built(recipe: str, training: bool) -> nn.Module:
    torch.manual_seed(0)
    return create_model(recipe, pretrained=False).train(training)


def step_of(
    model: nn.Module, size: tuple[int, int], training: bool, optimizer: torch.optim.Optimizer | None
) -> Callable[[], None]:
    """One prediction or training step on a random image."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, *size, generator=generator)

    def predict() -> None:
        with torch.inference_mode():
            model(image)

    if not training:
        return predict
    labels = {
        name: torch.randint(0, 2, (1, task.label_channels, *size), generator=generator).to(task.label_dtype)
        for name, task in model.tasks.items()
    }

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = model(image, size)
        sum(task.weight * task.loss(logits[name], labels[name]) for name, task in model.tasks.items()).backward()
        optimizer.step()

    return train


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    try:
        from pamm.training.optimizer import create_optimizer
    except ImportError:  # an older version
        from pamm.optimizer import create_optimizer
    return create_optimizer(model, TrainConfig())


def sharing(model: nn.Module) -> nn.Module:
    """Modules of its own, the same parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def forms_of(model: nn.Module, training: bool) -> dict[str, nn.Module]:
    """The network with every rewrite, without one of those that do something here, without any."""
    from pamm.kernels import REWRITES, accelerate
    from pamm.kernels.conv_head import SmallMapHead
    from pamm.models.pamm import ConvHead
    from pamm.nn.replace import replace_modules, taking_over

    class TorchHead(SmallMapHead):
        def suits_kernel(self, feature: torch.Tensor) -> bool:
            return False

    forms = {"all": sharing(model)}
    used = accelerate(forms["all"], training=training).replaced
    for rewrite in REWRITES:
        if any(name.startswith(rewrite.name) for name in used):
            forms[f"without {rewrite.name}"] = form = sharing(model)
            accelerate(form, training=training, rewrites=[other for other in REWRITES if other is not rewrite])
    if "heads" in used:
        forms["heads in torch"] = form = sharing(model)
        replace_modules(form, lambda module: taking_over(TorchHead, module, ConvHead))
        accelerate(form, training=training)
    return forms | {"none": model}


class Before:
    """Another version's network in a process of its own, which takes a step when it is asked to."""

    def __init__(self, source: str, case: str):
        command = [sys.executable, __file__, "--serve", case]
        environment = {**os.environ, "PYTHONPATH": source}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self) -> list[float]:
        print("step", file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(case: str) -> None:
    """Answer every line of standard input with what one step took."""
    recipe, size, training = CASES[case]
    model = built(recipe, training)
    run = step_of(model, size, training, optimizer_of(model) if training else None)
    for _ in sys.stdin:
        print(json.dumps(seconds(run)), flush=True)


def seconds(run: Callable[[], None]) -> list[float]:
    """Of the clock and of the processor."""
    start = time.perf_counter(), time.process_time()
    run()
    return [time.perf_counter() - start[0], time.process_time() - start[1]]


def measure(case: str, rounds: int, before: str | None) -> list[dict[str, object]]:
    """Rows of one case."""
    recipe, size, training = CASES[case]
    model = built(recipe, training)
    optimizer = optimizer_of(model) if training else None
    forms = forms_of(model, training)
    runs = {name: (lambda run=step_of(form, size, training, optimizer): seconds(run)) for name, form in forms.items()}
    other = Before(before, case) if before else None
    if other:
        runs["before"] = other
    for run in runs.values():  # once in vain: kernels are compiled, memory is taken
        run()
    taken: dict[str, list[list[float]]] = {name: [] for name in runs}
    for number in range(rounds):
        order = list(runs) if number % 2 == 0 else list(runs)[::-1]
        for name in order:
            if number == 0 or taken[name][0][1] < SLOW * taken["all"][0][1]:
                taken[name].append(runs[name]())
    if other:
        other.close()
    return [row_of(case, name, times, taken["all"]) for name, times in taken.items()]


def row_of(case: str, form: str, times: list[list[float]], whole: list[list[float]]) -> dict[str, object]:
    row: dict[str, object] = {"case": case, "form": form, "times": times}
    for index, kind in enumerate(("clock", "processor")):
        ratios = sorted(t[index] / w[index] for t, w in zip(times, whole, strict=False))
        row[kind] = statistics.median(t[index] for t in times)
        row[f"{kind} ratio"], row[f"{kind} ratios"] = statistics.median(ratios), [ratios[0], ratios[-1]]
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    own = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    own.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default all")
    own.add_argument("--rounds", type=int, default=5)
    own.add_argument("--before", metavar="SRC", help="src folder of another checkout, to measure beside this one")
    own.add_argument("--out", help="also write the rows to this JSON file")
    own.add_argument("--serve", help=argparse.SUPPRESS)
    plain = own.parse_args(arguments)
    keep_memory()
    if plain.serve:
        serve(plain.serve)
        return
    rows = []
    print("| case | form | seconds | ratio | from … to | processor's seconds | ratio | from … to |", flush=True)
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for case in plain.cases or CASES:
        for row in measure(case, plain.rounds, plain.before):
            cells = [case, str(row["form"])]
            for kind in ("clock", "processor"):
                low, high = row[f"{kind} ratios"]
                cells += [f"{row[kind]:.3f}", f"{row[f'{kind} ratio']:.2f}", f"{low:.2f} … {high:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
            rows.append(row)
    if plain.out:
        with open(plain.out, "w") as file:
            json.dump({"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
