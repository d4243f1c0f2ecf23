"""Why bytes are not an image that can be used."""

from fastmoco.errors import UserError


class Undecodable(UserError):
    """The message says why these bytes are no image that can be read."""


class DecoderMissing(Undecodable):
    """The bytes may well be an image, but a package that would read it is not installed; the message names it."""
