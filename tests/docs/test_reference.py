"""The pages name whatever is public, and every key that is logged."""

import re

import pytest

import lmc_lightning
from lmc_lightning import CheckpointBranching, MeasurementCallback
from tests.callbacks.runs import documented
from tests.docs.pages import ROOT

CALLBACKS = [
    value
    for value in (getattr(lmc_lightning, name) for name in lmc_lightning.__all__)
    if isinstance(value, type) and issubclass(value, MeasurementCallback | CheckpointBranching)
    if value is not MeasurementCallback
]


def test_every_public_name_is_in_the_reference_once() -> None:
    pages = [(ROOT / "docs" / "reference" / f"{page}.md").read_text() for page in ("callbacks", "functions")]
    named = re.findall(r"^\.\. auto(?:class|function):: (\w+)$", "\n".join(pages), flags=re.MULTILINE)
    assert sorted(named) == sorted(lmc_lightning.__all__)


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda callback: callback.__name__)
def test_the_page_of_keys_names_every_key_of_a_callback(callback: type) -> None:
    page = (ROOT / "docs" / "keys.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{callback.__name__}` |")]
    named = set(re.findall(r"`(\S+?)`", row))
    spelled = {re.sub(r"^.*_(stderr|stderr_data|residual)$", r"…_\1", key) for key in documented(callback)}
    assert spelled - named == set()


def test_the_readme_has_a_card_for_each_callback() -> None:
    readme = (ROOT / "README.md").read_text()
    cards = set(re.findall(r"^\| `(\w+)` \|", readme, flags=re.MULTILINE))
    assert cards == {callback.__name__ for callback in CALLBACKS}
