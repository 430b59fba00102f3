"""The only file that may touch Captum's private names; everything else imports them from here."""

from captum.log import log_usage

__all__ = ["log_usage"]
