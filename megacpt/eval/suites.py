"""Named suites of tasks, and groups of tasks that count as one in a suite. Names are lm_eval's."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megacpt.errors import UserError

MMLU_MEDICAL = tuple(
    f"mmlu_{topic}"
    for topic in ("medical_genetics", "anatomy", "clinical_knowledge", "professional_medicine", "college_medicine")
)
GROUPS: dict[str, tuple[str, ...]] = {"mmlu_medical": MMLU_MEDICAL}
"""The unweighted mean over these tasks stands for one task of a suite."""
SUITES: dict[str, tuple[str, ...]] = {
    "medical-table1": ("pubmedqa", "medmcqa", "medqa_4options", "mmlu_medical"),
    "medical-figures": ("pubmedqa", "medmcqa", "medqa_4options", "mmlu_medical_genetics"),
    "general-10": (
        "arc_challenge",
        "arc_easy",
        "boolq",
        "copa",
        "hellaswag",
        "openbookqa",
        "piqa",
        "race",
        "sciq",
        "winogrande",
    ),
}
"""The averages of arXiv 2406.14833: its Table 1 and its figures on medicine, and its general average."""
SUITE_METRIC = "acc"
"""What a suite averages. The paper does not say whether it normalised by length; `acc_norm` has rows of its own."""
ALSO = {"medqa": "medqa_4options", "mmlu_genetics": "mmlu_medical_genetics"}
"""What people call a task whose name in lm_eval is another."""


@dataclass(frozen=True)
class Selection:
    """What to run: `tasks` are lm_eval's names, each once; `suites` and `groups` those that were asked for."""

    tasks: tuple[str, ...]
    suites: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def suite_of(self, task: str) -> str | None:
        """The first suite that a task, or a group, was asked for by."""
        return next((suite for suite in self.suites if task in (*SUITES[suite], *tasks_of(SUITES[suite]))), None)


def tasks_of(members: Iterable[str]) -> list[str]:
    """Members with groups replaced by their tasks."""
    return [task for member in members for task in GROUPS.get(member, (member,))]


def select(names: Sequence[str]) -> Selection:
    """Suites, groups and tasks by name, in the order asked for, each task once."""
    known = [ALSO.get(name, name) for name in names]
    suites = tuple(dict.fromkeys(name for name in known if name in SUITES))
    members = [member for name in known for member in SUITES.get(name, (name,))]
    groups = tuple(dict.fromkeys(name for name in members if name in GROUPS))
    return Selection(tuple(dict.fromkeys(tasks_of(members))), suites, groups)


def unknown_task(name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is neither a task nor a suite; names the nearest."""
    names = list(dict.fromkeys([*SUITES, *GROUPS, *ALSO, *known]))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]!r}?" if near else f"suites are {', '.join(SUITES)}"
    return UserError(f"no task or suite is named {name!r}; {meant}")
