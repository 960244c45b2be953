"""What faults are tried on; everything here is made in children, so that this process stays small.

A process that has run an engine or a training should not be forked any more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.jobs import Job, build_job, eval_job, num_writes, run_job, train_job
from faults.outcome import forked
from faults.undisturbed import Undisturbed
from kit.files import MadeOnce

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker("faults")


@pytest.fixture(scope="session", autouse=True)
def quiet_machine() -> None:
    """Nothing here asks the network, and cases share the cores with their neighbours."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}


def made_in_child(make: Callable[[], object]) -> None:
    outcome = forked(make, limit_s=300)
    assert outcome.status == 0, outcome.text


@pytest.fixture(scope="session")
def backbones(made_once: MadeOnce) -> Path:
    """A folder with tiny backbones of four families; only to be read."""

    def make(root: Path) -> None:
        from kit.models import write_tiny_backbone

        for seed, family in enumerate(("llama", "qwen3", "gemma3")):
            write_tiny_backbone(root / family, family, seed=seed)
        write_tiny_backbone(root / "qwen2", "qwen2", seed=1, hidden_size=48)

    return made_once("backbones of faults", lambda root: made_in_child(lambda: make(root)))


@pytest.fixture(scope="session")
def whole_bundle(made_once: MadeOnce) -> Path:
    """The bundle by hand, whole; only to be read."""

    def make(root: Path) -> None:
        from kit.hand_bundle import write_hand_bundle

        write_hand_bundle(root / "bundle")

    made = made_once("bundle of faults", lambda root: made_in_child(lambda: make(root)))
    return made / "bundle"


@pytest.fixture(scope="session")
def undisturbed(
    backbones: Path,
    whole_bundle: Path,
    made_once: MadeOnce,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Undisturbed]:
    """Run a job by name without a kill, once."""
    import recmas_compiler.evaluation.evaluate
    import recmas_compiler.training.run  # noqa: F401
    import recmas_export.assemble
    import recmas_export.torch_parts  # noqa: F401
    import recmas_runtime.cli.run  # noqa: F401

    made: dict[str, Undisturbed] = {}

    def earlier(name: str, job: Job, *settings: str) -> Path:
        """Run a job with other settings, for what lies there before."""
        folder = tmp_path_factory.mktemp(f"{name}-before")
        job.prepare(folder)
        outcome = job.run(folder, [*job.arguments, *settings])
        assert outcome.status == 0, outcome.text
        return folder

    def job_of(name: str) -> Job:
        match name:
            case "run":
                return run_job(whole_bundle)
            case "eval":
                return eval_job(whole_bundle)
            case "train":
                return train_job(backbones)
            case "train over":
                other = earlier(name, train_job(backbones), "--set", "train.warmup_steps=1")
                return train_job(backbones, over=other)
            case "build":
                return build_job(backbones, made_once)
            case _:
                first = build_job(backbones, made_once)
                other = earlier(name, first, "--set", "answer.max_new_tokens=5")
                return build_job(backbones, made_once, over=other)

    def make(name: str) -> Undisturbed:
        if name not in made:
            job = job_of(name)
            folder = tmp_path_factory.mktemp(name)
            job.prepare(folder)
            has_before = name.endswith("over")
            before = job.result(folder) if has_before else None
            earlier_bytes = num_bytes(folder)
            writes, seconds = num_writes(job, folder)
            whole = job.result(folder)
            assert whole != before
            made[name] = Undisturbed(
                job=job,
                whole=whole,
                before=before,
                writes=writes,
                seconds=seconds,
                num_bytes=num_bytes(folder) - earlier_bytes,
            )
        return made[name]

    return make


def num_bytes(folder: Path) -> int:
    return sum(p.lstat().st_blocks * 512 for p in folder.rglob("*"))
