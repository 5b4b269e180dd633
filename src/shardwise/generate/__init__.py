"""Text from a checkpoint, or a model, under a layout: folders, strings and processes around `execute.generation`."""

from shardwise.generate.figures import Figures
from shardwise.generate.run import Continued, generate

__all__ = ["Continued", "Figures", "generate"]
