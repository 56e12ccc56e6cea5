"""Errors that a caller must tell apart. All of them are ``ValueError``, with a message for the user."""


class NotSupported(ValueError):
    """The engine cannot run this model or this request; Transformers can."""
