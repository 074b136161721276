"""Trains the pocket model and writes its checkpoint: python -m longreach.lab.pocket.train OUT

Stages from short documents that are nearly all facts to long ones that are nearly all filler:
recall is learned where most tokens reward it, and then stretched. Trained on long documents from
the start, the model learns nothing. The last stages go beyond one dual chunk, and are gone through
again in cycles. An interrupted run goes on where its state was last saved when it is started again
with the same folder.
"""

import argparse
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...engine.model.compute_type import compute_dtype
from .corpus import Stage, make_batch
from .export import ORIGINAL_LENGTH, write_checkpoint
from .model import PocketQwen2, PocketSizes


@dataclass(frozen=True)
class Cycle:
    """Stages under one rate: it warms up to its peak, then falls straight to nearly nothing."""

    peak_rate: float
    warm_up: int
    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        """Of all its stages."""
        return sum(stage.steps for stage in self.stages)

    def rate(self, step: int) -> float:
        """Of a step that is counted from the cycle's first, which is 1."""
        if step < self.warm_up:
            return self.peak_rate * step / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.peak_rate + (_LAST_RATE - self.peak_rate) * done


def _far_stages(*steps: int) -> tuple[Stage, ...]:
    """Beyond one dual chunk: 4, 8, 18, 36 and 72 of them, and one again before the longest two.

    Every batch has as many tokens, so that layers compile once.
    """
    four, eight, eighteen, one, thirty_six, seventy_two = steps
    return (
        Stage(7168, 18, four, (0.7, 1.0), questions=20, most_facts=32, tail=1792, near=0.3),
        Stage(14336, 9, eight, (0.7, 1.0), questions=32, most_facts=48, tail=1792, near=0.5),
        Stage(32256, 4, eighteen, (0.8, 1.0), questions=48, most_facts=64, tail=1792, near=0.5),
        Stage(2048, 63, one, filler=(0.6, 1.0), questions=6, most_facts=12),
        Stage(64512, 2, thirty_six, (0.9, 1.0), questions=96, most_facts=160, tail=1792, near=0.8),
        Stage(
            129024, 1, seventy_two, (0.9, 1.0), questions=128, most_facts=192, tail=1792, near=1.0
        ),
    )


_NEAR_STAGES = (
    Stage(256, 504, 1000, filler=(0.0, 0.3), questions=3, most_facts=6),
    Stage(512, 252, 600, filler=(0.2, 0.6), questions=4, most_facts=8),
    Stage(1024, 126, 800, filler=(0.4, 0.9), questions=5, most_facts=10),
    Stage(2048, 63, 1600, filler=(0.6, 1.0), questions=6, most_facts=12),
)
CYCLES = (
    Cycle(1.5e-3, 200, _NEAR_STAGES + _far_stages(1000, 700, 400, 100, 300, 350)),
    Cycle(4e-4, 100, 2 * _far_stages(500, 300, 200, 100, 200, 400)),
)
SPARSE_BUDGET = (64, 128)
"""Verticals and slashes of every head, for `longreach eval calibrate` to begin with."""

_LAST_RATE = 1e-5
_OTHER_WEIGHT = 0.1
_MOST_TEMPERATURE = 1.6
"""A million tokens are served at 1.46 (`ORIGINAL_LENGTH`)."""
_EVALUATION_SEED = 1_000_000
_SAVE_EVERY = 400
_LOG_EVERY = 100
_FAR_CHUNKS = 6
"""Last dual chunks of a document read near that see all of it: they hold the questions."""
_FEWEST_RECALLED = 200
"""Recalled tokens that a batch counts as at least, so that a single answer does not make a step."""


