# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Optimiser steps the long way, for comparison: the plain model, one row after the other, whole
logits, formulas as they are written in the paper, autograd, and AdamW by hand.

Of scripts/visual_opsd only the rows and the latents of their pictures are used. Completions are
not sampled again: they are given, and must be as probable under the weights of their step as their
sampler said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from data.packing import pack
from data.randomness import noise_generator, row_generator
from data.sequence import Completion, Context, ImageSegment, PixelSegment
from modeling import load_bagel
from modeling.autoencoder import AutoEncoder, load_autoencoder
from modeling.bagel.bagel import Bagel
from scripts.visual_opsd.rows import TrainRow, encode_pictures
from tests.conftest import TINY_BAGEL
from tests.visual_opsd.training.step_cases import Recipe, Run, other_head

DRAWING = ("_moe_gen", "vae2llm", "llm2vae", "time_embedder", "latent_pos_embed")


@dataclass(frozen=True)
class Figures:
    """Of one step; sampler_gap: mean distance from the sampler's log-probabilities."""

    loss: float
    grad_norm: float
    lr: float
    sampler_gap: float
    ce: float
    divergence: float
    mse: float


class StepOracle:
    """Student, teacher, moments."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.steps, self.updates = recipe, 0, 0
        bundle = load_bagel(TINY_BAGEL, visual_gen=recipe.draws)
        self.student, self.special = bundle.model, bundle.special_tokens
        self.teacher: Bagel | None = None
        self.vae: AutoEncoder | None = None
        if recipe.reads_latents:
            self.vae = load_autoencoder(TINY_BAGEL)
        if recipe.with_teacher:
            self.teacher = self.student
            if recipe.teacher_mode != "self":
                self.teacher = load_bagel(TINY_BAGEL, visual_gen=recipe.reads_latents).model
        if recipe.other_head:
            assert self.teacher is not None
            with torch.no_grad():
                head = self.teacher.language_model.lm_head.weight
                head.copy_(other_head(head))
        self.trained = {n: p for n, p in self.student.named_parameters() if self._trains(n)}
        self.exp_avg = {n: torch.zeros_like(p) for n, p in self.trained.items()}
        self.exp_avg_sq = {n: torch.zeros_like(p) for n, p in self.trained.items()}

    def _trains(self, name: str) -> bool:
        if name in ("vit_pos_embed.pos_embed", "latent_pos_embed.pos_embed"):
            return False  # fixed tables
        if self.recipe.freeze_vit and name.startswith("vit_model."):
            return False
        return self.recipe.draws or not any(part in name for part in DRAWING)

    def state(self) -> dict[str, Tensor]:
        """As `step_cases.final_state`."""
        found = {f"student/{k}": v for k, v in self.student.state_dict().items()}
        if self.teacher is not None and self.teacher is not self.student:
            found |= {f"teacher/{k}": v for k, v in self.teacher.state_dict().items()}
        found |= {f"exp_avg/{k}": v for k, v in self.exp_avg.items()}
        return found | {f"exp_avg_sq/{k}": v for k, v in self.exp_avg_sq.items()}

    # ---------------------------------------------------------------------------- contexts

    def _student_context(self, row: TrainRow, completion: Completion | None) -> Context:
        if self.recipe.draws:
            assert self.vae is not None
            generator = row_generator("interleaved", self.recipe.global_seed, row.position)
            shift = self.recipe.timestep_shift
            return encode_pictures(row.student, self.vae, generator, time_shift=shift)
        return (*row.student, *(row.targets if completion is None else (completion.segment(),)))

    def _teacher_context(self, row: TrainRow, completion: Completion) -> Context:
        """What the student has, the visual thoughts, the completion."""
        seed, position = self.recipe.global_seed, row.position
        assert row.teacher is not None
        shown: Context = row.teacher[len(row.student) :]
        if self.recipe.noise_vt:
            shown = _noise(shown, noise_generator(seed, position))
        if self.vae is not None:
            shown = encode_pictures(shown, self.vae, row_generator("teacher", seed, position))
        return (*row.student, *shown, completion.segment())

    def _blind(self, row: TrainRow, teacher: Context) -> Context:
        """The teacher's context without the visual thoughts."""
        own = teacher[len(row.student) :]
        return (*row.student, *(s for s in own if not isinstance(s, ImageSegment)))

    # ---------------------------------------------------------------------------- one step

    def step(self, rows: Sequence[TrainRow], taken: Sequence[Completion | None]) -> Figures:
        """One optimiser step on some rows and their completions (None: on their own texts)."""
        recipe = self.recipe
        pairs = list(zip(rows, taken, strict=True))
        students = [self._student_context(row, completion) for row, completion in pairs]
        completions = [completion for completion in taken if completion is not None]
        for row, completion in pairs:
            if completion is not None and completion.given:
                (trace,) = row.targets
                assert completion.ids == trace.ids[: len(completion.ids)] != ()
        logits, labels, errors, counts = self._forward(students)
        ce = -logits.log_softmax(-1)[torch.arange(len(labels)), labels]
        mse, apart, theirs = logits.new_zeros(()), torch.zeros_like(ce), None
        if errors is not None:
            mse = errors.mean()
        if self.teacher is not None:
            with torch.no_grad():
                teachers = [self._teacher_context(row, c) for row, c in pairs if c is not None]
                theirs = torch.cat([self._logits(self.teacher, context)[0] for context in teachers])
                if recipe.contrast:
                    both = zip(rows, teachers, strict=True)
                    blind = [self._blind(row, context) for row, context in both]
                    without = torch.cat([self._logits(self.teacher, c)[0] for c in blind])
                    log_p, log_q = theirs.log_softmax(-1), without.log_softmax(-1)
                    theirs = log_p + recipe.contrast * (log_p - log_q)
            apart = divergence(logits, theirs, labels, recipe)
        weights = weights_of_tokens(logits.detach(), theirs, labels, counts, recipe)
        tokens = weights * (recipe.ce_weight * ce + recipe.jsd_weight * apart)
        loss = tokens.mean() + recipe.mse_weight * mse
        grads = dict(
            zip(
                self.trained,
                torch.autograd.grad(loss, list(self.trained.values()), materialize_grads=True),
                strict=True,
            )
        )
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        assert norm > 2 * recipe.max_grad_norm, "the clip must bind, or nothing is seen of it"
        gap = self._gap(logits.detach(), labels, completions) if completions else 0.0
        whole, *parts = (float(v.detach()) for v in (loss, ce.mean(), apart.mean(), mse))
        figures = Figures(whole, norm, self._rate(), gap, *parts)
        self.steps += 1
        if self.steps - 1 == recipe.skipped:  # the schedule goes on, nothing else does
            return replace(figures, loss=math.nan)
        self._adamw({n: g * (recipe.max_grad_norm / norm) for n, g in grads.items()}, figures.lr)
        if recipe.with_teacher and recipe.teacher_mode == "ema":
            self._average()
        return figures

    def _forward(
        self, contexts: Sequence[Context]
    ) -> tuple[Tensor, Tensor, Tensor | None, list[int]]:
        """Logits (S, V), labels (S,), and the squared error of each noised latent, of all rows;
        labels of each row."""
        found = [self._logits(self.student, context) for context in contexts]
        errors = [error for _, _, error in found if error is not None]
        logits = torch.cat([row[0] for row in found])
        labels = torch.cat([row[1] for row in found])
        counts = [len(row[1]) for row in found]
        return logits, labels, torch.cat(errors) if errors else None, counts

    def _logits(self, model: Bagel, context: Context) -> tuple[Tensor, Tensor, Tensor | None]:
        batch = pack([context], self.special)
        if not self.recipe.draws:
            return model(batch, head=F.linear).double(), batch.score_labels, None
        logits, velocity = model(batch, head=F.linear, flow_head=lambda velocity: velocity)
        assert batch.latents is not None
        errors = (velocity - batch.latents.velocity_targets).double().square().mean(-1)
        return logits.double(), batch.score_labels, errors

    def _rate(self) -> float:
        """Linear from lr / warmup_steps to lr, then half a cosine down to min_lr at the last."""
        recipe, step = self.recipe, self.steps
        if step < recipe.warmup_steps:
            return recipe.lr * (step + 1) / recipe.warmup_steps
        if recipe.lr_scheduler == "constant":
            return recipe.lr
        done = (step - recipe.warmup_steps) / (recipe.total_steps - 1 - recipe.warmup_steps)
        return recipe.min_lr + (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * done)) / 2

    @torch.no_grad()
    def _adamw(self, grads: dict[str, Tensor], rate: float) -> None:
        """Loshchilov and Hutter: decay apart from the gradient, moments free of their bias."""
        recipe = self.recipe
        self.updates += 1
        for name, parameter in self.trained.items():
            m, v, grad = self.exp_avg[name], self.exp_avg_sq[name], grads[name]
            m.copy_(recipe.beta1 * m + (1 - recipe.beta1) * grad)
            v.copy_(recipe.beta2 * v + (1 - recipe.beta2) * grad * grad)
            first = m / (1 - recipe.beta1**self.updates)
            second = v / (1 - recipe.beta2**self.updates)
            step = first / (second.sqrt() + recipe.eps)
            parameter.copy_(parameter - rate * recipe.weight_decay * parameter - rate * step)

    @torch.no_grad()
    def _average(self) -> None:
        assert self.teacher is not None
        averages, d = dict(self.teacher.named_parameters()), self.recipe.ema_decay
        for name, parameter in self.trained.items():
            averages[name].copy_(d * averages[name] + (1 - d) * parameter)

    def _gap(self, logits: Tensor, labels: Tensor, completions: Sequence[Completion]) -> float:
        """Distance of the student's log-probabilities at this step from the sampler's."""
        drawn = torch.tensor([p for c in completions for p in c.logprobs], dtype=torch.float64)
        ours = torch.tensor([not c.given for c in completions for _ in range(c.count)])
        at = (logits / self.recipe.sample_temperature).log_softmax(-1)
        return float((at[torch.arange(len(labels)), labels][ours] - drawn).abs().mean())


