"""What a measuring process does when asked; see `zoo.bench.worker` for the process."""

import dataclasses
import importlib
import os
import traceback
from collections.abc import Mapping
from typing import Any

from zoo.bench.operators import OperatorBench
from zoo.bench.report import newest
from zoo.bench.shapes import Case, Request

__all__ = ["Server"]


class Server:
    """Answers {"do": ...}; an error is {"error": sentence}."""

    def __init__(self) -> None:
        self.bench: Any = None
        self.cases: list[Any] = []

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request, which its key "do" names; an error is an answer too."""
        try:
            return {"operators": self._operators, "model": self._model, "round": self._round, "results": self._results}[
                message["do"]
            ](message)
        except Exception as error:  # the other side prints one sentence, and the other process has to be ended
            if os.environ.get("ZOO_TRACEBACK") == "1":
                traceback.print_exc()
            text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            return {"error": text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"}

    def _operators(self, message: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(message["request"])
        cases = tuple(Case(**case) for case in given.pop("cases"))
        self.bench = OperatorBench(Request(cases, **{**given, "backends": tuple(given["backends"])}))
        self.cases = [self.bench.prepare(case) for case in cases]
        return {}

    def _model(self, message: Mapping[str, Any]) -> dict[str, Any]:
        steps = importlib.import_module("zoo.bench.steps")  # operators alone need no Lightning
        self.bench = steps.StepBench(steps.ModelRequest(**message["request"]))
        self.cases = [self.bench.prepare()]
        return {}

    def _round(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if not any(side.is_red for case in self.cases for side in case.sides):
            self.bench.round()
        return {"newest": newest(self.cases[-1])}

    def _results(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {"cases": [dataclasses.asdict(case) for case in self.cases]}
