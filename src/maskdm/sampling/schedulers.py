"""The samplers on offer: diffusers schedulers, set up for a run's noise schedule and target."""

from __future__ import annotations

from typing import Any, Literal

import diffusers

from maskdm.config import SCHEDULERS, SchedulerName
from maskdm.diffusion import Schedule, Target, betas
from maskdm.errors import UserError

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
TARGETS: dict[PredictionType, Target] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "v"}
"""diffusers' names for what a scheduler is given."""

FLOW_SCHEDULERS = ("euler", "heun", "dpm++", "unipc", "deis", "sa")
NOT_FOR_X0 = ("euler-a", "heun", "lms", "pndm")


def make_scheduler(name: SchedulerName, schedule: Schedule, target: Target) -> Any:
    """The scheduler, trained betas and prediction type set. Raises UserError where it does not fit the noise schedule.

    Timesteps are spaced from the last one down ("trailing", arXiv 2305.08891), so that sampling starts at the noise level
    that pure noise has.
    """
    if schedule == "flow":
        return _flow_scheduler(name)
    kind: PredictionType = "v_prediction" if target == "v" else "sample" if target == "x0" and name not in NOT_FOR_X0 else "epsilon"
    shared: dict[str, Any] = {"prediction_type": kind, "timestep_spacing": "trailing"} | _betas(schedule)
    match name:
        case "ddim":
            return diffusers.DDIMScheduler(**shared)
        case "ddpm":
            return diffusers.DDPMScheduler(**shared)
        case "deis":
            return diffusers.DEISMultistepScheduler(**shared)
        case "dpm++":
            return diffusers.DPMSolverMultistepScheduler(**shared)
        case "dpm++sde":
            return diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **shared)
        case "euler":
            return diffusers.EulerDiscreteScheduler(**shared)
        case "euler-a":
            return diffusers.EulerAncestralDiscreteScheduler(**shared)
        case "heun":
            # evenly spaced times would make its first step, from the almost infinite noise of a cosine schedule, blow up
            return diffusers.HeunDiscreteScheduler(use_karras_sigmas=True, **shared)
        case "lms":
            return diffusers.LMSDiscreteScheduler(**shared)
        case "pndm":
            return diffusers.PNDMScheduler(skip_prk_steps=True, **shared)
        case "sa":
            return diffusers.SASolverScheduler(**shared)
        case "unipc":
            return diffusers.UniPCMultistepScheduler(**shared)


def _betas(schedule: Literal["linear", "cosine", "vp"]) -> dict[str, Any]:
    match schedule:
        case "linear":
            return {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
        case "cosine":
            return {"beta_schedule": "squaredcos_cap_v2"}
        case "vp":
            return {"trained_betas": betas("vp").tolist()}


def _flow_scheduler(name: SchedulerName) -> Any:
    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    match name:
        case "euler":
            return diffusers.FlowMatchEulerDiscreteScheduler()
        case "heun":
            return diffusers.FlowMatchHeunDiscreteScheduler()
        case "dpm++":
            return diffusers.DPMSolverMultistepScheduler(**flow)
        case "unipc":
            return diffusers.UniPCMultistepScheduler(**flow)
        case "deis":
            return diffusers.DEISMultistepScheduler(**flow)
        case "sa":
            return diffusers.SASolverScheduler(**flow)
        case _:
            raise UserError(f"scheduler {name} does not fit the rectified flow schedule; use one of {', '.join(FLOW_SCHEDULERS)}")


def offered(schedule: Schedule) -> tuple[str, ...]:
    """Names of the schedulers that fit a noise schedule."""
    return FLOW_SCHEDULERS if schedule == "flow" else SCHEDULERS


def prediction_type(scheduler: Any) -> PredictionType:
    """What a diffusers scheduler expects the network's output to be."""
    return scheduler.config.get("prediction_type", "flow_prediction")  # the flow-matching ones have no such setting