@dataclass(frozen=True)
class Score:
    """On text not trained on: nats a recalled token, and the share of values recalled whole."""

    loss: float
    exact: float


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """The batches of some steps, each made where it is asked for."""

    def __init__(self, stage: Stage, seed: int, steps: range) -> None:
        self._stage, self._seed, self._steps = stage, seed, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        batch = make_batch(self._stage, self._seed, self._steps[index])
        return torch.from_numpy(batch.tokens), torch.from_numpy(batch.recalled)


class Trainer:
    """Trains through the stages; `folder` holds what an interrupted run goes on from.

    Args:
        workers: processes that make batches; with none they are made in between.
    """

    def __init__(
        self,
        folder: Path,
        cycles: tuple[Cycle, ...] = CYCLES,
        sizes: PocketSizes | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self._folder, self._cycles, self._seed, self._workers = folder, cycles, seed, workers
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._narrow = compute_dtype("auto", self._device) == torch.bfloat16
        self.model = PocketQwen2(sizes or PocketSizes()).to(self._device)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
            betas=(0.9, 0.95), fused=self._device.type == "cuda",
        )  # fmt: skip
        self._stages = tuple(stage for cycle in cycles for stage in cycle.stages)
        self._total_steps = sum(cycle.steps for cycle in cycles)
        self._step = 0
        if self._device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            self.model.compile_layers()

    def run(self, seconds: float = math.inf) -> None:
        """Train all steps that are not done; writes the checkpoint after each stage.

        What is trained does not depend on time, but when it is up, the run ends with the step that
        it is at, and saves what it has.
        """
        deadline = time.perf_counter() + seconds
        self._folder.mkdir(parents=True, exist_ok=True)
        self._restore()
        end = 0
        for number, stage in enumerate(self._stages):
            end += stage.steps
            if self._step >= end:
                continue
            self._train(stage, end, deadline)
            self._save()
            self._export()
            if self._step < self._total_steps and time.perf_counter() > deadline:
                print(f"time is up after step {self._step} of {self._total_steps}", flush=True)
                return
            score = self.evaluate(stage)
            print(f"stage {number}: loss {score.loss:.4f}, exact {score.exact:.4f}", flush=True)

    def _export(self) -> None:
        sizes = self.model.sizes
        budgets = [[SPARSE_BUDGET] * sizes.num_heads] * sizes.num_layers
        write_checkpoint(self._folder / "checkpoint", self.model.state_dict(), sizes, budgets)

    @torch.inference_mode()
    def evaluate(self, stage: Stage, batches: int = 8) -> Score:
        """On documents of a stage's kind that training never sees, at the served temperature."""
        losses, exact = [], []
        temperature = max(1.0, 0.1 * math.log(stage.length / ORIGINAL_LENGTH) + 1) ** 2
        for tokens, recalled in self._loader(stage, _EVALUATION_SEED, range(batches)):
            logits = self._forward(tokens, temperature)
            targets, weights = _targets(tokens, recalled)
            losses.append(functional.cross_entropy(logits[weights].float(), targets[weights]))
            right = logits.argmax(-1) == targets
            exact.append(_share_of_whole_runs(right, weights))
        return Score(float(torch.stack(losses).mean()), sum(exact) / len(exact))

    def _train(self, stage: Stage, end: int, deadline: float) -> None:
        """Go on until a step, or until time is up."""
        started, first_step = time.perf_counter(), self._step
        recalled_losses: list[Tensor] = []
        for tokens, recalled in self._loader(stage, self._seed, range(self._step, end)):
            self._step += 1
            recalled_loss, other_loss = self._advance(stage, tokens, recalled)
            recalled_losses.append(recalled_loss)
            is_last = self._step == end or time.perf_counter() > deadline
            if self._step % _LOG_EVERY == 0 or is_last:
                mean = float(torch.stack(recalled_losses).mean())
                recalled_losses.clear()
                each = (time.perf_counter() - started) / (self._step - first_step)
                print(
                    f"length {stage.length} step {self._step}/{self._total_steps}: "
                    f"recalled {mean:.4f}, other {float(other_loss):.4f}, {1e3 * each:.0f} ms each",
                    flush=True,
                )
            if is_last:
                return
            if self._step % _SAVE_EVERY == 0:
                self._save()

    def _advance(self, stage: Stage, tokens: Tensor, recalled: Tensor) -> tuple[Tensor, Tensor]:
        """One step; returns the losses of recalled and of other tokens."""
        chance = random.Random(f"{self._seed}/{self._step}")
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(self._step)
        temperature = _temperature(chance, stage)
        far_chunks = _FAR_CHUNKS if chance.random() < stage.near else None
        logits = self._forward(tokens, temperature, far_chunks)
        recalled_loss, other_loss = _losses(logits, *_targets(tokens, recalled))
        (recalled_loss + _OTHER_WEIGHT * other_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return recalled_loss.detach(), other_loss.detach()

    def _forward(self, tokens: Tensor, temperature: float, far_chunks: int | None = None) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._narrow):
            return self.model(tokens.long(), temperature, far_chunks)

    def _loader(self, stage: Stage, seed: int, steps: range) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _Batches(stage, seed, steps),
            batch_size=None,
            num_workers=min(self._workers, len(steps)),
            prefetch_factor=8 if self._workers else None,
            pin_memory=self._device.type == "cuda",
        )
        for tokens, recalled in loader:
            yield (
                tokens.to(self._device, non_blocking=True),
                recalled.to(self._device, non_blocking=True),
            )

    def _rate(self, step: int) -> float:
        for cycle in self._cycles[:-1]:
            if step <= cycle.steps:
                return cycle.rate(step)
            step -= cycle.steps
        return self._cycles[-1].rate(step)

    @property
    def _state_file(self) -> Path:
        return self._folder / "state.pt"

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self._step,
        }
        partial = self._state_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._state_file)

    def _restore(self) -> None:
        if not self._state_file.exists():
            return
        state = torch.load(self._state_file, map_location=self._device)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._step = state["step"]
        print(f"going on after step {self._step}", flush=True)