def recompute(recipe: Recipe, run: Run) -> tuple[StepOracle, list[Figures]]:
    """All steps of a run, on its completions."""
    oracle, figures = StepOracle(recipe), []
    for rows, taken in zip(run.rows, run.taken, strict=True):
        assert [row.name for row in rows] == [name for name, _ in taken]
        figures.append(oracle.step(rows, [completion for _, completion in taken]))
    return oracle, figures


def _noise(shown: Context, generator: torch.Generator) -> Context:
    """Standard normal numbers for each visual thought: its patches, then its pixels before them."""
    noisy = list(shown)
    for place, segment in enumerate(shown):
        if isinstance(segment, ImageSegment):
            patches = torch.randn(segment.patches.shape, generator=generator)
            noisy[place] = replace(segment, patches=patches)
            before = shown[place - 1]
            if isinstance(before, PixelSegment):
                pixels = torch.randn(before.pixels.shape, generator=generator)
                noisy[place - 1] = replace(before, pixels=pixels)
    return tuple(noisy)


def weights_of_tokens(
    student: Tensor, teacher: Tensor | None, labels: Tensor, counts: Sequence[int], recipe: Recipe
) -> Tensor:
    """What each scored row counts, with mean 1 over each completion: (S,)."""
    temperature, first = recipe.jsd_temperature, 0
    at = torch.arange(len(labels)), labels
    s = (student / temperature).softmax(-1)
    values = torch.ones(len(labels), dtype=torch.float64)
    if recipe.token_weight == "entropy":
        values = -(s * s.log()).sum(-1)
    elif recipe.token_weight == "teacher_ahead":
        assert teacher is not None
        values = ((teacher / temperature).softmax(-1)[at].log() - s[at].log()).clamp(min=0)
    elif recipe.token_weight != "none":
        first = int(recipe.token_weight.removeprefix("early:"))
    weights = []
    for completion in values.split(list(counts)):
        place = torch.arange(len(completion))
        completion = completion * (place >= recipe.skip_first_tokens)
        if first:
            completion = completion * (place < first)
        weights.append(completion / completion.mean() if completion.any() else completion)
    return torch.cat(weights)


