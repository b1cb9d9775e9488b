"""Failures of the infrastructure, as opposed to the user's input."""


class InfrastructureError(RuntimeError):
    """Workers, nodes or the cluster failed more often than the retry budget allows."""


class NotShared(RuntimeError):
    """Nodes of the cluster do not see the files of the run. `cause`: which nodes, which files."""


class LostPeer(InfrastructureError):
    """A rank could not reach the others of its replica: one died, or the network did."""