def _temperature(chance: random.Random, stage: Stage) -> float:
    """Half of the steps see attention sharpened as a long prompt's will be."""
    if stage.filler[0] == 0 or chance.random() < 0.5:
        return 1.0
    return math.exp(chance.uniform(0, math.log(_MOST_TEMPERATURE)))


def _targets(tokens: Tensor, recalled: Tensor) -> tuple[Tensor, Tensor]:
    """Each position's next token, int64 [n], and whether it is recalled, bool [n]."""
    following = torch.roll(recalled, -1, 1)
    following[:, -1] = False
    return torch.roll(tokens, -1, 1).long().flatten(), following.flatten()


def _losses(logits: Tensor, targets: Tensor, recalled: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss over recalled tokens, and over the others."""
    each = functional.cross_entropy(logits.float(), targets, reduction="none")
    weights = recalled.float()
    others = 1 - weights
    fewest = weights.sum().clamp(min=_FEWEST_RECALLED)
    return (each * weights).sum() / fewest, (each * others).sum() / others.sum()


def _share_of_whole_runs(right: Tensor, recalled: Tensor) -> float:
    """The share of runs of recalled tokens in which every token is right."""
    starts = recalled & ~torch.roll(recalled, 1)
    run = torch.cumsum(starts, 0)[recalled] - 1
    wrong = torch.zeros(int(starts.sum()), device=right.device)
    wrong.index_add_(0, run, (~right[recalled]).float())
    return float((wrong == 0).float().mean())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the pocket model.")
    parser.add_argument("folder", type=Path, help="where state and checkpoint are written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=(os.cpu_count() or 1) - 1)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end early, with what is trained by then"
    )
    arguments = parser.parse_args()
    trainer = Trainer(arguments.folder, seed=arguments.seed, workers=arguments.workers)
    trainer.run(60 * arguments.minutes)


if __name__ == "__main__":
    main()
