"""Errors that a caller must tell apart. All of them are ``ValueError``, with a message for the user."""


class NotSupported(ValueError):
    """The engine cannot run this model or this request; Transformers can."""


class EngineFull(ValueError):
    """As many requests as the engine has slots for are under way; one can be added when another ends."""
