"""Errors of training, in AlborError's tree.

AlborError
├── ConfigError
│   └── SpecError         a spec that cannot work
├── DataError             sources or prepared data that cannot be used
├── TrainingError         a run that must stop
│   └── DivergedError         loss or gradients left what is sound
└── EvaluationError       a measurement that would mean nothing
"""

from __future__ import annotations

from albor_serve.errors import AlborError, ConfigError

__all__ = ["DataError", "DivergedError", "EvaluationError", "SpecError", "TrainingError"]


class SpecError(ConfigError):
    """A spec that cannot work."""


class DataError(AlborError):
    """Sources or prepared data that cannot be used."""


class TrainingError(AlborError):
    """A run that must stop."""


class DivergedError(TrainingError):
    """Loss or gradients left what is sound; no checkpoint was written for this step."""


class EvaluationError(AlborError):
    """A measurement that would mean nothing."""
