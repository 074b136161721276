"""No circle, no arrow upward, and no more in a process than it needs. Read from the source."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from longreach.cluster.messages import WorkerDestination
from longreach.engine.kv.destination import Part, PartedDestination
from longreach.lab.house.imports import House, circles, direct

ROOT = Path(__file__).parents[2]

MAY_IMPORT = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "cluster": {"cluster", "engine", "kernels"},
    "deploy": {"deploy", "cluster", "engine"},
    "plugins": {"plugins", "engine", "kernels"},
    "lab": {"lab", "engine", "kernels", "plugins"},
    "loadtest": {"loadtest"},
}
"""From a floor to those that its modules may import."""
LAB_MAY_IMPORT = {"cluster.client"}
"""Besides: what asks an endpoint."""

ENGINE = (
    {"errors", "figures", "messages", "milestones", "stages"},
    {"fairness", "json_files", "parallel"},
    {"text", "kv"},
    {"model"},
    {"memory"},
    {"prefill", "decode"},
    {"local"},
)
"""The engine's rooms from the ground up: each imports from those before its own line alone."""

RANK, WORKER = "cluster.prefill.rank", "cluster.decode.worker"
REPLICAS = ("cluster.prefill.replica", "cluster.decode.replica")
NEVER_SERVES = {"matplotlib", "transformers", "openai"}


def loaded(program: str, names: set[str]) -> set[str]:
    """Which of these packages a fresh process has after a program; those of ours by full names."""
    code = f"import sys\n{program}\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return names & set(done.stdout.split("\n")[-2].split())


def test_no_module_is_in_a_circle(house: House) -> None:
    assert circles(house.module_arrows) == []


def test_no_room_is_in_a_circle(house: House) -> None:
    assert circles(house.room_arrows) == []


def test_no_arrow_leads_upward(house: House) -> None:
    upward = {
        (name, target)
        for name, module in house.modules.items()
        for target in module.imports
        if house.modules[target].floor not in MAY_IMPORT[module.floor]
        and not (module.floor == "lab" and target in LAB_MAY_IMPORT)
    }
    assert upward == set()


def test_what_vllm_computes_with_is_free_of_vllm(house: House) -> None:
    """So it is tested without one, and can be used without one."""
    reached = house.reach("plugins.vllm.step_attention") | house.reach("plugins.vllm.decode_rows")
    assert {name for name in reached if "vllm" in house.modules[name].foreign} == set()
    assert "plugins.vllm.piece_attention" in reached
    assert "vllm" in house.modules["plugins.vllm.backend"].foreign


def test_an_engine_of_vllm_is_tested_without_one(house: House) -> None:
    """All but what starts it, and what is handed to it."""
    reached = house.reach("plugins.vllm_decode.decoder")
    assert {name for name in reached if "vllm" in house.modules[name].foreign} == set()
    assert "plugins.vllm_decode.held_to" in reached


def test_the_engines_rooms_stand_on_those_before_them(house: House) -> None:
    level = {room: number for number, rooms in enumerate(ENGINE) for room in rooms}
    arrows = [
        (source.partition(".")[2], target.partition(".")[2])
        for source, targets in house.room_arrows.items()
        for target in targets
        if source.startswith("engine.") and target.startswith("engine.")
    ]
    assert {room.partition(".")[2] for room in house.rooms if room.startswith("engine.")} == set(
        level
    )
    assert [arrow for arrow in arrows if level[arrow[0]] <= level[arrow[1]]] == []


@pytest.mark.parametrize("name", [RANK, WORKER, *REPLICAS])
def test_what_serves_can_never_import_the_lab_or_its_tools(house: House, name: str) -> None:
    """Late imports included, on any device."""
    reached = [house.modules[each] for each in house.reach(name)]
    assert {module.floor for module in reached} == {"cluster", "engine", "kernels"}
    assert {module.name for module in reached if module.foreign & NEVER_SERVES} == set()


