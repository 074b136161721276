"""Trains the pocket model and writes its checkpoint: python -m longreach.engine.pocket.train OUT

Stages from short documents that are nearly all facts to long ones that are nearly all filler:
recall is learned where most tokens reward it, and then stretched. Trained on long documents from
the start, the model learns nothing. The last stages go beyond one dual chunk. An interrupted run
goes on where the last stage ended when it is started again with the same folder.
"""

import argparse
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .corpus import Stage, make_batch
from .export import write_checkpoint
from .model import PocketQwen2, PocketSizes

# Four dual chunks at the end. Every batch has as many tokens, so that layers compile once.
_LONG = Stage(7168, 18, 500, filler=(0.7, 1.0), questions=12, most_facts=24)
STAGES = (
    Stage(256, 504, 1200, filler=(0.0, 0.3), questions=3, most_facts=6),
    Stage(512, 252, 800, filler=(0.2, 0.6), questions=4, most_facts=8),
    Stage(1024, 126, 1000, filler=(0.4, 0.9), questions=5, most_facts=10),
    Stage(2048, 63, 3000, filler=(0.6, 1.0), questions=6, most_facts=12),
    *(_LONG, _LONG, _LONG),
)
SPARSE_BUDGET = (64, 128)
"""Verticals and slashes of every head; what larger ones change is in EXPERIMENTS.md."""

_PEAK_RATE = 1.5e-3
_LAST_RATE = 2e-5
_WARM_UP = 200
_OTHER_WEIGHT = 0.1
_MOST_TEMPERATURE = 2.7
_EVALUATION_SEED = 1_000_000


@dataclass(frozen=True)
class Score:
    """On text not trained on: nats a recalled token, and the share of values recalled whole."""

    loss: float
    exact: float


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """The batches of a stage, each made where it is asked for."""

    def __init__(self, stage: Stage, seed: int, first_step: int) -> None:
        self._stage, self._seed, self._first_step = stage, seed, first_step

    def __len__(self) -> int:
        return self._stage.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        batch = make_batch(self._stage, self._seed, self._first_step + step)
        return torch.from_numpy(batch.tokens), torch.from_numpy(batch.recalled)


class Trainer:
    """Trains through the stages; `folder` holds what an interrupted run goes on from.

    Args:
        workers: processes that make batches; with none they are made in between.
        total_steps: over which the learning rate falls; those of all stages, if not given.
    """

    def __init__(
        self,
        folder: Path,
        stages: tuple[Stage, ...] = STAGES,
        sizes: PocketSizes | None = None,
        seed: int = 0,
        workers: int = 0,
        total_steps: int | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self._folder, self._stages, self._seed, self._workers = folder, stages, seed, workers
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = PocketQwen2(sizes or PocketSizes()).to(self._device)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
            lr=_PEAK_RATE, betas=(0.9, 0.95), fused=self._device.type == "cuda",
        )  # fmt: skip
        self._total_steps = total_steps or sum(stage.steps for stage in stages)
        self._finished_stages = 0
        if self._device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            self.model.compile_layers()

    def run(self) -> None:
        """Train all stages that are not finished; writes the checkpoint after each."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._restore()
        for number in range(self._finished_stages, len(self._stages)):
            stage = self._stages[number]
            self._train(stage, sum(each.steps for each in self._stages[:number]))
            score = self.evaluate(stage)
            print(f"stage {number}: loss {score.loss:.4f}, exact {score.exact:.4f}", flush=True)
            self._finished_stages = number + 1
            self._save()
            self._export()

    def _export(self) -> None:
        sizes = self.model.sizes
        budgets = [[SPARSE_BUDGET] * sizes.num_heads] * sizes.num_layers
        write_checkpoint(self._folder / "checkpoint", self.model.state_dict(), sizes, budgets)

    @torch.inference_mode()
    def evaluate(self, stage: Stage, batches: int = 4) -> Score:
        """On documents of a stage's kind that training never sees."""
        losses, exact = [], []
        for tokens, recalled in self._loader(replace(stage, steps=batches), _EVALUATION_SEED, 0):
            logits = self._forward(tokens, 1.0)
            targets, weights = _targets(tokens, recalled)
            losses.append(functional.cross_entropy(logits[weights].float(), targets[weights]))
            right = logits.argmax(-1) == targets
            exact.append(_share_of_whole_runs(right, weights))
        return Score(float(torch.stack(losses).mean()), sum(exact) / len(exact))

    def _train(self, stage: Stage, first_step: int) -> None:
        chance = random.Random(f"{self._seed}/{first_step}")
        started = time.perf_counter()
        recalled_losses: list[Tensor] = []
        for step, (tokens, recalled) in enumerate(self._loader(stage, self._seed, first_step), 1):
            for group in self._optimizer.param_groups:
                group["lr"] = self._rate(first_step + step)
            logits = self._forward(tokens, _temperature(chance, stage))
            recalled_loss, other_loss = _losses(logits, *_targets(tokens, recalled))
            (recalled_loss + _OTHER_WEIGHT * other_loss).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            recalled_losses.append(recalled_loss.detach())
            if step % 100 == 0 or step == stage.steps:
                mean = float(torch.stack(recalled_losses).mean())
                recalled_losses.clear()
                seconds = time.perf_counter() - started
                print(
                    f"length {stage.length} step {step}: recalled {mean:.4f}, "
                    f"other {float(other_loss.detach()):.4f}, {seconds:.0f} s",
                    flush=True,
                )

    def _forward(self, tokens: Tensor, temperature: float) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16):
            return self.model(tokens.long(), temperature)

    def _loader(self, stage: Stage, seed: int, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _Batches(stage, seed, first_step),
            batch_size=None,
            num_workers=min(self._workers, stage.steps),
            prefetch_factor=8 if self._workers else None,
            pin_memory=self._device.type == "cuda",
        )
        for tokens, recalled in loader:
            yield (
                tokens.to(self._device, non_blocking=True),
                recalled.to(self._device, non_blocking=True),
            )

    def _rate(self, step: int) -> float:
        """Warm-up, then a cosine over all stages."""
        if step < _WARM_UP:
            return _PEAK_RATE * step / _WARM_UP
        done = (step - _WARM_UP) / max(1, self._total_steps - _WARM_UP)
        return _LAST_RATE + (_PEAK_RATE - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))

    @property
    def _state_file(self) -> Path:
        return self._folder / "state.pt"

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "finished_stages": self._finished_stages,
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
        self._finished_stages = state["finished_stages"]
        print(f"going on after stage {self._finished_stages - 1}", flush=True)


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
    return (each * weights).sum() / weights.sum(), (each * others).sum() / others.sum()


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
    arguments = parser.parse_args()
    Trainer(arguments.folder, seed=arguments.seed, workers=arguments.workers).run()


if __name__ == "__main__":
    main()