def divergence(student: Tensor, teacher: Tensor, labels: Tensor, recipe: Recipe) -> Tensor:
    """What each scored row adds: logits (S, V) of both in float64 -> (S,)."""
    temperature, k = recipe.jsd_temperature, recipe.jsd_top_k
    s, t = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    if recipe.jsd_loss_kind == "tinker":
        at = torch.arange(len(labels)), labels
        return -(t[at].log() - s[at].log()).detach() * s[at].log()
    if k:
        index = teacher.argsort(dim=-1, descending=True)[:, :k]
        s, t = s.gather(-1, index), t.gather(-1, index)
        if recipe.jsd_tail_bucket:
            s, t = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1) for p in (s, t))
        else:
            s, t = (p / p.sum(-1, keepdim=True) for p in (s, t))
    beta = recipe.jsd_beta
    if beta == 0:
        terms = t * (t / s).log()
    elif beta == 1:
        terms = s * (s / t).log()
    else:
        m = beta * t + (1 - beta) * s
        terms = beta * t * (t / m).log() + (1 - beta) * s * (s / m).log()
    clip = math.inf if recipe.jsd_token_clip is None else recipe.jsd_token_clip
    if recipe.jsd_clip_scope == "entry":
        rows = terms.clamp(max=clip).sum(-1)
    else:
        rows = terms.sum(-1).clamp(max=clip)
    return rows * temperature**2
