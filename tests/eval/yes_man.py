"""A language model that finds shorter texts likelier, so that tasks can be run without one."""

from typing import Any

from lm_eval.api.model import LM


class YesMan(LM):
    """Minus the number of letters."""

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(-float(len(request.args[1])), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return [-float(len(request.args[0])) for request in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        return ["yes" for _ in requests]
