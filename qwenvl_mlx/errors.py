"""Every error that a user can mend, in one tree.

QwenVLError             the message names the cause and the cure; commands print it and exit with 1
├── ConfigError         config.json asks for something unknown or contradictory
├── CheckpointError     a file of weights is damaged, incomplete, or of another model
├── HubError            a name could not be turned into a folder
├── OutputError         the result can't be written where it was asked for
├── PromptError         messages, placeholders or lengths that don't fit the model
│   └── MediaError      a picture or video that can't be fetched, read, or accepted
├── GenerationError     options that can't be served
│   └── OutOfMemory     the request does not fit this machine
└── Busy                the queue is full: try again later
"""


class QwenVLError(Exception):
    """Base of all errors of this package: ``str(error)`` is one line for the user, with the cure."""


class ConfigError(QwenVLError):
    """A configuration asks for something that this package does not know."""


class CheckpointError(QwenVLError):
    """Weights are damaged, incomplete, or belong to another model."""


class HubError(QwenVLError):
    """A model name could not be turned into a folder."""


class OutputError(QwenVLError):
    """The result can't be written where it was asked for."""


class PromptError(QwenVLError):
    """Messages, placeholders or lengths that the model can't take."""


class MediaError(PromptError):
    """A picture or video that can't be fetched, read or accepted."""


class GenerationError(QwenVLError):
    """Generation options that can't be served."""


class OutOfMemory(GenerationError):
    """The request does not fit into this machine's memory."""


class Busy(QwenVLError):
    """The engine's queue is full."""
