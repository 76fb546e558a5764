# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Faults of the objective: divergence, clip, temperature, the chunked form, the schedule."""

from __future__ import annotations

from tests.mutants import faults

FAULTS = [
    *faults("scripts/visual_opsd/opsd_loss.py", "visual_opsd/test_opsd_loss.py", [
        ("forward and reverse are exchanged", "return log_t.exp() * (log_t - log_s)",
         "return log_s.exp() * (log_s - log_t)"),
        ("the mixture has the student's weight",
         "torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))",
         "torch.logaddexp(log_s + math.log(beta), log_t + math.log1p(-beta))"),
        ("the two terms have each other's weight", "from_teacher = beta * log_t.exp()",
         "from_teacher = (1.0 - beta) * log_t.exp()"),
        ("no T squared", "return divergence * config.temperature**2", "return divergence"),
        ("T, not T squared", "return divergence * config.temperature**2",
         "return divergence * config.temperature"),
        ("the clip bounds from below too", "terms.clamp(max=config.token_clip)",
         "terms.clamp(min=-config.token_clip, max=config.token_clip)"),
        ("the top-k is the student's", "teacher_logits.topk(k, dim=-1).indices",
         "student_logits.topk(k, dim=-1).indices"),
        ("the advantage has a gradient", "advantage = (log_t - log_s).detach()",
         "advantage = log_t - log_s"),
        ("the tail holds everything", "log_p.scatter(-1, index, -math.inf).logsumexp",
         "log_p.logsumexp"),
        ("the mean is over all rows", "total / max(divergence.numel(), 1)",
         "total / max(student_logits[..., 0].numel(), 1)"),
        ("a k of the whole vocabulary is a top-k", "not 0 < self.top_k < vocab",
         "not 0 < self.top_k <= vocab"),
        ("computed in half precision", "torch.promote_types(logits.dtype, torch.float32)",
         "logits.dtype"),
    ]),
    *faults("scripts/visual_opsd/loss/chunked.py", "visual_opsd/loss/test_chunked.py", [
        ("only the last chunk teaches the head", "beta = 1.0 if part.start else 0.0", "beta = 0.0"),
        ("the cross-entropy has no weight", "losses = losses + config.ce_weight * found[",
         "losses = losses + found["),
        ("the divergence has no weight", "losses = config.jsd_weight * found[", "losses = found["),
        ("the gradient is not multiplied by what arrives",
         "[None if g is None else ctx.scale_gradient(g, grad_loss) for g in gradients]", "list(gradients)"),
        ("the teacher's head is the student's", "torch.mm(teacher[0][part], teacher[1].t(), out=",
         "torch.mm(teacher[0][part], head.t(), out="),
        ("the diagnostic's figures are the top-k's", "LossConfig(top_k=None, token_clip=None)",
         "LossConfig(token_clip=None)",
         "visual_opsd/loss/test_chunked.py visual_opsd/analysis/test_kl_diagnostic.py::"
         "test_baseline_matches_dense_arithmetic"),
        ("the diagnostic's JSD is clipped", "LossConfig(top_k=None, token_clip=None)",
         "LossConfig(top_k=None)",
         "visual_opsd/loss/test_chunked.py visual_opsd/analysis/test_kl_diagnostic.py::"
         "test_baseline_matches_dense_arithmetic"),
    ]),
    *faults("scripts/visual_opsd/loss/chunk.py", "visual_opsd/loss/test_chunked.py", [
        ("the cross-entropy is at T", "figures = [unit_lse - label_logit, entropy,",
         "figures = [lse - label_logit, entropy,"),
        ("a clipped entry has a gradient",
         "        slope = slope.masked_fill_(terms > clip, 0.0)\n", ""),
        ("a clipped token has a gradient",
         "        slope = slope.masked_fill_((rows > clip)[:, None], 0.0)\n", ""),
        ("the gradient lacks 1 / T", "return config.jsd_weight / config.temperature",
         "return config.jsd_weight"),
        ("the tail is not shared out", "exp_().mul_(slope[:, -1:])", "exp_().mul_(0.0)"),
        ("entropy is at T = 1 only", "figures = [unit_lse - label_logit, entropy,",
         "figures = [unit_lse - label_logit, entropy * config.temperature,"),
    ]),
    *faults("scripts/visual_opsd/training/step.py", "visual_opsd/training/test_step.py", [
        ("the first step's rate is 0", "return (step + 1) / optim.warmup_steps",
         "return step / optim.warmup_steps"),
        ("the floor is not reached", "optim.total_steps - 1 - optim.warmup_steps",
         "optim.total_steps - optim.warmup_steps"),
        ("the floor is added", "return floor + (1 - floor) * 0.5", "return floor + 0.5"),
        ("constant is a cosine", 'if optim.lr_scheduler == "constant":', "if False:"),
    ]),
    *faults("scripts/visual_opsd/training/teacher.py",
            "visual_opsd/training/test_step_oracle.py::test_a_run_recomputed", [
        ("the teacher is the student", "self.model if self.model is not None else self.student",
         "self.student", "visual_opsd/training/test_step.py"),
        ("the fixed teacher follows", 'return self.model if self.mode == "ema" else None',
         "return self.model"),
        ("the teacher's head is the student's",
         "        if self.model is None:\n            return None",
         "        if True:\n            return None"),
    ]),
    *faults("scripts/visual_opsd/training/sharding.py",
            "visual_opsd/training/test_step.py visual_opsd/training/test_sharding.py", [
        ("the EMA keeps what it should give", "make_update(decay)(", "make_update(1 - decay)("),
        ("what is frozen follows too", "        if current.requires_grad:\n", "        if True:\n"),
        ("the norm after clipping is told",
         "norm = torch.nn.utils.clip_grad_norm_(params, max_norm)",
         "torch.nn.utils.clip_grad_norm_(params := list(params), max_norm)\n    norm = "
         "torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])",
         "visual_opsd/training/test_step_oracle.py::test_a_run_recomputed"),
    ]),
]  # fmt: skip
