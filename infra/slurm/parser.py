"""A parser of arguments whose errors are one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from infra.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see {self.prog} --help")
