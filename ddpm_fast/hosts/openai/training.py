"""The losses and the likelihood of OpenAI's diffusion object; the object: `diffusion`."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import likelihood, reference
from ...likelihood import mean_flat
from ...reference_process import split
from .process import Kwargs, Network, Process, Terms


class Training(Process):
    """`training_losses` and `calc_bpd_loop`, and what they need."""

    def training_losses(
        self,
        model: Network,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Kwargs = None,
        noise: Tensor | None = None,
    ) -> Terms:
        """`loss` (N,), and what it is the sum of: `mse`, and `vb` where the variance is learned."""
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        if self._loss.endswith("KL"):
            loss = self._vb_terms_bpd(model, x_start, x_t, t, False, model_kwargs)["output"]
            return {"loss": loss * self.num_timesteps if self._loss == "RESCALED_KL" else loss}
        output = self._wrap_model(model)(x_t, t, **(model_kwargs or {}))
        prediction_type, variance_type = self._types
        learned, terms = variance_type.startswith("learned"), {}
        output, extra = split(output, x_t, learned)
        if learned:
            # The bound trains the variance, but not the mean.
            frozen = torch.cat((output.detach(), extra), 1)
            p = reference.p_mean_variance(self.schedule, frozen, x_t, t, *self._types, False)
            terms["vb"] = likelihood.vb_terms_bpd(self.schedule, x_start, x_t, t, p)
            if self._loss == "RESCALED_MSE":  # Nichol and Dhariwal 2021, section 3.1: lambda
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
        target = {"sample": x_start, "epsilon": noise}.get(prediction_type)
        if target is None:
            target, _, _ = self.q_posterior_mean_variance(x_start, x_t, t)
        terms["mse"] = mean_flat((target - output).square())
        terms["loss"] = terms["mse"] + terms["vb"] if learned else terms["mse"]
        return terms

    def _vb_terms_bpd(
        self,
        model: Network,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Kwargs = None,
    ) -> Terms:
        """`output`: the bound's term at t, (N,) bits per dimension; `pred_xstart`."""
        p = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
        output = likelihood.vb_terms_bpd(
            self.schedule, x_start, x_t, t, reference.PMeanVariance(**p)
        )
        return {"output": output, "pred_xstart": p["pred_xstart"]}

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        return likelihood.prior_bpd(self.schedule, x_start)

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        model: Network,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Kwargs = None,
    ) -> Terms:
        """The whole variational bound of x_start (N, C, ...), bits per dimension.

        total_bpd and prior_bpd are (N,); vb, xstart_mse and mse (of eps) are (N, T), the last t
        first.
        """
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for i in range(self.num_timesteps - 1, -1, -1):
            t = torch.full((len(x_start),), i, device=x_start.device)
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            columns["vb"].append(out["output"])
            columns["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start).square()))
            columns["mse"].append(mean_flat((eps - noise).square()))
        terms = {name: torch.stack(column, 1) for name, column in columns.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(1) + prior, "prior_bpd": prior, **terms}