@pytest.mark.parametrize("name", [RANK, WORKER])
def test_ranks_and_workers_load_no_more_than_that(house: House, name: str) -> None:
    """Nor does anything that they import bring it."""
    # What is compiled for a GPU is imported on one.
    own = {each for each in house.reach(name) if "triton" not in house.modules[each].foreign}
    own -= {each for each in own if any("triton_" in to for to in house.modules[each].imports)}
    program = "\n".join(f"import longreach.{each}" for each in sorted(own))
    assert loaded(program, NEVER_SERVES | {"torch"}) == {"torch"}


@pytest.mark.parametrize("name", REPLICAS)
def test_replicas_load_no_torch(name: str) -> None:
    unwanted = NEVER_SERVES | {"torch", "tokenizers", "longreach.lab", "longreach.cluster.rest"}
    assert loaded(f"import longreach.{name}", unwanted) == set()


def test_destinations_pass_through_replicas_without_torch() -> None:
    """Loading it there stops everything for seconds: in the first long prompt, and after a loss."""
    whole = PartedDestination("a", 0, (Part(range(2), WorkerDestination("a", 0, None, 1)),))
    program = f"import pickle\nprint(pickle.loads({pickle.dumps(whole)!r}).parts[0])"
    assert loaded(program, {"torch", "ray"}) == {"ray"}


def test_reading_a_configuration_loads_little() -> None:
    heavy = {"torch", "openai", "fastapi", "ray", "tokenizers", "jinja2", "numpy"}
    program = (
        "import yaml\nfrom longreach.cluster.settings import parse_settings\n"
        f"parse_settings(yaml.safe_load(open({str(ROOT / 'configs' / 'laptop.yaml')!r})))"
    )
    assert loaded(program, heavy) == set()


@pytest.mark.parametrize("command", [["--help"], ["serve", "--help"], ["config", "--help"]])
def test_help_loads_little(command: list[str]) -> None:
    heavy = {"torch", "openai", "fastapi", "ray", "tokenizers", "matplotlib", "numpy"}
    program = (
        "from longreach.cluster.cli.main import app\n"
        f"try:\n    app({command})\nexcept SystemExit:\n    pass"
    )
    assert loaded(program, heavy) == set()
    if command[0] != "--help":
        assert loaded(program, {"longreach.lab"}) == set()


def test_circles_are_found() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e"}, "f": {"a"}}
    assert circles(arrows) == [["b", "c"], ["e"]]


def test_what_follows_from_other_arrows_is_left_out() -> None:
    arrows = {"a": {"b", "c", "d"}, "b": {"d"}, "c": {"d"}, "d": set()}
    assert direct(arrows) == {"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}


def test_imports_are_read_wherever_they_stand(tmp_path: Path) -> None:
    room = tmp_path / "engine" / "room"
    room.mkdir(parents=True)
    for folder in (room.parent, room):
        (folder / "__init__.py").write_text('"""Nothing."""\n')
    (room.parent / "errors.py").write_text("import json\n\nclass Wrong(Exception): ...\n")
    (room / "late.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from . import other\n"
        "def use():\n    from ..errors import Wrong\n    import torch.nn\n    return Wrong\n"
    )
    (room / "other.py").write_text(
        "from longreach.engine import errors, room\nfrom .late import use\n"
    )
    house = House.read(tmp_path)
    assert house.modules["engine.room.late"].imports == {"engine.room.other", "engine.errors"}
    assert house.modules["engine.room.late"].foreign == {"typing", "torch"}
    assert house.modules["engine.room.other"].imports == {
        "engine.errors", "engine.room", "engine.room.late",
    }  # fmt: skip
    assert house.room_arrows == {"engine.errors": set(), "engine.room": {"engine.errors"}}
    assert circles(house.module_arrows) == [["engine.room.late", "engine.room.other"]]
    assert house.reach("engine.errors") == {"engine", "engine.errors"}
