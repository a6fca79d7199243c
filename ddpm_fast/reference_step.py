"""The table form of a sampling step, in plain tensor operations; use it as `reference.step`."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.arguments import shown


def _any(mask: Tensor, traced: bool) -> bool:
    """Whether a value of the mask is set; `traced` where there are no values to look at, as in
    torch.export."""
    return traced if torch.compiler.is_exporting() else bool(mask.any())


def _check_state(coefficients: Tensor, index: Tensor, row: Tensor, x_t: Tensor) -> None:
    if x_t.ndim < 2 or not x_t.is_floating_point():
        raise ValueError(
            f"x_t must be a floating-point tensor (N, C, ...), but is {x_t.dtype} of shape"
            f" {tuple(x_t.shape)}."
        )
    steps = len(coefficients) if coefficients.ndim else 0
    if coefficients.shape != (steps, 16) or index.shape != (steps, 4):
        raise ValueError(
            f"a plan's coefficients (S, 16) and index (S, 4) are wanted, but came with shapes"
            f" {tuple(coefficients.shape)} and {tuple(index.shape)}."
        )
    if row.dtype != torch.int64 or row.shape != x_t.shape[:1]:
        raise ValueError(
            f"row must be int64 of shape ({len(x_t)},), one per sample, but is {row.dtype} of"
            f" shape {tuple(row.shape)}."
        )
    if _any((row < 0) | (row >= steps), traced=False):
        raise ValueError(f"row must lie in 0 to {steps - 1}, but holds {shown(row.tolist())}.")


def _optional(name: str, value: Tensor | None, used: bool, x_t: Tensor) -> Tensor:
    """`value` in x_t's dtype; zeros where it is not given and no row uses it."""
    if value is None:
        if used:
            raise ValueError(f"{name} must be given, because a row of the plan uses it.")
        return torch.zeros_like(x_t)
    if value.shape != x_t.shape:
        raise ValueError(
            f"{name} must have the shape {tuple(x_t.shape)} of x_t, but has {tuple(value.shape)}."
        )
    return value.to(x_t.dtype)


def _prediction(
    model_output: Tensor, x_t: Tensor, guidance_scale: Tensor | float | None, learned: bool
) -> tuple[Tensor, Tensor]:
    """The (guided) prediction and the variance channels, in x_t's dtype."""
    rows = x_t.shape[0] * (1 if guidance_scale is None else 2)
    channels = x_t.shape[1]
    single, double = ((rows, c, *x_t.shape[2:]) for c in (channels, 2 * channels))
    if model_output.shape != double and (learned or model_output.shape != single):
        wanted = f"{double}" if learned else f"{single} or {double}"
        raise ValueError(
            f"model_output must have the shape {wanted} for x_t of {tuple(x_t.shape)}"
            f"{'' if guidance_scale is None else ' under guidance'}, but has"
            f" {tuple(model_output.shape)}."
        )
    output = model_output[:, :channels].to(x_t.dtype)
    # Guidance acts on the prediction; the variance is the conditional half's (as DiT has it).
    extra = model_output[: x_t.shape[0], channels:].to(x_t.dtype)
    if guidance_scale is None:
        return output, extra
    scale = torch.as_tensor(guidance_scale, dtype=x_t.dtype, device=x_t.device)
    if scale.shape not in (torch.Size([]), x_t.shape[:1]):
        raise ValueError(
            f"guidance_scale must be one number or one per sample ({x_t.shape[0]}), but has the"
            f" shape {tuple(scale.shape)}."
        )
    conditional, unconditional = output.chunk(2)
    scale = scale.reshape(-1, *[1] * (x_t.ndim - 1))
    return unconditional + scale * (conditional - unconditional), extra


def _exp(x: Tensor) -> Tensor:
    """exp; in float32 the contract's polynomial, whose bits every backend repeats (but in an
    exported program, which has torch's)."""
    if x.dtype != torch.float32 or torch.compiler.is_exporting():
        return torch.exp(x)
    from ddpm_fast.noise import exp32

    return (
        torch.from_numpy(exp32(x.detach().cpu().contiguous().numpy())).reshape(x.shape).to(x.device)
    )


def _sum(terms: list[tuple[Tensor, Tensor]]) -> Tensor:
    """0 + c * v + ... from left to right, each product and sum rounded; terms with c = 0 skipped.

    Skipped by selection, not by multiplication, so an infinity or NaN there does no harm.
    """
    total = torch.zeros_like(terms[0][1])
    for coefficient, value in terms:
        total = torch.where(coefficient != 0, total + coefficient * value, total)
    return total


def step(
    coefficients: Tensor,
    index: Tensor,
    row: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    noise: Tensor | None = None,
    previous_pred_xstart: Tensor | None = None,
    guidance_scale: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of a plan: (x_prev, pred_xstart), each of x_t's shape (N, C, ...) and dtype.

    coefficients (S, 16), index (S, 4): the plan's; row (N,) int64: each sample's row. model_output
    has x_t's shape, with 2C channels where the plan has learned variances (the last C are the
    variance's), and 2N rows where guidance_scale (a number, or (N,)) is given: the first N
    conditional, the last unconditional; eps = u + scale * (c - u). noise and previous_pred_xstart
    may be left out where no row in use has a coefficient for them. Everything is rounded to x_t's
    dtype, operation by operation, in the order written here. A NaN passes the clip as a NaN.
    torch.export takes it: noise and previous_pred_xstart must then be given.
    """
    _check_state(coefficients, index, row, x_t)
    # The columns as methods.py names them.
    columns = coefficients[row].to(x_t.dtype)
    a, b, c0, c1, c2, c3, sigma, min_log, max_log, low, high = (
        column.reshape(-1, *[1] * (x_t.ndim - 1)) for column in columns.unbind(1)[:11]
    )
    learned = ((index[row, 2] & 1) != 0).reshape(sigma.shape)  # methods.LEARNED_VARIANCE
    has_extra = model_output.ndim > 1 and model_output.shape[1] == 2 * x_t.shape[1]
    any_learned = _any(learned, traced=has_extra)

    output, extra = _prediction(model_output, x_t, guidance_scale, any_learned)
    noisy, multistep = _any(learned | (sigma != 0), True), _any(c2 != 0, True)
    noise = _optional("noise", noise, noisy, x_t)
    previous = _optional("previous_pred_xstart", previous_pred_xstart, multistep, x_t)
    if any_learned:
        frac = (extra + 1) * 0.5
        log_variance = frac * max_log + (1 - frac) * min_log
        sigma = torch.where(learned, _exp(0.5 * log_variance), sigma)

    pred_xstart = torch.clamp(_sum([(a, x_t), (b, output)]), low, high)
    x_prev = _sum([(c0, pred_xstart), (c1, x_t), (c2, previous), (c3, output), (sigma, noise)])
    return x_prev, pred_xstart
