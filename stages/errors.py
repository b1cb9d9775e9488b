"""What a user can get wrong about data, budget and statistics.

UserError
├── DataError          calibration or evaluation text
├── BudgetError        how many experts to keep, or an exporter that cannot express it
├── StatisticsError    statistics of another model, or damaged ones
├── StaleUnit          a finished unit was made from another model, data or config
├── Paused             a training was asked to stop, and left a state to go on from
├── TrainingError      recovery met a loss that is no number
├── ReplicaError       an expert-parallel replica computes something else than one process
└── GateError          the written checkpoint did not open as promised
"""

from models.errors import UserError


class DataError(UserError):
    """Text that is missing, empty or lacks the named column."""


class BudgetError(UserError):
    """A budget that no decision can meet."""


class StatisticsError(UserError):
    """Routing statistics that do not belong to this model."""


class StaleUnit(UserError):
    """A finished unit has another fingerprint than the one now asked for."""


class Paused(UserError):
    """A training stopped because it was asked to; the run says so in words of its own."""


class TrainingError(UserError):
    """The loss or a gradient is NaN or infinite."""


class ReplicaError(UserError):
    """A layer whose experts lie on several ranks does not answer as it does in one process."""


class GateError(UserError):
    """The compressed checkpoint was refused by the reload gate."""
